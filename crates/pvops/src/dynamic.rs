//! Thunks for functions known only at run time.
//!
//! [`DynamicThunk::write`] encodes a thunk around any address into memory the caller
//! provides, saving any set of registers: the convention's own by default, more for
//! callers that keep vector registers or flags alive across the call (a translator that
//! calls helpers from the middle of translated code does).

use core::fmt;

use crate::convention::{Convention, Gpr, RegSet, Width};

/// Which vector state a thunk keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Vectors {
    /// None.
    #[default]
    None,
    /// XMM0 to XMM15, 16 bytes each (XMM0 to XMM7 in 32-bit code).
    Xmm,
    /// YMM0 to YMM15, 32 bytes each; needs AVX. 64-bit code only.
    Ymm,
    /// ZMM0 to ZMM31, 64 bytes each, and the mask registers K0 to K7; needs AVX-512 F and
    /// BW. 64-bit code only.
    Zmm,
}

impl Vectors {
    const fn registers(self, width: Width) -> u32 {
        match (self, width) {
            (Self::None, _) => 0,
            (Self::Xmm, Width::Bits32) => 8,
            (Self::Xmm | Self::Ymm, _) => 16,
            (Self::Zmm, _) => 32,
        }
    }

    const fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Xmm => 16,
            Self::Ymm => 32,
            Self::Zmm => 64,
        }
    }

    /// Stack bytes for all of them.
    const fn area(self, width: Width) -> u32 {
        let masks = if matches!(self, Self::Zmm) { 8 * 8 } else { 0 };
        self.registers(width) * self.bytes() + masks
    }
}

/// What a thunk keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveSet {
    /// General registers.
    pub general: RegSet,
    /// Vector registers.
    pub vectors: Vectors,
    /// The arithmetic flags (all of EFLAGS, in fact).
    pub flags: bool,
}

impl SaveSet {
    /// What a callee-save site expects of its callee.
    #[must_use]
    pub const fn callee_save(width: Width) -> Self {
        let general = Convention::of(width).thunk_saves();
        Self { general, vectors: Vectors::None, flags: false }
    }
}

/// A thunk that cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ThunkError {
    /// The memory is too short; [`DynamicThunk::MAX`] always suffices.
    NoRoom {
        /// What was given, in bytes.
        given: usize,
    },
    /// A register that 32-bit code does not have.
    Register(Gpr),
    /// The stack pointer, or a return register: those cannot be kept.
    NotSavable(Gpr),
    /// Vector registers that 32-bit code does not have.
    Vectors(Vectors),
    /// 32-bit code at or calling an address above 4 GiB.
    Address(u64),
}

impl fmt::Display for ThunkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRoom { given } => write!(f, "a thunk does not fit in {given} bytes"),
            Self::Register(r) => write!(f, "32-bit code has no register {r:?}"),
            Self::NotSavable(r) => write!(f, "a thunk cannot keep {r:?}"),
            Self::Vectors(v) => write!(f, "thunks in 32-bit code cannot keep {v:?} registers"),
            Self::Address(address) => write!(f, "32-bit code cannot reach {address:#x}"),
        }
    }
}

impl core::error::Error for ThunkError {}

/// Writer of thunks.
#[derive(Clone, Copy, Debug)]
pub struct DynamicThunk {
    /// The code's mode.
    pub width: Width,
    /// What the thunk keeps.
    pub saves: SaveSet,
    /// The conventional function it calls.
    pub target: u64,
}

impl DynamicThunk {
    /// Bytes that every thunk fits in.
    pub const MAX: usize = 1024;

    /// Encodes the thunk into `memory`, which will be executed at address `at`. Returns
    /// its length.
    ///
    /// Making the memory executable, and serializing, is the caller's business.
    ///
    /// # Errors
    /// When the set or the addresses are impossible, or the memory is too short.
    pub fn write(&self, memory: &mut [u8], at: u64) -> Result<usize, ThunkError> {
        self.check(at)?;
        let given = memory.len();
        let mut code = Encoder { memory, len: 0, width: self.width };
        self.encode(&mut code, at);
        if code.len > given {
            return Err(ThunkError::NoRoom { given });
        }
        Ok(code.len)
    }

    fn check(&self, at: u64) -> Result<(), ThunkError> {
        let unsavable = RegSet::of(Convention::of(self.width).ret).union(RegSet::of(&[Gpr::Rsp]));
        for register in self.saves.general.iter() {
            if unsavable.contains(register) {
                return Err(ThunkError::NotSavable(register));
            }
            if self.width == Width::Bits32 && register as u8 >= 8 {
                return Err(ThunkError::Register(register));
            }
        }
        if self.width == Width::Bits32 {
            if matches!(self.saves.vectors, Vectors::Ymm | Vectors::Zmm) {
                return Err(ThunkError::Vectors(self.saves.vectors));
            }
            for address in [at.saturating_add(Self::MAX as u64), self.target] {
                if u32::try_from(address).is_err() {
                    return Err(ThunkError::Address(address));
                }
            }
        }
        Ok(())
    }

    fn encode(&self, code: &mut Encoder<'_>, at: u64) {
        let SaveSet { general, vectors, flags } = self.saves;
        let convention = Convention::of(self.width);
        let area = vectors.area(self.width);
        // Vector areas are multiples of the alignment, so only the pushes need padding.
        let frame = area + convention.thunk_pad(general.len() + u32::from(flags));

        code.put(if self.width == Width::Bits64 { &ENDBR64 } else { &ENDBR32 });
        if flags {
            code.put(&[0x9c]); // pushf
        }
        for register in general.iter() {
            code.push(register);
        }
        code.move_stack(0u32.wrapping_sub(frame));
        code.vectors(vectors, true);
        code.call(at, self.target);
        code.vectors(vectors, false);
        code.move_stack(frame);
        for register in general.iter().rev() {
            code.pop(register);
        }
        if flags {
            code.put(&[0x9d]); // popf
        }
        code.put(&[0xc3]); // ret
    }
}

const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
const ENDBR32: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfb];

/// Writes instructions; counts on when the memory is full.
struct Encoder<'a> {
    memory: &'a mut [u8],
    len: usize,
    width: Width,
}

impl Encoder<'_> {
    fn put(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(place) = self.memory.get_mut(self.len) {
                *place = *byte;
            }
            self.len += 1;
        }
    }

    fn push(&mut self, register: Gpr) {
        self.short(0x50, register);
    }

    fn pop(&mut self, register: Gpr) {
        self.short(0x58, register);
    }

    fn short(&mut self, opcode: u8, register: Gpr) {
        let number = register as u8;
        if number >= 8 {
            self.put(&[0x41]); // REX.B
        }
        self.put(&[opcode + (number & 7)]);
    }

    /// `lea rsp, [rsp + offset]`: unlike an addition it leaves the flags alone, so that a
    /// callee may return something in them.
    fn move_stack(&mut self, offset: u32) {
        if offset == 0 {
            return;
        }
        if self.width == Width::Bits64 {
            self.put(&[0x48]); // REX.W
        }
        self.put(&[0x8d, 0xa4, 0x24]);
        self.put(&offset.to_le_bytes());
    }

    fn call(&mut self, at: u64, target: u64) {
        let distance = target.wrapping_sub(at.wrapping_add(self.len as u64 + 5));
        let near = match self.width {
            Width::Bits64 => i32::try_from(distance as i64).ok(),
            Width::Bits32 => Some(distance as i32),
        };
        match near {
            Some(displacement) => {
                self.put(&[0xe8]);
                self.put(&displacement.to_le_bytes());
            }
            None => {
                // mov rax, target; call rax: the return register is free.
                self.put(&[0x48, 0xb8]);
                self.put(&target.to_le_bytes());
                self.put(&[0xff, 0xd0]);
            }
        }
    }

    /// Stores all registers of the set at the stack pointer, or loads them.
    fn vectors(&mut self, vectors: Vectors, store: bool) {
        // Opcode of MOVUPS, in all its encodings: 10 loads, 11 stores.
        let opcode = 0x10 + u8::from(store);
        let registers = vectors.registers(self.width);
        for number in 0..registers {
            let (n, offset) = (number as u8, number * vectors.bytes());
            let modrm = 0x84 | (n & 7) << 3; // [base + disp32], with a SIB byte
            match vectors {
                Vectors::None => {}
                Vectors::Xmm => {
                    if n >= 8 {
                        self.put(&[0x44]); // REX.R
                    }
                    self.put(&[0x0f, opcode]);
                }
                // VEX.256.0F.WIG, two-byte form: inverted R, vvvv unused, L, no prefix.
                Vectors::Ymm => self.put(&[0xc5, if n >= 8 { 0x7c } else { 0xfc }, opcode]),
                // EVEX.512.0F.W0: inverted R and R' extend the register number.
                Vectors::Zmm => {
                    let r = u8::from(n & 8 == 0) << 7;
                    let r_high = u8::from(n & 16 == 0) << 4;
                    self.put(&[0x62, r | 0x60 | r_high | 0x01, 0x7c, 0x48, opcode]);
                }
            }
            self.put(&[modrm, 0x24]);
            self.put(&offset.to_le_bytes());
        }
        if vectors == Vectors::Zmm {
            // VEX.L0.0F.W1 KMOVQ: 91 stores, 90 loads.
            for n in 0..8u8 {
                let offset = registers * vectors.bytes() + u32::from(n) * 8;
                self.put(&[0xc4, 0xe1, 0xf8, 0x90 + u8::from(store), 0x84 | n << 3, 0x24]);
                self.put(&offset.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thunk(width: Width, vectors: Vectors, target: u64) -> DynamicThunk {
        let saves = SaveSet { vectors, ..SaveSet::callee_save(width) };
        DynamicThunk { width, saves, target }
    }

    #[test]
    fn longest_thunk_fits_in_max() {
        let all = RegSet::from_bits(!0).minus(RegSet::of(&[Gpr::Rsp, Gpr::Rax]));
        let saves = SaveSet { general: all, vectors: Vectors::Zmm, flags: true };
        let long = DynamicThunk { width: Width::Bits64, saves, target: 1 << 60 };
        let mut memory = [0; DynamicThunk::MAX];
        let len = long.write(&mut memory, 0).expect("fits");
        assert_eq!(
            long.write(&mut memory[..len - 1], 0),
            Err(ThunkError::NoRoom { given: len - 1 })
        );
    }

    #[test]
    fn impossible_sets_are_refused() {
        let mut memory = [0; DynamicThunk::MAX];
        let ymm = thunk(Width::Bits32, Vectors::Ymm, 0x1000);
        assert_eq!(ymm.write(&mut memory, 0), Err(ThunkError::Vectors(Vectors::Ymm)));
        let far = thunk(Width::Bits32, Vectors::None, 1 << 32);
        assert_eq!(far.write(&mut memory, 0), Err(ThunkError::Address(1 << 32)));
        for (width, register, error) in [
            (Width::Bits64, Gpr::Rsp, ThunkError::NotSavable(Gpr::Rsp)),
            (Width::Bits64, Gpr::Rax, ThunkError::NotSavable(Gpr::Rax)),
            (Width::Bits32, Gpr::Rdx, ThunkError::NotSavable(Gpr::Rdx)),
            (Width::Bits32, Gpr::R8, ThunkError::Register(Gpr::R8)),
        ] {
            let mut bad = thunk(width, Vectors::None, 0x1000);
            bad.saves.general = RegSet::of(&[register]);
            assert_eq!(bad.write(&mut memory, 0), Err(error));
        }
    }
}
