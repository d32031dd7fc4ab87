//! Exceptions: vectors, error codes and which of them make a double fault.
//!
//! Source: Intel SDM vol. 3, chapter 6 (interrupt and exception handling).

use crate::addr::GuestVirtAddr;

/// An architectural exception on its way to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its vector, 0 to 31.
    pub vector: Vector,
    /// The error code pushed after the return address, for the vectors that have one.
    pub error_code: Option<u32>,
    /// For `#PF`: what CR2 will hold. For `#DB`: the DR6 bits to set.
    pub payload: u64,
}

/// Exception vectors (SDM vol. 3, table 6-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs, reason = "the manual's own mnemonics")]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackSegment = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87 = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    Simd = 19,
}

bitflags::bitflags! {
    /// The error code of a page fault (SDM vol. 3, 4.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PageFaultCode: u32 {
        /// The page was present: a protection violation.
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was made at CPL 3 (or is a user access by nature).
        const USER = 1 << 2;
        /// A reserved bit was set in a paging-structure entry.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch (only with NX or SMEP).
        const FETCH = 1 << 4;
    }
}

/// How exceptions combine while another is being delivered (SDM vol. 3, table 6-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Handled one after the other.
    Benign,
    /// Two of these make a double fault.
    Contributory,
    /// A page fault: makes a double fault of a contributory or another page fault.
    PageFault,
    /// A double fault: any further contributory or page fault is a shutdown.
    DoubleFault,
}

/// Marks a `#GP` that a non-canonical address raised.
const NOT_CANONICAL: u64 = 1;

impl Exception {
    const fn plain(vector: Vector) -> Self {
        Self { vector, error_code: None, payload: 0 }
    }

    const fn with_code(vector: Vector, code: u32) -> Self {
        Self { vector, error_code: Some(code), payload: 0 }
    }

    /// `#DE`: divide error.
    #[must_use]
    pub const fn divide_error() -> Self {
        Self::plain(Vector::DivideError)
    }

    /// `#DB` with the bits it sets in DR6.
    #[must_use]
    pub const fn debug(dr6: u64) -> Self {
        Self { vector: Vector::Debug, error_code: None, payload: dr6 }
    }

    /// `#BR`: `bound` out of range.
    #[must_use]
    pub const fn bound_range() -> Self {
        Self::plain(Vector::BoundRange)
    }

    /// `#UD`: invalid opcode.
    #[must_use]
    pub const fn invalid_opcode() -> Self {
        Self::plain(Vector::InvalidOpcode)
    }

    /// `#NM`: device not available.
    #[must_use]
    pub const fn device_not_available() -> Self {
        Self::plain(Vector::DeviceNotAvailable)
    }

    /// `#DF`: double fault.
    #[must_use]
    pub const fn double_fault() -> Self {
        Self::with_code(Vector::DoubleFault, 0)
    }

    /// `#TS`: invalid TSS.
    #[must_use]
    pub const fn invalid_tss(code: u32) -> Self {
        Self::with_code(Vector::InvalidTss, code)
    }

    /// `#NP`: segment not present.
    #[must_use]
    pub const fn segment_not_present(code: u32) -> Self {
        Self::with_code(Vector::SegmentNotPresent, code)
    }

    /// `#SS`: stack-segment fault.
    #[must_use]
    pub const fn stack_segment(code: u32) -> Self {
        Self::with_code(Vector::StackSegment, code)
    }

    /// `#GP`: general protection.
    #[must_use]
    pub const fn general_protection(code: u32) -> Self {
        Self::with_code(Vector::GeneralProtection, code)
    }

    /// `#GP(0)` for an address that is not canonical: the run loop turns it into `#SS(0)`
    /// when the access was to the stack (SDM vol. 1, 3.3.7.1).
    #[must_use]
    pub const fn not_canonical() -> Self {
        Self { vector: Vector::GeneralProtection, error_code: Some(0), payload: NOT_CANONICAL }
    }

    /// The same exception once the faulting access is known to be one to the stack.
    #[must_use]
    pub const fn on_stack(self) -> Self {
        match self.vector {
            Vector::GeneralProtection if self.payload == NOT_CANONICAL => Self::stack_segment(0),
            _ => self,
        }
    }

    /// `#PF` at `addr`.
    #[must_use]
    pub const fn page_fault(addr: GuestVirtAddr, code: PageFaultCode) -> Self {
        Self { vector: Vector::PageFault, error_code: Some(code.bits()), payload: addr.0 }
    }

    /// `#MF`: x87 floating-point error.
    #[must_use]
    pub const fn x87() -> Self {
        Self::plain(Vector::X87)
    }

    /// `#AC`: alignment check.
    #[must_use]
    pub const fn alignment_check() -> Self {
        Self::with_code(Vector::AlignmentCheck, 0)
    }

    /// `#XM`: SIMD floating-point exception.
    #[must_use]
    pub const fn simd() -> Self {
        Self::plain(Vector::Simd)
    }

    /// How this exception combines with one that is being delivered.
    #[must_use]
    pub const fn class(&self) -> Class {
        match self.vector {
            Vector::DivideError
            | Vector::InvalidTss
            | Vector::SegmentNotPresent
            | Vector::StackSegment
            | Vector::GeneralProtection => Class::Contributory,
            Vector::PageFault => Class::PageFault,
            Vector::DoubleFault => Class::DoubleFault,
            _ => Class::Benign,
        }
    }

    /// What the guest sees when `self` arises while `first` is being delivered:
    /// the exception to deliver instead, or `None` for a shutdown (triple fault).
    #[must_use]
    pub const fn after(self, first: &Self) -> Option<Self> {
        match (first.class(), self.class()) {
            (Class::DoubleFault, Class::Contributory | Class::PageFault | Class::DoubleFault) => {
                None
            }
            (Class::Contributory, Class::Contributory)
            | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                Some(Self::double_fault())
            }
            _ => Some(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn combinations_follow_the_manuals_table() {
        let gp = Exception::general_protection(0);
        let pf = Exception::page_fault(GuestVirtAddr(0), PageFaultCode::empty());
        let ud = Exception::invalid_opcode();
        let df = Exception::double_fault();
        assert_eq!(gp.after(&ud), Some(gp));
        assert_eq!(gp.after(&gp), Some(df));
        assert_eq!(pf.after(&gp), Some(pf));
        assert_eq!(gp.after(&pf), Some(df));
        assert_eq!(pf.after(&pf), Some(df));
        assert_eq!(pf.after(&df), None);
        assert_eq!(ud.after(&df), Some(ud));
    }
}
