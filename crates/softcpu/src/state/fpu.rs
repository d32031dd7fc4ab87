//! x87, MMX and vector state.
//!
//! Vector registers are kept whole (256 bits) rather than in XSAVE's split form,
//! because instructions use them whole; XSAVE and XRSTOR take them apart.

/// MXCSR after reset: every exception masked, round to nearest.
pub const MXCSR_RESET: u32 = 0x1f80;
/// The MXCSR bits that may be set.
pub const MXCSR_MASK: u32 = 0xffff;

/// XCR0: x87 state (always set).
pub const XCR0_X87: u64 = 1 << 0;
/// XCR0: SSE state.
pub const XCR0_SSE: u64 = 1 << 1;
/// XCR0: AVX state.
pub const XCR0_AVX: u64 = 1 << 2;

/// One YMM register; its low half is the XMM register.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct VectorRegister(pub [u64; 4]);

impl core::fmt::Debug for VectorRegister {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{d:016x}_{c:016x}_{b:016x}_{a:016x}")
    }
}

/// The x87 unit in FXSAVE's 64-bit layout (SDM vol. 2, FXSAVE): the first 160 bytes
/// hold it; the XMM part is dead here (see [`super::VcpuState::vec`]) but must be
/// present, because stubs load this area with FXRSTOR.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct FpuState {
    /// The image.
    pub fxsave: [u8; 512],
}

impl core::fmt::Debug for FpuState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "FpuState {{ fcw: {:#06x}, fsw: {:#06x} }}", self.control(), self.status())
    }
}

impl FpuState {
    /// After reset or FNINIT: control word 037F, everything empty.
    #[must_use]
    pub const fn at_reset() -> Self {
        let mut fxsave = [0; 512];
        fxsave[0] = 0x7f;
        fxsave[1] = 0x03;
        fxsave[24] = 0x80;
        fxsave[25] = 0x1f;
        Self { fxsave }
    }

    /// FCW.
    #[must_use]
    pub const fn control(&self) -> u16 {
        u16::from_le_bytes([self.fxsave[0], self.fxsave[1]])
    }

    /// FSW.
    #[must_use]
    pub const fn status(&self) -> u16 {
        u16::from_le_bytes([self.fxsave[2], self.fxsave[3]])
    }
}
