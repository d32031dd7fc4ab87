//! The bands: stretches of Linux kernels that speak the same lguest ABI.
//!
//! A host learns the band in two steps. Before the first instruction, from the kernel's
//! version ([`Band::of_linux`]), because somebody has to have made page tables by then.
//! At LGUEST_INIT, from the shared data and the instruction that trapped
//! ([`Band::observed`]), which cannot be wrong.

use core::fmt;

use crate::shared_data::Layout;

/// A stretch of kernels with one ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Band {
    /// 2.6.23. Entered after a magic string, I/O by DMA arrays. Recognised, to be refused.
    V0,
    /// 2.6.24 to 2.6.28: boot protocol 2.07, virtio; the Launcher makes page tables.
    V1a,
    /// 2.6.29: the host makes page tables, with the kernel's copy in them.
    V1b,
    /// 2.6.30: `vmcall`, arguments in EBX, ECX, EDX.
    V2,
    /// 2.6.31 to 2.6.33: PAE, a fourth argument, `irq_pending`.
    V3,
    /// 2.6.34 to 3.0: back to `int $0x1f`.
    V4,
    /// 3.1 to 3.19: no tables but the guest's own; identity until the first one.
    V5,
    /// 4.0 to 4.13: PCI instead of the lguest bus.
    V6,
}

/// How many levels the guest's page tables have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Paging {
    /// 1024 directory entries, 1024 table entries, of four bytes.
    TwoLevel,
    /// 4, 512 and 512 entries of eight bytes.
    Pae,
}

/// The instruction that makes a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trap {
    /// `int $0x1f`.
    Int1f,
    /// `vmcall`. The old host rewrote it to `int $0x1f; nop` where it met it.
    Vmcall,
}

impl Trap {
    /// The instruction's bytes.
    pub const fn bytes(self) -> &'static [u8] {
        match self {
            Trap::Int1f => &[0xcd, crate::traps::HYPERCALL_VECTOR],
            Trap::Vmcall => &[0x0f, 0x01, 0xc1],
        }
    }
}

/// `vmcall` in guest text becomes this: `int $0x1f; nop`.
pub const VMCALL_REWRITTEN: [u8; 3] = [0xcd, crate::traps::HYPERCALL_VECTOR, 0x90];

/// Which registers carry the arguments. The number is always in EAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RegisterOrder {
    /// EDX, EBX, ECX.
    DxBxCx,
    /// EBX, ECX, EDX.
    BxCxDx,
    /// EBX, ECX, EDX, ESI.
    BxCxDxSi,
}

/// Who has made the page tables that the first instruction runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InitialTables {
    /// The Launcher: RAM one to one. The guest copies the first 128 MiB up to
    /// PAGE_OFFSET itself.
    Identity,
    /// The host: RAM one to one, and again at PAGE_OFFSET.
    IdentityAndKernel,
    /// Nobody: virtual is physical until the first NEW_PGTABLE.
    None,
}

/// How the guest loads its GDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GdtLoad {
    /// LOAD_GDT, the whole table.
    Table,
    /// LOAD_GDT_ENTRY, one by one.
    Entries,
}

/// How the guest tells its devices of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Notify {
    /// SEND_DMA with the key a buffer was bound to.
    Dma,
    /// NOTIFY with the address of a ring, a descriptor, or a string to print.
    Hypercall,
    /// A store to the device's BAR.
    Mmio,
}

/// How interrupts are kept away while the guest returns from one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoIrqRule {
    /// Not while EIP is in the range.
    Range,
    /// If EIP is at the `iret`, take over the frame that lies there.
    AtIret,
}

/// Which of the guest's ways to let interrupts in look whether one is waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqPendingTest {
    /// The guest never looks: no pending word exists.
    Absent,
    /// Restoring flags looks, enabling does not: it tests with a mask of zero.
    RestoreOnly,
    /// Restoring looks; enabling does in some kernels of the band, not in others.
    RestoreAndMaybeEnable,
}

impl Band {
    /// All of them, oldest first.
    pub const ALL: [Band; 8] =
        [Band::V0, Band::V1a, Band::V1b, Band::V2, Band::V3, Band::V4, Band::V5, Band::V6];

    /// The band of a released kernel: 2.6.29 is `(2, 6, 29)`, 3.12.9 `(3, 12, 9)`. `None` if
    /// that version never had lguest.
    pub const fn of_linux(major: u32, minor: u32, patch: u32) -> Option<Band> {
        Some(match (major, minor, patch) {
            (2, 6, 23) => Band::V0,
            (2, 6, 24..=28) => Band::V1a,
            (2, 6, 29) => Band::V1b,
            (2, 6, 30) => Band::V2,
            (2, 6, 31..=33) => Band::V3,
            (2, 6, 34..=39) | (3, 0, _) => Band::V4,
            (3, 1..=19, _) => Band::V5,
            (4, 0..=13, _) => Band::V6,
            _ => return None,
        })
    }

    /// The band of a guest that has just called LGUEST_INIT, from the layout its data shows
    /// and the instruction it called with. V1a and V1b look the same; the answer is V1b,
    /// whose page tables serve both. `None` for a pair that no kernel has.
    pub const fn observed(layout: Layout, trap: Trap) -> Option<Band> {
        Some(match (layout, trap) {
            (Layout::V0, Trap::Int1f) => Band::V0,
            (Layout::V1, Trap::Int1f) => Band::V1b,
            (Layout::V1, Trap::Vmcall) => Band::V2,
            (Layout::V3, Trap::Vmcall) => Band::V3,
            (Layout::V3, Trap::Int1f) => Band::V4,
            (Layout::V5, Trap::Int1f) => Band::V5,
            (Layout::V6, Trap::Int1f) => Band::V6,
            _ => return None,
        })
    }

    /// The kernels of this band, for people.
    pub const fn kernels(self) -> &'static str {
        match self {
            Band::V0 => "2.6.23",
            Band::V1a => "2.6.24 to 2.6.28",
            Band::V1b => "2.6.29",
            Band::V2 => "2.6.30",
            Band::V3 => "2.6.31 to 2.6.33",
            Band::V4 => "2.6.34 to 3.0",
            Band::V5 => "3.1 to 3.19",
            Band::V6 => "4.0 to 4.13",
        }
    }

    /// The instruction in the guest's text that makes a hypercall. `int $0x1f` is good in
    /// every band: it is what `vmcall` was rewritten to.
    pub const fn trap(self) -> Trap {
        match self {
            Band::V2 | Band::V3 => Trap::Vmcall,
            _ => Trap::Int1f,
        }
    }

    /// Where a hypercall's arguments are.
    pub const fn register_order(self) -> RegisterOrder {
        match self {
            Band::V0 | Band::V1a | Band::V1b => RegisterOrder::DxBxCx,
            Band::V2 => RegisterOrder::BxCxDx,
            Band::V3 | Band::V4 | Band::V5 | Band::V6 => RegisterOrder::BxCxDxSi,
        }
    }

    /// The layout of the shared data.
    pub const fn layout(self) -> Layout {
        match self {
            Band::V0 => Layout::V0,
            Band::V1a | Band::V1b | Band::V2 => Layout::V1,
            Band::V3 | Band::V4 => Layout::V3,
            Band::V5 => Layout::V5,
            Band::V6 => Layout::V6,
        }
    }

    /// Who made the first page tables.
    pub const fn initial_tables(self) -> InitialTables {
        match self {
            Band::V0 | Band::V1a => InitialTables::Identity,
            Band::V1b | Band::V2 | Band::V3 | Band::V4 => InitialTables::IdentityAndKernel,
            Band::V5 | Band::V6 => InitialTables::None,
        }
    }

    /// How the GDT is loaded.
    pub const fn gdt_load(self) -> GdtLoad {
        match self {
            Band::V0 | Band::V1a | Band::V1b => GdtLoad::Table,
            _ => GdtLoad::Entries,
        }
    }

    /// How devices are notified.
    pub const fn notify(self) -> Notify {
        match self {
            Band::V0 => Notify::Dma,
            Band::V6 => Notify::Mmio,
            _ => Notify::Hypercall,
        }
    }

    /// Whether a guest of this band may have PAE page tables.
    pub const fn may_have_pae(self) -> bool {
        matches!(self, Band::V3 | Band::V4 | Band::V5 | Band::V6)
    }

    /// How the way back from an interrupt is guarded.
    pub const fn no_irq_rule(self) -> NoIrqRule {
        match self {
            Band::V6 => NoIrqRule::AtIret,
            _ => NoIrqRule::Range,
        }
    }

    /// Whether and where the guest looks at `irq_pending`. In no band may a host rely on
    /// it: interrupts must also be delivered at ordinary exits.
    pub const fn irq_pending_test(self) -> IrqPendingTest {
        match self {
            Band::V0 | Band::V1a | Band::V1b | Band::V2 => IrqPendingTest::Absent,
            Band::V3 | Band::V4 | Band::V5 => IrqPendingTest::RestoreOnly,
            Band::V6 => IrqPendingTest::RestoreAndMaybeEnable,
        }
    }
}

impl fmt::Display for Band {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?} (Linux {})", self.kernels())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_has_the_band_of_the_reference() {
        let of = Band::of_linux;
        assert_eq!(of(2, 6, 22), None);
        assert_eq!(of(2, 6, 23), Some(Band::V0));
        assert_eq!(of(2, 6, 24), Some(Band::V1a));
        assert_eq!(of(2, 6, 28), Some(Band::V1a));
        assert_eq!(of(2, 6, 29), Some(Band::V1b));
        assert_eq!(of(2, 6, 30), Some(Band::V2));
        assert_eq!(of(2, 6, 31), Some(Band::V3));
        assert_eq!(of(2, 6, 33), Some(Band::V3));
        assert_eq!(of(2, 6, 34), Some(Band::V4));
        assert_eq!(of(3, 0, 101), Some(Band::V4));
        assert_eq!(of(3, 1, 0), Some(Band::V5));
        assert_eq!(of(3, 19, 8), Some(Band::V5));
        assert_eq!(of(4, 0, 0), Some(Band::V6));
        assert_eq!(of(4, 13, 16), Some(Band::V6));
        assert_eq!(of(4, 14, 0), None);
        assert_eq!(of(6, 1, 0), None);
    }

    #[test]
    fn what_a_band_shows_at_init_leads_back_to_it() {
        for band in Band::ALL {
            let seen = Band::observed(band.layout(), band.trap());
            let expected = if band == Band::V1a { Band::V1b } else { band };
            assert_eq!(seen, Some(expected));
        }
        assert_eq!(Band::observed(Layout::V6, Trap::Vmcall), None);
    }

    #[test]
    fn the_rewritten_instruction_has_the_length_of_the_old_one() {
        assert_eq!(VMCALL_REWRITTEN.len(), Trap::Vmcall.bytes().len());
        assert!(VMCALL_REWRITTEN.starts_with(Trap::Int1f.bytes()));
        assert_eq!(Trap::Vmcall.bytes(), [0x0f, 0x01, 0xc1]);
    }
}
