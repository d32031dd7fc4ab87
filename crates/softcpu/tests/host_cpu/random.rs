//! Random numbers, the same every time, and random registers and memory.

use softcpu::state::VcpuState;
use softcpu::state::fpu::{MXCSR_RESET, VectorRegister};
use softcpu::state::rflags::RFlags;

/// A generator whose whole state is one number, so that a failure can name it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// The kind of number that finds mistakes in integer code.
    pub(crate) fn integer(&mut self) -> u64 {
        match self.below(4) {
            0 => self.next() & 0xff,
            1 => self.pick(&[
                0,
                1,
                u64::MAX,
                1 << 63,
                0x7fff_ffff,
                0x8000_0000,
                0xffff_ffff,
                0x80,
                0x7fff,
                0x8000,
            ]),
            _ => self.next(),
        }
    }
}

/// The bits of numbers that floating-point code finds interesting.
fn float64(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.next() >> 12,
        1 => random.pick(&[
            0,
            1 << 63,
            0x7ff0 << 48,
            0xfff0 << 48,
            0x7ff8 << 48,
            0x7ff0 << 48 | 1,
            1,
            0x3ff0 << 48,
        ]),
        2 => (random.below(2000) as f64 - 1000.0).to_bits(),
        3 => (f64::from(random.next() as i32) * 1e-3).to_bits(),
        4 => u64::from((random.below(512) as f32 / 16.0).to_bits()) * 0x1_0000_0001,
        5 => random.pick(&[
            0x0000_0001_8000_0000,
            0x7f7f_ffff_0080_0000,
            0x3f80_0000,
            0x7fc0_0000_ff80_0000,
        ]),
        _ => random.next(),
    }
}

/// Eighty bits, mostly a number.
fn float80(random: &mut Random) -> [u8; 10] {
    let (significand, exponent) = match random.below(8) {
        0 => (random.next(), random.next() as u16),
        1 => (0, random.pick(&[0, 0x8000])),
        2 => (1 << 63, random.pick(&[0x7fff, 0xffff])),
        3 => (random.next() >> 3, 0),
        _ => (random.next() | 1 << 63, 0x3fe0 + random.below(80) as u16),
    };
    let mut value = [0; 10];
    value[..8].copy_from_slice(&significand.to_le_bytes());
    value[8..].copy_from_slice(&exponent.to_le_bytes());
    value
}

/// Random registers, floating-point exceptions masked.
pub(crate) fn registers(into: &mut VcpuState, mask: u64, random: &mut Random) {
    for register in &mut into.gpr[..16] {
        *register = random.integer() & mask;
    }
    if mask != u64::MAX {
        into.gpr[8..16].fill(0);
    }
    into.rflags = (RFlags::FIXED | RFlags::IF).with_status(random.next());
    into.rflags.set(RFlags::DF, random.one_in(4));
    into.rflags.set(RFlags::ID, random.one_in(8));
    for register in &mut into.vec {
        *register = VectorRegister(std::array::from_fn(|_| float64(random)));
    }
    into.mxcsr = MXCSR_RESET | random.next() as u32 & 0xe07f;
    let fpu = &mut into.fpu;
    for i in 0..8 {
        fpu.set_st(i, &float80(random));
    }
    fpu.set_control(0x37f & !(random.next() as u16 & 0x300) | random.next() as u16 & 0xc00);
    fpu.set_status(random.next() as u16 & 0x7f7f);
    fpu.set_tags(match random.below(3) {
        0 => 0xff,
        1 => random.next() as u8,
        _ => 0x0f_u8.rotate_left(u32::from(fpu.top())),
    });
}

/// Random memory: integers and numbers.
pub(crate) fn memory(into: &mut [u8], random: &mut Random) {
    for chunk in into.chunks_mut(16) {
        let bytes: Vec<u8> = match random.below(4) {
            0 => [&float80(random)[..], &[0; 6]].concat(),
            1 => [random.integer().to_le_bytes(), random.integer().to_le_bytes()].concat(),
            _ => [float64(random).to_le_bytes(), float64(random).to_le_bytes()].concat(),
        };
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}
