//! The PVH start info: what a kernel entered by the PVH protocol is told.
//!
//! Source: xen/include/public/arch-x86/hvm/start_info.h (version 1).

use std::ops::Range;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, KnownLayout, Unaligned};

use super::memory_map::MapEntry;
use crate::layout::BOOT_INFO;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const VERSION: u32 = 1;

#[derive(Debug, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    nr_modules: U32,
    modlist_paddr: U64,
    cmdline_paddr: U64,
    rsdp_paddr: U64,
    memmap_paddr: U64,
    memmap_entries: U32,
    reserved: U32,
}

#[derive(Debug, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ModlistEntry {
    paddr: U64,
    size: U64,
    cmdline_paddr: U64,
    reserved: U64,
}

#[derive(Debug, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct MemmapEntry {
    addr: U64,
    size: U64,
    kind: U32,
    reserved: U32,
}

/// The start info, module list and memory map, as one piece for [`BOOT_INFO`].
pub(super) fn start_info(
    cmdline: u64,
    initrd: Option<Range<u64>>,
    rsdp: u64,
    map: &[MapEntry],
) -> Vec<u8> {
    let modlist = BOOT_INFO.start.saturating_add(size_of::<StartInfo>() as u64);
    let memmap = modlist.saturating_add(size_of::<ModlistEntry>() as u64);
    let info = StartInfo {
        magic: MAGIC.into(),
        version: VERSION.into(),
        flags: 0.into(),
        nr_modules: u32::from(initrd.is_some()).into(),
        modlist_paddr: modlist.into(),
        cmdline_paddr: cmdline.into(),
        rsdp_paddr: rsdp.into(),
        memmap_paddr: memmap.into(),
        memmap_entries: (map.len() as u32).into(),
        reserved: 0.into(),
    };
    let initrd = initrd.unwrap_or_default();
    let module = ModlistEntry {
        paddr: initrd.start.into(),
        size: initrd.end.saturating_sub(initrd.start).into(),
        cmdline_paddr: 0.into(),
        reserved: 0.into(),
    };
    let mut bytes = [info.as_bytes(), module.as_bytes()].concat();
    for entry in map {
        let entry = MemmapEntry {
            addr: entry.start.into(),
            size: entry.len.into(),
            kind: (entry.kind as u32).into(),
            reserved: 0.into(),
        };
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::memory_map::RangeType;
    use super::*;

    #[test]
    fn fields_are_where_the_header_file_has_them() {
        let map = [MapEntry { start: 0x10_0000, len: 0x1000, kind: RangeType::Reserved }];
        let bytes = start_info(0x2_0000, Some(0x5000..0x5010), 0xe_0000, &map);
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(u64_at(0), 0x1_336e_c578);
        assert_eq!(u64_at(8), 1 << 32);
        assert_eq!((u64_at(24), u64_at(32), u64_at(48)), (0x2_0000, 0xe_0000, 1));
        let at = |pointer: u64| (pointer - BOOT_INFO.start) as usize;
        let module = at(u64_at(16));
        assert_eq!((u64_at(module), u64_at(module + 8)), (0x5000, 0x10));
        let entry = at(u64_at(40));
        assert_eq!((u64_at(entry), u64_at(entry + 8), u64_at(entry + 16)), (0x10_0000, 0x1000, 2));
        assert_eq!(bytes.len(), entry + 24);
    }
}
