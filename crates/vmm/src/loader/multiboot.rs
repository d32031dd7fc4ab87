//! Multiboot (version 1): the header that asks for it, and the information structure.
//!
//! For small kernels such as kvm-unit-tests' and hobby ones; only ELF files, whose
//! program headers say what goes where.
//!
//! Source: Multiboot Specification 0.6.96, sections 3.1 and 3.3.

use std::ops::Range;

use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

use super::elf::Executable;
use super::error::{KernelError, LoadError};
use super::image::Image;
use super::memory_map::MapEntry;
use super::place::Placer;
use crate::layout::{HIGH_MEMORY, LOW_USABLE_END, MULTIBOOT_INFO};

/// The header's magic number.
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header lies within this much of the file's beginning, at a multiple of four.
const HEADER_WITHIN: usize = 8192;
/// What EAX holds at entry.
pub(super) const BOOTLOADER_MAGIC: u32 = 0x2bad_b002;

/// Header flags: modules begin at pages (they always do here).
const ALIGN_MODULES: u32 = 1 << 0;
/// Header flags: memory information is wanted (it is always given).
const MEMORY_INFO: u32 = 1 << 1;
/// Header flags that a loader must refuse when it does not understand them.
const REQUIRED: u32 = 0xffff;

/// Information flags: `mem_lower` and `mem_upper`.
const INFO_MEMORY: u32 = 1 << 0;
/// Information flags: `cmdline`.
const INFO_CMDLINE: u32 = 1 << 2;
/// Information flags: `mods_*`.
const INFO_MODS: u32 = 1 << 3;
/// Information flags: `mmap_*`.
const INFO_MMAP: u32 = 1 << 6;
/// Information flags: `boot_loader_name`.
const INFO_LOADER_NAME: u32 = 1 << 9;

/// Finds the header; returns its flags.
pub(super) fn find_header(head: &[u8]) -> Option<u32> {
    let head = head.get(..HEADER_WITHIN).unwrap_or(head);
    let mut words = head
        .chunks_exact(4)
        .map(|word| word.iter().rev().fold(0, |n, byte| n << 8 | u32::from(*byte)));
    while let Some(word) = words.next() {
        let mut rest = words.clone();
        if word == HEADER_MAGIC
            && let (Some(flags), Some(checksum)) = (rest.next(), rest.next())
            && word.wrapping_add(flags).wrapping_add(checksum) == 0
        {
            return Some(flags);
        }
    }
    None
}

/// Loads the kernel; returns its entry and where it ends in memory.
pub(super) fn load(
    image: &Image,
    head: &[u8],
    placer: &mut Placer<'_>,
) -> Result<(u64, u64), KernelError> {
    let flags = find_header(head).unwrap_or_default();
    if flags & REQUIRED & !(ALIGN_MODULES | MEMORY_INFO) != 0 {
        return Err(KernelError::Multiboot(
            "it requires a feature this machine lacks (such as a video mode)",
        ));
    }
    let mut kernel = Executable::read(image.section(0, image.len()))?;
    kernel.load(placer)?;
    Ok((kernel.entry()?, kernel.end()))
}

#[derive(Debug, Default, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Info {
    flags: U32,
    mem_lower: U32,
    mem_upper: U32,
    boot_device: U32,
    cmdline: U32,
    mods_count: U32,
    mods_addr: U32,
    syms: [U32; 4],
    mmap_length: U32,
    mmap_addr: U32,
    drives: [U32; 2],
    config_table: U32,
    boot_loader_name: U32,
    apm_table: U32,
}

/// What the kernel is told beside the memory map.
#[derive(Debug)]
pub(super) struct Told<'t> {
    /// Where the command line is.
    pub(super) cmdline: u64,
    /// The modules: range and name.
    pub(super) modules: &'t [(Range<u64>, &'t str)],
    /// The memory map.
    pub(super) map: &'t [MapEntry],
    /// The end of RAM below 4 GiB.
    pub(super) low_end: u64,
}

/// The information structure, and what it points to, as one piece for [`MULTIBOOT_INFO`].
pub(super) fn info(told: &Told<'_>) -> Result<Vec<u8>, LoadError> {
    let too_many = || LoadError::TooManyInitrds(told.modules.len());
    let mut blob = Blob(vec![0; size_of::<Info>()]);
    let boot_loader_name = blob.push(b"lguest\0");
    let mut modules = Vec::new();
    for (range, name) in told.modules {
        let name = blob.push(&[name.as_bytes(), b"\0"].concat());
        let fields = [range.start, range.end, name, 0];
        modules.extend(fields.iter().flat_map(|field| (*field as u32).to_le_bytes()));
    }
    blob.align();
    let mods_addr = blob.push(&modules);
    let mut map = Vec::new();
    for entry in told.map {
        // The size field does not count itself.
        map.extend(20u32.to_le_bytes());
        map.extend(entry.start.to_le_bytes());
        map.extend(entry.len.to_le_bytes());
        map.extend((entry.kind as u32).to_le_bytes());
    }
    let mmap_addr = blob.push(&map);
    if blob.end() > MULTIBOOT_INFO.end {
        return Err(too_many());
    }
    let word = |value: u64| U32::new(value as u32);
    let kib = |bytes: u64| word(bytes >> 10);
    let info = Info {
        flags: (INFO_MEMORY | INFO_CMDLINE | INFO_MODS | INFO_MMAP | INFO_LOADER_NAME).into(),
        mem_lower: kib(LOW_USABLE_END.0),
        mem_upper: kib(told.low_end.saturating_sub(HIGH_MEMORY.0)),
        cmdline: word(told.cmdline),
        mods_count: word(told.modules.len() as u64),
        mods_addr: word(mods_addr),
        mmap_length: word(map.len() as u64),
        mmap_addr: word(mmap_addr),
        boot_loader_name: word(boot_loader_name),
        ..Info::default()
    };
    let mut bytes = blob.0;
    bytes.get_mut(..size_of::<Info>()).unwrap_or_default().copy_from_slice(info.as_bytes());
    Ok(bytes)
}

/// Bytes that will be at [`MULTIBOOT_INFO`].
struct Blob(Vec<u8>);

impl Blob {
    fn end(&self) -> u64 {
        MULTIBOOT_INFO.start.saturating_add(self.0.len() as u64)
    }

    /// Appends `bytes`; returns where they will be.
    fn push(&mut self, bytes: &[u8]) -> u64 {
        let at = self.end();
        self.0.extend_from_slice(bytes);
        at
    }

    fn align(&mut self) {
        let len = self.0.len().checked_next_multiple_of(8).unwrap_or(self.0.len());
        self.0.resize(len, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory_map::RangeType;
    use super::*;

    #[test]
    fn only_a_header_with_the_right_checksum_counts() {
        let header = |flags: u32, checksum: u32| {
            [HEADER_MAGIC, flags, checksum]
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        let good = header(3, 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(3));
        let bad = header(3, 0);
        let at = |offset: usize, header: &[u8]| [&vec![0; offset][..], header].concat();
        assert_eq!(find_header(&at(0, &good)), Some(3));
        assert_eq!(find_header(&at(8192 - 12, &good)), Some(3));
        assert_eq!(find_header(&at(8192 - 8, &good)), None);
        assert_eq!(find_header(&at(2, &good)), None);
        assert_eq!(find_header(&at(4, &[bad, good].concat())), Some(3));
    }

    #[test]
    fn the_information_points_into_itself() {
        let map = [MapEntry { start: 0, len: 0x9_fc00, kind: RangeType::Usable }];
        let modules = [(0x10_0000..0x10_0010, "environment")];
        let told = Told { cmdline: 0x2_0000, modules: &modules, map: &map, low_end: 0x200_0000 };
        let bytes = info(&told).unwrap();
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let offset = |field: usize| (u32_at(field) as u64 - MULTIBOOT_INFO.start) as usize;
        assert_eq!((u32_at(4), u32_at(8), u32_at(16)), (639, 31 << 10, 0x2_0000));
        let module = offset(24);
        assert_eq!((u32_at(20), u32_at(module), u32_at(module + 4)), (1, 0x10_0000, 0x10_0010));
        assert!(bytes[offset(module + 8)..].starts_with(b"environment\0"));
        assert_eq!((u32_at(44), u32_at(offset(48)), u32_at(offset(48) + 20)), (24, 20, 1));
        assert!(bytes[offset(64)..].starts_with(b"lguest\0"));
        let many = vec![(0..1, "0123456789"); 5000];
        assert!(matches!(
            info(&Told { modules: &many, ..told }),
            Err(LoadError::TooManyInitrds(5000))
        ));
    }
}
