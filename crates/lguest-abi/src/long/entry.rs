//! What a 64-bit guest finds at its first instruction: registers, memory, page tables, and
//! a structure that says where all of it is.
//!
//! The kernel runs in ring 1 with the CPU's interrupt flag set and IOPL 0, as the old ones
//! did: paging takes rings 0 to 2 for the supervisor, so user pages are kept apart by the
//! page tables alone, while every instruction that only ring 0 may execute traps. Ring 0
//! is the host's.

use super::layout::shared;

/// Kernel code: 64-bit, ring 1. The GDT is the host's, and has these segments for good.
pub const KERNEL_CS: u16 = 0x09;
/// Kernel stack and data: ring 1.
pub const KERNEL_DS: u16 = 0x11;
/// User stack and data: ring 3.
pub const USER_DS: u16 = 0x23;
/// User code: 64-bit, ring 3.
pub const USER_CS: u16 = 0x2b;
/// All selectors, with their names.
pub const SELECTORS: &[(&str, u16)] = &[
    ("KERNEL_CS", KERNEL_CS),
    ("KERNEL_DS", KERNEL_DS),
    ("USER_DS", USER_DS),
    ("USER_CS", USER_CS),
];

/// RFLAGS at entry, and the bits that never change: IF, and bit 1.
pub const RFLAGS: u64 = 0x202;
/// CR0: PE, MP, ET, NE, WP, PG.
pub const CR0: u64 = 0x8001_0033;
/// CR4: PAE, OSFXSR, OSXMMEXCPT, FSGSBASE. The host adds OSXSAVE if CPUID offers XSAVE;
/// XCR0 then has every state that CPUID offers.
pub const CR4: u64 = 0x1_0620;
/// EFER: SCE, LME, LMA, NXE.
pub const EFER: u64 = 0xd01;
/// Control registers and flags, with their names. They stay like this.
pub const REGISTERS: &[(&str, u64)] =
    &[("RFLAGS", RFLAGS), ("CR0", CR0), ("CR4", CR4), ("EFER", EFER)];

/// Physical address 0 is here too, and with it all of RAM, not executable. RAM is also
/// mapped one to one, executable; and the image's segments where they are linked.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
/// Segments are linked at or above this.
pub const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Addresses of the first maps, with their names.
pub const MAPS: &[(&str, u64)] =
    &[("IDENTITY_MAP", 0), ("DIRECT_MAP", DIRECT_MAP), ("KERNEL_MAP", KERNEL_MAP)];

/// Flags in every table above the last level: present, writable, accessed.
pub const TABLE_FLAGS: u64 = 0x23;
/// Flags of what is mapped, beside a segment's own: present, accessed, dirty. No user page.
pub const PAGE_FLAGS: u64 = 0x61;
/// Writable.
pub const WRITABLE: u64 = 2;
/// A page of 2 MiB in a directory.
pub const LARGE: u64 = 0x80;
/// Not executable.
pub const NO_EXECUTE: u64 = 1 << 63;

/// CPUID leaf that says it is lguest.
pub const CPUID_LEAF: u32 = 0x4000_0000;
/// EBX, ECX and EDX there. EAX is the last leaf, `CPUID_LEAF` + 1, whose EAX is the newest
/// version that the host speaks.
pub const CPUID_SIGNATURE: [u8; 12] = *b"lguestlguest";

/// What the start info begins with.
pub const START_MAGIC: [u8; 8] = *b"lgstart\x01";

shared! {
    /// What the host tells. RDI has its address in the direct map. It lies in memory that
    /// the guest may reuse when it has read it.
    StartInfo {
        /// [`START_MAGIC`].
        magic: [u8; 8],
        /// Bytes of this structure. Newer ones are longer.
        size: u32,
        /// 0.
        flags: u32,
        /// The oldest version the host speaks.
        version_min: u32,
        /// The newest.
        version_max: u32,
        /// [Features](super::feature) on offer.
        features: u64,
        /// Bytes of RAM, from physical 0, without holes.
        memory: u64,
        /// Physical address of the first byte of the loaded image.
        kernel: u64,
        /// Bytes of it, with what it wanted zeroed.
        kernel_len: u64,
        /// Physical address of the command line, which ends with a 0.
        cmdline: u64,
        /// Bytes before the 0.
        cmdline_len: u64,
        /// Physical address of the initrd.
        initrd: u64,
        /// Bytes of it; 0 if there is none.
        initrd_len: u64,
        /// Physical address of the top level of the page tables.
        tables: u64,
        /// Physical address of the memory that all of these page tables are in.
        tables_start: u64,
        /// Bytes of it.
        tables_len: u64,
        /// Virtual address of the direct map: [`DIRECT_MAP`].
        direct_map: u64,
        /// Physical address of the bus; outside of RAM.
        bus: u64,
        /// Bytes of it, in whole pages; 0 without [`BUS`](super::feature::BUS).
        bus_len: u64,
        /// Frequency of the TSC in kHz; 0 if it is not to be used.
        tsc_khz: u64,
        /// Random bytes, other ones at each start.
        seed: [u8; 32],
    }
}

/// Most bytes of a command line, with its 0.
pub const CMDLINE_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::long::Virt;
    use crate::long::layout::{assert_packed, assert_wire};

    #[test]
    fn the_start_info_has_no_holes() {
        assert_packed(StartInfo::FIELDS, size_of::<StartInfo>());
        assert_eq!(size_of::<StartInfo>(), 176);
        assert_wire::<StartInfo>();
    }

    #[test]
    fn selectors_are_of_their_rings() {
        for (name, selector) in SELECTORS {
            assert_eq!(selector & 7, if name.starts_with("KERNEL") { 1 } else { 3 });
        }
    }

    #[test]
    fn control_registers_have_the_bits_they_say() {
        assert_eq!(CR0, 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31);
        assert_eq!(CR4, 1 << 5 | 1 << 9 | 1 << 10 | 1 << 16);
        assert_eq!(EFER, 1 | 1 << 8 | 1 << 10 | 1 << 11);
    }

    #[test]
    fn maps_are_canonical_and_in_order() {
        for pair in MAPS.windows(2) {
            assert!(pair[0].1 < pair[1].1);
            assert!(Virt(pair[1].1).is_canonical());
        }
    }
}
