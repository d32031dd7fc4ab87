//! x87, MMX and vector state.
//!
//! Vector registers are kept whole (256 bits) rather than in XSAVE's split form,
//! because instructions use them whole; XSAVE and XRSTOR take them apart.

/// MXCSR after reset: every exception masked, round to nearest.
pub const MXCSR_RESET: u32 = 0x1f80;
/// The MXCSR bits that may be set.
pub const MXCSR_MASK: u32 = 0xffff;
/// MXCSR: the six sticky exception flags.
pub const MXCSR_FLAGS: u32 = 0x3f;
/// MXCSR: the six exception masks, seven bits above their flags.
pub const MXCSR_MASKS: u32 = 0x1f80;
/// MXCSR: underflow exception flag.
pub const MXCSR_UE: u32 = 1 << 4;
/// MXCSR: flush to zero.
pub const MXCSR_FTZ: u32 = 1 << 15;

/// XCR0: x87 state (always set).
pub const XCR0_X87: u64 = 1 << 0;
/// XCR0: SSE state.
pub const XCR0_SSE: u64 = 1 << 1;
/// XCR0: AVX state.
pub const XCR0_AVX: u64 = 1 << 2;

/// FCW after FNINIT: every exception masked, 64-bit precision, round to nearest.
pub const FCW_RESET: u16 = 0x037f;
/// FCW and FSW: the six exception masks and flags.
pub const X87_EXCEPTIONS: u16 = 0x3f;
/// FSW: exception summary.
pub const FSW_ES: u16 = 1 << 7;
/// FSW: busy, a copy of ES since the 387.
pub const FSW_B: u16 = 1 << 15;

/// One YMM register; its low half is the XMM register.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct VectorRegister(pub [u64; 4]);

impl VectorRegister {
    /// The register as bytes, lowest first.
    #[inline]
    #[must_use]
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// A register from its bytes, lowest first.
    #[inline]
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64_at(chunk, 0);
        }
        Self(words)
    }

    /// Clears bits 255..128, as every VEX-encoded write of an XMM register does.
    #[inline]
    pub fn clear_upper(&mut self) {
        let [low, high, ..] = self.0;
        self.0 = [low, high, 0, 0];
    }
}

impl core::fmt::Debug for VectorRegister {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{d:016x}_{c:016x}_{b:016x}_{a:016x}")
    }
}

/// The x87 unit in FXSAVE's 64-bit layout (SDM vol. 2, FXSAVE): the first 160 bytes
/// hold it; the XMM part is dead here (see [`super::VcpuState::vec`]) but must be
/// present, because stubs load this area with FXRSTOR. Its MXCSR field is not the
/// guest's: it always holds [`MXCSR_RESET`], the value the host's code runs with.
///
/// FCS and FDS are not kept (CPUID says so: they are deprecated), FIP and FDP are
/// offsets.
///
/// Two of them are equal if their x87 parts are.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct FpuState {
    /// The image.
    pub fxsave: [u8; 512],
    /// XSAVE's header behind it, which says that the x87 part is there: translated code loads
    /// and stores that alone.
    header: [u64; 8],
}

impl PartialEq for FpuState {
    fn eq(&self, other: &Self) -> bool {
        [0..image::MXCSR, image::ST..image::XMM]
            .into_iter()
            .all(|part| self.fxsave.get(part.clone()) == other.fxsave.get(part))
    }
}

impl Eq for FpuState {}

/// Where things are in the FXSAVE image.
pub mod image {
    /// FCW, two bytes.
    pub const FCW: usize = 0;
    /// FSW, two bytes.
    pub const FSW: usize = 2;
    /// Abridged tag word: a byte with a bit per physical register that is not empty.
    pub const FTW: usize = 4;
    /// Last opcode, eleven bits.
    pub const FOP: usize = 6;
    /// Last instruction pointer, eight bytes.
    pub const FIP: usize = 8;
    /// Last data pointer, eight bytes.
    pub const FDP: usize = 16;
    /// MXCSR, four bytes, and its mask, four more.
    pub const MXCSR: usize = 24;
    /// ST0 to ST7, sixteen bytes each, of which ten are used.
    pub const ST: usize = 32;
    /// XMM0 to XMM15, sixteen bytes each.
    pub const XMM: usize = 160;
    /// The end of what FXSAVE writes.
    pub const END: usize = 416;
    /// XSAVE's header.
    pub const HEADER: usize = 512;
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
        Self::from_image(fxsave)
    }

    /// What FXSAVE has stored.
    #[must_use]
    pub const fn from_image(fxsave: [u8; 512]) -> Self {
        Self { fxsave, header: [XCR0_X87, 0, 0, 0, 0, 0, 0, 0] }
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

    /// The tag word as FXSAVE abridges it: bit n is set when physical register n is
    /// in use.
    #[must_use]
    pub const fn tags(&self) -> u8 {
        self.fxsave[image::FTW]
    }

    /// The number of the physical register that is ST0.
    #[must_use]
    pub const fn top(&self) -> u8 {
        ((self.status() >> 11) & 7) as u8
    }

    /// Whether an unmasked exception waits to be delivered at the next waiting
    /// instruction.
    #[inline]
    #[must_use]
    pub const fn pending(&self) -> bool {
        let status = self.status();
        (status & !self.control() & X87_EXCEPTIONS) | (status & FSW_ES) != 0
    }

    /// Replaces FCW, and ES and B with it.
    pub fn set_control(&mut self, fcw: u16) {
        // Reserved bits do not stick: bit 6 reads one, bits 7 and 15..13 zero.
        put(&mut self.fxsave, image::FCW, &(fcw & 0x1f3f | 0x40).to_le_bytes());
        self.summarise();
    }

    /// Replaces FSW; ES and B follow from flags and masks.
    pub fn set_status(&mut self, fsw: u16) {
        put(&mut self.fxsave, image::FSW, &fsw.to_le_bytes());
        self.summarise();
    }

    /// Replaces the abridged tag word.
    pub const fn set_tags(&mut self, tags: u8) {
        self.fxsave[image::FTW] = tags;
    }

    /// ES and B are what flags and masks make of them.
    fn summarise(&mut self) {
        let status = self.status() & !(FSW_ES | FSW_B);
        let pending = status & !self.control() & X87_EXCEPTIONS != 0;
        let status = if pending { status | FSW_ES | FSW_B } else { status };
        put(&mut self.fxsave, image::FSW, &status.to_le_bytes());
    }

    /// FOP, FIP and FDP.
    #[must_use]
    pub fn pointers(&self) -> Pointers {
        Pointers {
            opcode: u16::from_le_bytes([self.fxsave[image::FOP], self.fxsave[image::FOP + 1]]),
            instruction: u64_at(&self.fxsave, image::FIP),
            data: u64_at(&self.fxsave, image::FDP),
        }
    }

    /// Replaces FOP, FIP and FDP.
    pub fn set_pointers(&mut self, pointers: Pointers) {
        put(&mut self.fxsave, image::FOP, &(pointers.opcode & 0x7ff).to_le_bytes());
        put(&mut self.fxsave, image::FIP, &pointers.instruction.to_le_bytes());
        put(&mut self.fxsave, image::FDP, &pointers.data.to_le_bytes());
    }

    /// Where ST`i` is in the image.
    fn place(i: u8) -> usize {
        image::ST.wrapping_add(usize::from(i & 7).wrapping_mul(16))
    }

    /// The ten bytes of ST`i`.
    #[must_use]
    pub fn st(&self, i: u8) -> [u8; 10] {
        let start = Self::place(i);
        let mut value = [0; 10];
        for (to, from) in value.iter_mut().zip(self.fxsave.iter().skip(start)) {
            *to = *from;
        }
        value
    }

    /// Replaces the ten bytes of ST`i`; the six of padding become zero.
    pub fn set_st(&mut self, i: u8, value: &[u8; 10]) {
        let start = Self::place(i);
        put(&mut self.fxsave, start, value);
        put(&mut self.fxsave, start.wrapping_add(10), &[0; 6]);
    }

    /// The low eight bytes of MM`i`, which is physical register `i` whatever TOP is.
    #[must_use]
    pub fn mmx(&self, i: u8) -> u64 {
        let st = self.st(i.wrapping_sub(self.top()) & 7);
        u64_at(&st, 0)
    }

    /// Every MMX instruction but EMMS leaves TOP at zero and all tags valid
    /// (SDM vol. 1, 9.5.1).
    pub fn enter_mmx(&mut self) {
        self.move_top(0);
        self.set_tags(0xff);
    }

    /// Makes physical register `top` ST0. Registers stay where they are, so in the
    /// image, which is in ST order, they move.
    fn move_top(&mut self, top: u8) {
        let old: [[u8; 10]; 8] = std::array::from_fn(|i| self.st(i as u8));
        let shift = top.wrapping_sub(self.top());
        for i in 0..8_u8 {
            let from = usize::from(i.wrapping_add(shift) & 7);
            if let Some(value) = old.get(from) {
                self.set_st(i, value);
            }
        }
        let status = self.status() & !(7 << 11) | u16::from(top & 7) << 11;
        put(&mut self.fxsave, image::FSW, &status.to_le_bytes());
    }

    /// What FLDENV loads: control, status (with another TOP) and tags, but no registers.
    pub fn set_environment(&mut self, fcw: u16, fsw: u16, tags: u8) {
        self.move_top((fsw >> 11) as u8 & 7);
        self.set_control(fcw);
        self.set_status(fsw);
        self.set_tags(tags);
    }

    /// FNINIT: the registers become empty, but keep their contents.
    pub fn init(&mut self) {
        self.set_environment(FCW_RESET, 0, 0);
        self.set_pointers(Pointers::default());
    }
}

/// The x87 unit's last opcode, instruction and data pointers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pointers {
    /// FOP: eleven bits of opcode.
    pub opcode: u16,
    /// FIP.
    pub instruction: u64,
    /// FDP.
    pub data: u64,
}

/// Eight little-endian bytes at `at`; zero beyond the end.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u64::from_le_bytes)
}

/// Four little-endian bytes at `at`; zero beyond the end.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u32::from_le_bytes)
}

/// Two little-endian bytes at `at`; zero beyond the end.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u16::from_le_bytes)
}

/// Copies `data` to `at` as far as there is room.
pub(crate) fn put(bytes: &mut [u8], at: usize, data: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(data) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_follows_flags_and_masks() {
        let mut fpu = FpuState::at_reset();
        fpu.set_status(0x0001);
        assert!(!fpu.pending());
        fpu.set_control(0x037e);
        assert!(fpu.pending());
        assert_eq!(fpu.status(), 0x8081);
        fpu.set_control(0x037f);
        assert_eq!(fpu.status(), 0x0001);
    }

    #[test]
    fn mmx_registers_do_not_move_with_top() {
        let mut fpu = FpuState::at_reset();
        fpu.set_status(3 << 11);
        for i in 0..8 {
            fpu.set_st(i, &[i, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        }
        assert_eq!(fpu.mmx(3), 0);
        let before: Vec<u64> = (0..8).map(|i| fpu.mmx(i)).collect();
        fpu.enter_mmx();
        assert_eq!(fpu.top(), 0);
        assert_eq!((0..8).map(|i| fpu.mmx(i)).collect::<Vec<_>>(), before);
    }

    #[test]
    fn vectors_round_trip_through_bytes() {
        let mut v = VectorRegister([1, 2 << 40, 3, u64::MAX]);
        assert_eq!(VectorRegister::from_bytes(&v.to_bytes()), v);
        v.clear_upper();
        assert_eq!(v.0, [1, 2 << 40, 0, 0]);
    }
}
