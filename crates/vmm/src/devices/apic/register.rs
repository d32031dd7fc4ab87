//! The local APIC's registers by their offset in the xAPIC page (SDM vol. 3, table 11-1).
//! An x2APIC MSR's number is 0x800 plus a sixteenth of it.

/// A register of the local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the manual's own names")]
pub enum Register {
    Id,
    Version,
    TaskPriority,
    ProcessorPriority,
    EndOfInterrupt,
    LogicalDestination,
    DestinationFormat,
    SpuriousVector,
    InService(usize),
    TriggerMode(usize),
    Requested(usize),
    ErrorStatus,
    CommandLow,
    CommandHigh,
    Lvt(Lvt),
    InitialCount,
    CurrentCount,
    DivideConfiguration,
    SelfIpi,
}

/// An entry of the local vector table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the manual's own names")]
pub enum Lvt {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

/// How many entries the local vector table has.
pub const LVT_ENTRIES: usize = 6;
/// An entry's mask bit.
pub const LVT_MASKED: u32 = 1 << 16;

impl Lvt {
    /// The bits software may set.
    #[must_use]
    pub const fn writable(self) -> u32 {
        match self {
            Self::Timer => 0x0007_00ff,
            Self::Thermal | Self::Performance => 0x0001_07ff,
            Self::Lint0 | Self::Lint1 => 0x0001_a7ff,
            Self::Error => 0x0001_00ff,
        }
    }
}

impl Register {
    /// The register at `offset`, a multiple of 16, or `None` if that is reserved.
    #[must_use]
    pub const fn at(offset: u16) -> Option<Self> {
        let index = ((offset >> 4) & 7) as usize;
        Some(match offset {
            0x020 => Self::Id,
            0x030 => Self::Version,
            0x080 => Self::TaskPriority,
            0x0a0 => Self::ProcessorPriority,
            0x0b0 => Self::EndOfInterrupt,
            0x0d0 => Self::LogicalDestination,
            0x0e0 => Self::DestinationFormat,
            0x0f0 => Self::SpuriousVector,
            0x100..=0x170 => Self::InService(index),
            0x180..=0x1f0 => Self::TriggerMode(index),
            0x200..=0x270 => Self::Requested(index),
            0x280 => Self::ErrorStatus,
            0x300 => Self::CommandLow,
            0x310 => Self::CommandHigh,
            0x320 => Self::Lvt(Lvt::Timer),
            0x330 => Self::Lvt(Lvt::Thermal),
            0x340 => Self::Lvt(Lvt::Performance),
            0x350 => Self::Lvt(Lvt::Lint0),
            0x360 => Self::Lvt(Lvt::Lint1),
            0x370 => Self::Lvt(Lvt::Error),
            0x380 => Self::InitialCount,
            0x390 => Self::CurrentCount,
            0x3e0 => Self::DivideConfiguration,
            0x3f0 => Self::SelfIpi,
            _ => return None,
        })
    }

    /// Whether the xAPIC interface has it.
    #[must_use]
    pub const fn in_xapic(self) -> bool {
        !matches!(self, Self::SelfIpi)
    }

    /// Whether `rdmsr` reads it in x2APIC mode.
    #[must_use]
    pub const fn x2apic_readable(self) -> bool {
        !matches!(
            self,
            Self::EndOfInterrupt | Self::SelfIpi | Self::DestinationFormat | Self::CommandHigh
        )
    }

    /// The bits `wrmsr` may set in x2APIC mode, or `None` if it may not write at all.
    #[must_use]
    pub const fn x2apic_writable(self) -> Option<u32> {
        match self {
            Self::TaskPriority | Self::SelfIpi => Some(0xff),
            Self::EndOfInterrupt | Self::ErrorStatus => Some(0),
            Self::SpuriousVector => Some(0x3ff),
            Self::CommandLow => Some(super::icr::ICR_LOW_VALID),
            // Delivery status is read-only, not reserved.
            Self::Lvt(entry) => Some(entry.writable() | 1 << 12),
            Self::InitialCount => Some(u32::MAX),
            Self::DivideConfiguration => Some(0xb),
            _ => None,
        }
    }
}
