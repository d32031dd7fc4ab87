//! Linux's boot protocol for x86: the setup header inside a bzImage, and the "zero page"
//! (`struct boot_params`) that a kernel entered in 64-bit mode is told everything by.
//!
//! Sources: Documentation/arch/x86/boot.rst and zero-page.rst. Offsets are asserted.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::memory_map::MapEntry;

/// The setup header's place in a bzImage's first sector, and in the zero page.
pub(super) const SETUP_HEADER: usize = 0x1f1;
/// `boot_flag`: the boot sector's magic number.
pub(super) const BOOT_FLAG: u16 = 0xaa55;
/// `header`: "HdrS".
pub(super) const HDRS: u32 = 0x5372_6448;
/// `type_of_loader` of a loader that has no number of its own.
pub(super) const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the protected-mode code is at 1 MiB.
pub(super) const LOADED_HIGH: u8 = 1 << 0;
/// `loadflags`: tells the kernel that its decompressor has moved it at random.
pub(super) const KASLR_FLAG: u8 = 1 << 1;
/// `xloadflags`: the kernel has the 64-bit entry point, so it is a 64-bit one.
pub(super) const XLF_KERNEL_64: u16 = 1 << 0;
/// `vid_mode`: whatever mode there is.
const VID_MODE_NORMAL: u16 = 0xffff;
/// The kernel's `COMMAND_LINE_SIZE` less the terminating zero, where no header says.
pub(super) const DEFAULT_CMDLINE_SIZE: u32 = 2047;
/// How far up initrds may be, where no header says.
const DEFAULT_INITRD_ADDR_MAX: u32 = 0x7fff_ffff;
/// How many e820 entries the zero page has room for.
pub(super) const E820_MAX: usize = 128;

/// `struct setup_header`.
#[derive(Clone, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names and meanings are boot.rst's")]
pub(super) struct SetupHeader {
    pub(super) setup_sects: u8,
    pub(super) root_flags: U16,
    pub(super) syssize: U32,
    pub(super) ram_size: U16,
    pub(super) vid_mode: U16,
    pub(super) root_dev: U16,
    pub(super) boot_flag: U16,
    pub(super) jump: [u8; 2],
    pub(super) header: U32,
    pub(super) version: U16,
    pub(super) realmode_swtch: U32,
    pub(super) start_sys_seg: U16,
    pub(super) kernel_version: U16,
    pub(super) type_of_loader: u8,
    pub(super) loadflags: u8,
    pub(super) setup_move_size: U16,
    pub(super) code32_start: U32,
    pub(super) ramdisk_image: U32,
    pub(super) ramdisk_size: U32,
    pub(super) bootsect_kludge: U32,
    pub(super) heap_end_ptr: U16,
    pub(super) ext_loader_ver: u8,
    pub(super) ext_loader_type: u8,
    pub(super) cmd_line_ptr: U32,
    pub(super) initrd_addr_max: U32,
    pub(super) kernel_alignment: U32,
    pub(super) relocatable_kernel: u8,
    pub(super) min_alignment: u8,
    pub(super) xloadflags: U16,
    pub(super) cmdline_size: U32,
    pub(super) hardware_subarch: U32,
    pub(super) hardware_subarch_data: U64,
    pub(super) payload_offset: U32,
    pub(super) payload_length: U32,
    pub(super) setup_data: U64,
    pub(super) pref_address: U64,
    pub(super) init_size: U32,
    pub(super) handover_offset: U32,
    pub(super) kernel_info_offset: U32,
}

/// `struct boot_e820_entry`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct E820Entry {
    addr: U64,
    size: U64,
    kind: U32,
}

/// `struct boot_params`, with the fields that matter here.
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct BootParams {
    _screen_info: [u8; 0x70],
    acpi_rsdp_addr: U64,
    _tables: [u8; 0x48],
    ext_ramdisk_image: U32,
    ext_ramdisk_size: U32,
    ext_cmd_line_ptr: U32,
    _efi: [u8; 0x11c],
    e820_entries: u8,
    _buffers: [u8; 8],
    /// The setup header, as in the bzImage and then changed.
    pub(super) hdr: SetupHeader,
    _pad: [u8; 0x290 - 0x26c],
    _edd_mbr: [u8; 0x40],
    e820_table: [E820Entry; E820_MAX],
    _rest: [u8; 0x330],
}

const _: () = {
    assert!(offset_of!(SetupHeader, header) == 0x202 - SETUP_HEADER);
    assert!(offset_of!(SetupHeader, ramdisk_image) == 0x218 - SETUP_HEADER);
    assert!(offset_of!(SetupHeader, xloadflags) == 0x236 - SETUP_HEADER);
    assert!(offset_of!(SetupHeader, payload_offset) == 0x248 - SETUP_HEADER);
    assert!(offset_of!(SetupHeader, kernel_info_offset) == 0x268 - SETUP_HEADER);
    assert!(offset_of!(BootParams, acpi_rsdp_addr) == 0x70);
    assert!(offset_of!(BootParams, ext_ramdisk_image) == 0xc0);
    assert!(offset_of!(BootParams, e820_entries) == 0x1e8);
    assert!(offset_of!(BootParams, hdr) == SETUP_HEADER);
    assert!(offset_of!(BootParams, e820_table) == 0x2d0);
    assert!(size_of::<BootParams>() == 4096);
};

impl SetupHeader {
    /// The header for a vmlinux that comes without one.
    pub(super) fn for_vmlinux() -> Self {
        let mut hdr: Self = zerocopy::FromZeros::new_zeroed();
        hdr.boot_flag = BOOT_FLAG.into();
        hdr.header = HDRS.into();
        hdr.version = 0x020f.into();
        hdr.xloadflags = XLF_KERNEL_64.into();
        hdr.initrd_addr_max = DEFAULT_INITRD_ADDR_MAX.into();
        hdr.cmdline_size = DEFAULT_CMDLINE_SIZE.into();
        hdr
    }
}

/// What a loader tells the kernel.
#[derive(Debug)]
pub(super) struct Told<'t> {
    /// Where the command line is, zero-terminated.
    pub(super) cmd_line: u64,
    /// Where the initrds are.
    pub(super) initrd: Option<std::ops::Range<u64>>,
    /// Where the ACPI root pointer is.
    pub(super) rsdp: u64,
    /// The memory map.
    pub(super) map: &'t [MapEntry],
}

impl BootParams {
    /// The zero page for a kernel with this setup header.
    pub(super) fn new(hdr: SetupHeader, told: &Told<'_>) -> Box<Self> {
        // Allocation of 4 KiB: cannot fail short of the process being lost anyway.
        let mut params: Box<Self> = Box::new(zerocopy::FromZeros::new_zeroed());
        params.hdr = hdr;
        let hdr = &mut params.hdr;
        hdr.type_of_loader = LOADER_UNDEFINED;
        hdr.loadflags = hdr.loadflags & !KASLR_FLAG | LOADED_HIGH;
        hdr.vid_mode = VID_MODE_NORMAL.into();
        // All of these lie below 4 GiB; the high halves exist for other loaders.
        let (low, high) = halves(told.cmd_line);
        hdr.cmd_line_ptr = low;
        params.ext_cmd_line_ptr = high;
        let initrd = told.initrd.clone().unwrap_or_default();
        (params.hdr.ramdisk_image, params.ext_ramdisk_image) = halves(initrd.start);
        let size = initrd.end.saturating_sub(initrd.start);
        (params.hdr.ramdisk_size, params.ext_ramdisk_size) = halves(size);
        params.acpi_rsdp_addr = told.rsdp.into();
        for (slot, entry) in params.e820_table.iter_mut().zip(told.map) {
            *slot = E820Entry {
                addr: entry.start.into(),
                size: entry.len.into(),
                kind: (entry.kind as u32).into(),
            };
        }
        params.e820_entries = told.map.len().min(E820_MAX) as u8;
        params
    }
}

fn halves(value: u64) -> (U32, U32) {
    ((value as u32).into(), ((value >> 32) as u32).into())
}

#[cfg(test)]
mod tests {
    use super::super::memory_map::RangeType;
    use super::*;

    #[test]
    fn the_zero_page_has_everything_where_the_kernel_looks() {
        let mut hdr = SetupHeader::for_vmlinux();
        hdr.loadflags = KASLR_FLAG | 0x80;
        let map = [MapEntry { start: 0x10_0000, len: 0x700_0000, kind: RangeType::Usable }];
        let told = Told {
            cmd_line: 0x2_0000,
            initrd: Some(0x700_0000..0x700_1234),
            rsdp: 0xe_0000,
            map: &map,
        };
        let params = BootParams::new(hdr, &told);
        let bytes = params.as_bytes();
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(&bytes[0x202..0x206], b"HdrS");
        assert_eq!((bytes[0x210], bytes[0x211]), (0xff, 0x81));
        assert_eq!((u32_at(0x218), u32_at(0x21c), u32_at(0xc0)), (0x700_0000, 0x1234, 0));
        assert_eq!((u32_at(0x228), u32_at(0x70)), (0x2_0000, 0xe_0000));
        assert_eq!(bytes[0x1e8], 1);
        assert_eq!((u32_at(0x2d0), u32_at(0x2d8), u32_at(0x2e0)), (0x10_0000, 0x700_0000, 1));
        // `sentinel`: a loader that copied more than the header leaves this non-zero.
        assert_eq!(bytes[0x1ef], 0);
    }
}
