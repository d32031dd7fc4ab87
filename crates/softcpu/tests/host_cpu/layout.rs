//! Addresses and modes that the host and the guest share.
//!
//! One stretch of 64 KiB at a fixed low address holds code and data on both sides, so
//! that instructions run unchanged, whatever way they address memory, and even a fault's
//! address is the same. It lies below 2 GiB for absolute operands, and is small enough
//! for 16-bit code in a segment based at its start.

use softcpu::state::segment::Segment;

/// Start of the shared stretch.
pub(crate) const AREA: u64 = 0x2000_0000;
/// Two pages of code, the instruction under test somewhere in them.
pub(crate) const CODE: u64 = AREA;
/// Bytes of code.
pub(crate) const CODE_LEN: usize = 0x2000;
/// The host's harness and its registers; not the guest's.
pub(crate) const HARNESS: u64 = AREA + 0x2000;
/// Where data begins; the page before it is not mapped, nor is the one after it.
pub(crate) const DATA: u64 = AREA + 0x7000;
/// Bytes of data.
pub(crate) const DATA_LEN: usize = 0x5000;
/// The first address after the data.
pub(crate) const DATA_END: u64 = DATA + DATA_LEN as u64;
/// Bytes of the stretch.
pub(crate) const AREA_LEN: usize = 0x1_0000;

/// Linux's descriptors for user space, which its GDT has at these selectors.
pub(crate) const USER_CS32: u16 = 0x23;
/// Flat data.
pub(crate) const USER_DS: u16 = 0x2b;
/// 64-bit code.
pub(crate) const USER_CS64: u16 = 0x33;

/// Our own descriptors, in the local descriptor table of both sides.
pub(crate) const LDT: [u64; 4] = [
    descriptor(AREA as u32, 0xffff, 0x10fb),
    descriptor(AREA as u32, 0xffff, 0x10f3),
    // A data segment that ends a little before the data does: for limit checks.
    descriptor(AREA as u32, (DATA_END - AREA) as u32 - 0x20 - 1, 0x50f3),
    descriptor(AREA as u32, 0xffff, 0x50fb),
];
/// 16-bit code based at [`AREA`].
pub(crate) const LDT_CS16: u16 = 7;
/// 16-bit data (and stack) based there.
pub(crate) const LDT_DS16: u16 = 0xf;
/// 32-bit data based there, with a limit.
pub(crate) const LDT_DS32: u16 = 0x17;
/// 32-bit code based there.
pub(crate) const LDT_CS32: u16 = 0x1f;

/// The start of the guest's GDT as Linux lays it out.
pub(crate) const GDT: [u64; 7] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];

/// A present segment; `access` holds the type byte and, above bit 11, the flags.
const fn descriptor(base: u32, limit: u32, access: u64) -> u64 {
    let (base, limit) = (base as u64, limit as u64);
    let low = limit & 0xffff | (base & 0xff_ffff) << 16;
    low | (access & 0xff) << 40 | (limit >> 16) << 48 | (access >> 12) << 52 | (base >> 24) << 56
}

/// The hidden part that loading `selector` gives on both sides.
pub(crate) fn segment(selector: u16) -> Segment {
    let index = usize::from(selector >> 3);
    match selector {
        0..=3 => Segment::null(selector),
        _ if selector & 4 != 0 => Segment::from_descriptor(selector, LDT[index]),
        _ => Segment::from_descriptor(selector, GDT[index]),
    }
}

/// What kind of code runs, with which segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// 64-bit code.
    Long,
    /// 32-bit code, everything flat.
    Flat32,
    /// 32-bit code, its segments based at [`AREA`], with limits.
    Based32,
    /// 16-bit code, stack and data.
    Bits16,
}

impl Mode {
    /// For iced-x86's encoder and decoder.
    pub(crate) fn bitness(self) -> u32 {
        match self {
            Self::Long => 64,
            Self::Flat32 | Self::Based32 => 32,
            Self::Bits16 => 16,
        }
    }

    /// Selectors: ES, CS, SS, DS. (FS and GS are null outside 64-bit code.)
    pub(crate) fn selectors(self) -> [u16; 4] {
        match self {
            Self::Long => [0, USER_CS64, USER_DS, 0],
            Self::Flat32 => [USER_DS, USER_CS32, USER_DS, USER_DS],
            Self::Based32 => [LDT_DS16, LDT_CS32, LDT_DS32, LDT_DS32],
            Self::Bits16 => [LDT_DS16, LDT_CS16, LDT_DS16, LDT_DS16],
        }
    }

    /// Base of ES, CS, SS and DS, which are alike.
    pub(crate) fn base(self) -> u64 {
        match self {
            Self::Long | Self::Flat32 => 0,
            Self::Based32 | Self::Bits16 => AREA,
        }
    }

    /// Which bits of RSP address the stack.
    pub(crate) fn stack_mask(self) -> u64 {
        match self {
            Self::Long => u64::MAX,
            Self::Flat32 | Self::Based32 => 0xffff_ffff,
            Self::Bits16 => 0xffff,
        }
    }

    /// Which bits of general registers are defined.
    pub(crate) fn register_mask(self) -> u64 {
        if self == Self::Long { u64::MAX } else { 0xffff_ffff }
    }
}
