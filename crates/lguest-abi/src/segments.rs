//! Descriptors and gates as a 32-bit guest hands them over, and what becomes of them.
//!
//! The guest's GDT and IDT are the host's copies. A guest can write anything into them, so
//! each entry goes through one function here first: nothing with privilege 0 gets in, and
//! nothing but segments and plain gates.

use core::fmt;

/// Entries of the GDT.
pub const GDT_ENTRIES: usize = 32;
/// Entries of the IDT.
pub const IDT_ENTRIES: usize = 256;
/// First of the three entries that LOAD_TLS replaces.
pub const TLS_FIRST: usize = 6;
/// How many.
pub const TLS_ENTRIES: usize = 3;
/// The kernel's code.
pub const KERNEL_CS: usize = 12;
/// The kernel's data and stack.
pub const KERNEL_DS: usize = 13;
/// A user's code.
pub const USER_CS: usize = 14;
/// A user's data.
pub const USER_DS: usize = 15;
/// Entries that are stored and never used: the switcher's code and data, and two TSSs.
pub const GDT_IGNORED: [usize; 4] = [10, 11, 16, 31];
/// Vectors whose gates are not taken: NMI, double fault, 15, and the hypercall's.
pub const IDT_IGNORED: [u32; 4] = [2, 8, 15, 31];
/// The ring a guest kernel runs in.
pub const GUEST_RING: u8 = 1;

/// A segment descriptor (Intel SDM 3A, 3.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Descriptor(pub u64);

const ACCESSED: u64 = 1 << 40;
const SEGMENT: u64 = 1 << 44;
const DPL_SHIFT: u32 = 45;
const PRESENT: u64 = 1 << 47;

/// What the host does with a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stored {
    /// It goes into the GDT in this form.
    Used(Descriptor),
    /// It belongs to an entry that is the host's; loading it must keep faulting.
    Ignored,
}

impl Descriptor {
    /// From the two words that LOAD_GDT_ENTRY passes.
    pub const fn from_words(low: u32, high: u32) -> Descriptor {
        Descriptor((high as u64) << 32 | low as u64)
    }

    /// The descriptor's privilege.
    pub const fn dpl(self) -> u8 {
        (self.0 >> DPL_SHIFT) as u8 & 3
    }

    /// Whether it is present.
    pub const fn present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// Whether it is code or data, not a gate, TSS or LDT.
    pub const fn is_segment(self) -> bool {
        self.0 & SEGMENT != 0
    }

    /// The form in which a guest's descriptor gets into the GDT: privilege 0 becomes 1, and
    /// it counts as accessed, because the CPU could not mark it in a table that the guest
    /// must not write. System descriptors are made absent. (The old host let them in: a
    /// call gate then was only as harmless as what it pointed at.)
    #[must_use]
    pub const fn fixed_up(self) -> Descriptor {
        if !self.is_segment() {
            return Descriptor(self.0 & !PRESENT);
        }
        let lowered = if self.dpl() == 0 { (GUEST_RING as u64) << DPL_SHIFT } else { 0 };
        Descriptor(self.0 | lowered | ACCESSED)
    }

    /// What becomes of a descriptor for entry `index`. `None`: there is no such entry, and
    /// the guest dies of it.
    pub fn accept(index: u32, descriptor: Descriptor) -> Option<Stored> {
        let index = usize::try_from(index).ok().filter(|&i| i < GDT_ENTRIES)?;
        Some(if GDT_IGNORED.contains(&index) {
            Stored::Ignored
        } else {
            Stored::Used(descriptor.fixed_up())
        })
    }
}

/// A gate of the IDT, accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gate {
    /// The handler.
    pub offset: u32,
    /// Which ring may reach it by `int`.
    pub dpl: u8,
    /// Interrupts are off in the handler (type 0xE), or as they were (0xF).
    pub kind: GateKind,
}

/// The two types of gate there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateKind {
    /// Type 0xE.
    Interrupt,
    /// Type 0xF.
    Trap,
}

/// What LOAD_IDT_ENTRY does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateChange {
    /// The vector has this gate now.
    Set(Gate),
    /// The vector has none now.
    Clear,
    /// The vector is not the guest's.
    Ignored,
}

/// Why a gate kills the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BadGate {
    /// 256 or above.
    Vector(u32),
    /// Present, and neither interrupt nor trap gate.
    Kind {
        /// For this vector.
        vector: u8,
        /// The four bits.
        kind: u8,
    },
}

impl fmt::Display for BadGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadGate::Vector(v) => write!(f, "gate for vector {v:#x}: there are 256"),
            BadGate::Kind { vector, kind } => {
                write!(f, "gate for vector {vector:#x} has type {kind:#x}, neither 0xe nor 0xf")
            }
        }
    }
}

impl core::error::Error for BadGate {}

impl Gate {
    /// Judges a gate. The selector in it is not looked at: handlers run with
    /// [`entry::CS`](crate::entry::CS).
    ///
    /// # Errors
    ///
    /// No such vector, or a present gate of another type.
    pub fn accept(vector: u32, low: u32, high: u32) -> Result<GateChange, BadGate> {
        let Ok(number) = u8::try_from(vector) else {
            return Err(BadGate::Vector(vector));
        };
        if IDT_IGNORED.contains(&vector) {
            return Ok(GateChange::Ignored);
        }
        if high & 0x8000 == 0 {
            return Ok(GateChange::Clear);
        }
        let kind = match high >> 8 & 0xf {
            0xe => GateKind::Interrupt,
            0xf => GateKind::Trap,
            other => return Err(BadGate::Kind { vector: number, kind: other as u8 }),
        };
        let offset = high & 0xffff_0000 | low & 0xffff;
        Ok(GateChange::Set(Gate { offset, dpl: (high >> 13 & 3) as u8, kind }))
    }

    /// The two words of the gate as a CPU would have it: the selector is the kernel's.
    pub const fn words(self) -> (u32, u32) {
        let kind = match self.kind {
            GateKind::Interrupt => 0xe00,
            GateKind::Trap => 0xf00,
        };
        let low = (crate::entry::CS as u32) << 16 | self.offset & 0xffff;
        (low, self.offset & 0xffff_0000 | 0x8000 | (self.dpl as u32 & 3) << 13 | kind)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn linux_own_descriptors_are_lowered() {
        // Kernel code and data of privilege 0, user code of privilege 3.
        let fixed = |high| Descriptor::from_words(0xffff, high).fixed_up();
        assert_eq!(fixed(0x00cf_9a00), crate::entry::CODE);
        assert_eq!(fixed(0x00cf_9200), crate::entry::DATA);
        assert_eq!(fixed(0x00cf_fa00), Descriptor::from_words(0xffff, 0x00cf_fb00));
    }

    #[test]
    fn some_entries_are_not_the_guests() {
        let d = Descriptor(u64::MAX);
        for index in [10, 11, 16, 31] {
            assert_eq!(Descriptor::accept(index, d), Some(Stored::Ignored));
        }
        assert_eq!(Descriptor::accept(32, d), None);
        assert_eq!(Descriptor::accept(u32::MAX, d), None);
        for vector in [2, 8, 15, 31] {
            assert_eq!(Gate::accept(vector, 0, 0x8500), Ok(GateChange::Ignored));
        }
    }

    #[test]
    fn a_task_gate_is_fatal_and_an_absent_one_is_none() {
        assert_eq!(Gate::accept(3, 0, 0x8500), Err(BadGate::Kind { vector: 3, kind: 5 }));
        assert_eq!(Gate::accept(256, 0, 0), Err(BadGate::Vector(256)));
        assert_eq!(Gate::accept(3, 7, 0x0500), Ok(GateChange::Clear));
    }

    proptest! {
        #[test]
        fn nothing_usable_keeps_privilege_0(index in 0u32..32, bits: u64) {
            if let Some(Stored::Used(d)) = Descriptor::accept(index, Descriptor(bits)) {
                if d.present() {
                    prop_assert!(d.is_segment() && d.dpl() >= 1);
                }
                prop_assert_eq!(d.fixed_up(), d);
                // Base, limit and the upper flags are the guest's.
                prop_assert_eq!((d.0 ^ bits) & !(0xff << 40), 0);
            }
        }

        #[test]
        fn gates_keep_what_the_reference_says(vector in 32u32..256, low: u32, high: u32) {
            let high = high & !0xf00 | 0x8e00;
            let Ok(GateChange::Set(gate)) = Gate::accept(vector, low, high) else {
                return Err(TestCaseError::fail("refused"));
            };
            let (l, h) = gate.words();
            prop_assert_eq!(h & 0xffff_ef00, high & 0xffff_ef00);
            prop_assert_eq!(l, 0x61 << 16 | low & 0xffff);
            prop_assert_eq!(Gate::accept(vector, l, h), Ok(GateChange::Set(gate)));
        }

        #[test]
        fn any_gate_is_judged(vector: u32, low: u32, high: u32) {
            let result = Gate::accept(vector, low, high);
            prop_assert_eq!(matches!(result, Err(BadGate::Vector(_))), vector > 255);
        }
    }
}
