//! What a 32-bit guest finds in its memory at the first instruction.
//!
//! `struct boot_params` at physical 0, the command line one page above, an initrd at the
//! top, and, in the bands where somebody else made them, the first page tables just below
//! it. The structure is Linux' own (Documentation/arch/x86/boot.rst, zero-page.rst); here
//! are the fields that lguest's Launcher writes, all others being zero.

use crate::band::Paging;

/// Where `boot_params` is: physical.
pub const BOOT_PARAMS_AT: u32 = 0;
/// Its size. Page 0 must be writable: the decompressor uses [`offset::SCRATCH`] as a stack.
pub const BOOT_PARAMS_BYTES: usize = 4096;
/// Where the command line is: physical.
pub const COMMAND_LINE_AT: u32 = 0x1000;
/// Where a bzImage's payload goes: physical.
pub const BZIMAGE_AT: u32 = 0x10_0000;
/// Segments and frames are counted in these.
pub const PAGE: u32 = 4096;

/// Offsets into `boot_params`.
#[allow(missing_docs)]
pub mod offset {
    pub const APM_BIOS_VERSION: usize = 0x40;
    pub const TBOOT_ADDRESS: usize = 0x58;
    pub const SCRATCH: usize = 0x1e4;
    /// u8.
    pub const E820_ENTRIES: usize = 0x1e8;
    /// u16.
    pub const VERSION: usize = 0x206;
    /// u8.
    pub const TYPE_OF_LOADER: usize = 0x210;
    /// u8.
    pub const LOADFLAGS: usize = 0x211;
    /// u32: entry of a bzImage.
    pub const CODE32_START: usize = 0x214;
    /// u32, with an initrd only.
    pub const RAMDISK_IMAGE: usize = 0x218;
    /// u32, in whole pages.
    pub const RAMDISK_SIZE: usize = 0x21c;
    /// u32.
    pub const CMD_LINE_PTR: usize = 0x228;
    /// u32.
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    /// u32.
    pub const HARDWARE_SUBARCH: usize = 0x23c;
    /// Entries of address u64, size u64, type u32.
    pub const E820_MAP: usize = 0x2d0;
}

/// Size of an entry of the memory map.
pub const E820_ENTRY_BYTES: usize = 20;
/// Type of memory that is RAM.
pub const E820_RAM: u32 = 1;
/// The boot protocol: below 2.07 a kernel does not look at the subarchitecture.
pub const VERSION: u16 = 0x0207;
/// In loadflags: leave the segment registers alone.
pub const KEEP_SEGMENTS: u8 = 0x40;
/// The subarchitecture's number.
pub const SUBARCH_LGUEST: u32 = 1;
/// A loader that has no number, given with an initrd.
pub const LOADER_UNDEFINED: u8 = 0xff;
/// What a relocatable kernel aligns itself to. Not written by the Launchers of 2.6.35 and
/// before, with which a relocatable bzImage of 2.6.31 on crashes; write it always.
pub const KERNEL_ALIGNMENT: u32 = 0x0100_0000;
/// A bzImage's header begins with this, at [`BZIMAGE_MAGIC_AT`].
pub const BZIMAGE_MAGIC: [u8; 4] = *b"HdrS";
/// Where in the file.
pub const BZIMAGE_MAGIC_AT: usize = 0x202;
/// 2.6.23 is entered behind these bytes, which no later kernel has in its text.
pub const V0_MAGIC: &[u8] = b"GenuineLguest";

/// Flags of the entries in host-made tables: present, writable, user.
pub const TABLE_FLAGS: u32 = 7;
/// Flags of a PDPT entry there: present, and nothing else is allowed.
pub const PDPT_FLAGS: u32 = 1;

/// Where the page tables lie that a host makes for V1 to V4: page by page, downwards from
/// the initrd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TablePlacement {
    /// Physical address of the top level.
    pub pgdir: u32,
    /// With PAE, of the one middle-level table, which covers 1 GiB.
    pub pmd: Option<u32>,
    /// Of the first of the lowest-level tables, which lie in order.
    pub tables: u32,
    /// How many those are.
    pub count: u32,
}

impl TablePlacement {
    /// For a guest with `mem` bytes of RAM and an initrd of `initrd` bytes at its top.
    /// `None` if they do not fit, or with PAE there is more than 1 GiB.
    pub const fn of(paging: Paging, mem: u32, initrd: u32) -> Option<TablePlacement> {
        let pages = mem / PAGE;
        let per_table = match paging {
            Paging::TwoLevel => 1024,
            Paging::Pae => 512,
        };
        let count = pages.div_ceil(per_table);
        let top = match pages.checked_sub(initrd.div_ceil(PAGE)) {
            Some(top) => top,
            None => return None,
        };
        // The top level, the lowest levels below it, and with PAE one between the kinds.
        let middle = match paging {
            Paging::TwoLevel => 0,
            Paging::Pae if count <= 512 => 1,
            Paging::Pae => return None,
        };
        let needed = count.saturating_add(1).saturating_add(middle);
        let lowest = match top.checked_sub(needed) {
            Some(lowest) => lowest,
            None => return None,
        };
        Some(TablePlacement {
            pgdir: top.wrapping_sub(1).wrapping_mul(PAGE),
            pmd: if middle == 1 { Some(lowest.wrapping_mul(PAGE)) } else { None },
            tables: lowest.wrapping_add(middle).wrapping_mul(PAGE),
            count,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u32 = 1 << 20;

    #[test]
    fn tables_lie_where_the_reference_has_them() {
        let p = TablePlacement::of(Paging::TwoLevel, 64 * MIB, 5000).unwrap();
        assert_eq!(p.pgdir, 64 * MIB - 2 * PAGE - PAGE);
        assert_eq!((p.count, p.pmd), (16, None));
        assert_eq!(p.tables, p.pgdir - 16 * PAGE);

        let p = TablePlacement::of(Paging::Pae, 64 * MIB, 0).unwrap();
        assert_eq!(p.pgdir, 64 * MIB - PAGE);
        assert_eq!(p.count, 32);
        assert_eq!(p.tables, p.pgdir - 32 * PAGE);
        assert_eq!(p.pmd, Some(p.tables - PAGE));
    }

    #[test]
    fn what_does_not_fit_has_no_place() {
        assert_eq!(TablePlacement::of(Paging::TwoLevel, 64 * MIB, 65 * MIB), None);
        assert_eq!(TablePlacement::of(Paging::TwoLevel, PAGE, 0), None);
        assert_eq!(TablePlacement::of(Paging::Pae, 1025 * MIB, 0), None);
        assert!(TablePlacement::of(Paging::Pae, 1024 * MIB, 0).is_some());
    }

    proptest! {
        #[test]
        fn tables_lie_in_memory_below_the_initrd(mem: u32, initrd: u32, pae: bool) {
            let paging = if pae { Paging::Pae } else { Paging::TwoLevel };
            if let Some(p) = TablePlacement::of(paging, mem, initrd) {
                let end = u64::from(p.pgdir) + u64::from(PAGE);
                prop_assert!(end + u64::from(initrd) <= u64::from(mem));
                prop_assert_eq!(p.tables + p.count * PAGE, p.pgdir);
                prop_assert!(p.pmd.is_none_or(|pmd| pmd + PAGE == p.tables));
            }
        }
    }
}
