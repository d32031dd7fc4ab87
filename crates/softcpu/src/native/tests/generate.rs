//! Random instructions of a given encoding, and random states to run them on.

use iced_x86::{Code, Encoder, Instruction, OpCodeOperandKind as K, OpKind, Register as R};

use super::Random;
use crate::state::VcpuState;
use crate::state::fpu::{MXCSR_RESET, VectorRegister};
use crate::state::rflags::RFlags;

/// An instruction of `code` with random operands, its memory operand at
/// `[disp32] = address` (a gather's at `[vector + disp32]`), and its bytes. `None` for
/// operands nobody here makes up.
pub(super) fn instruction(
    code: Code,
    address: u64,
    random: &mut Random,
) -> Option<(Instruction, Vec<u8>)> {
    let op_code = code.op_code();
    let mut it = Instruction::new();
    it.set_code(code);
    for (operand, kind) in op_code.op_kinds().iter().enumerate() {
        let operand = operand as u32;
        let any = random.below(16) as u32;
        let register = |it: &mut Instruction, register: R| {
            it.set_op_kind(operand, OpKind::Register);
            it.set_op_register(operand, register);
        };
        let memory = |it: &mut Instruction, index: R| {
            it.set_op_kind(operand, OpKind::Memory);
            it.set_memory_base(R::None);
            it.set_memory_index(index);
            it.set_memory_index_scale(1);
            it.set_memory_displacement64(address);
            it.set_memory_displ_size(4);
        };
        let in_memory = random.below(2) == 0;
        match *kind {
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
                if in_memory =>
            {
                memory(&mut it, R::None);
            }
            K::mem => memory(&mut it, R::None),
            K::mem_vsib32x | K::mem_vsib64x => memory(&mut it, R::XMM0 + any),
            K::mem_vsib32y | K::mem_vsib64y => memory(&mut it, R::YMM0 + any),
            K::r8_or_mem | K::r8_reg | K::r8_opcode => {
                let high = [R::AH, R::CH, R::DH, R::BH];
                let low =
                    [R::AL, R::CL, R::DL, R::BL, R::SPL, R::BPL, R::SIL, R::DIL, R::R8L, R::R15L];
                let one = if random.below(4) == 0 { random.pick(&high) } else { random.pick(&low) };
                register(&mut it, one);
            }
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                register(&mut it, R::AX + any)
            }
            K::r32_or_mem
            | K::r32_reg
            | K::r32_rm
            | K::r32_vvvv
            | K::r32_opcode
            | K::r32_reg_mem => {
                register(&mut it, R::EAX + any);
            }
            K::r64_or_mem
            | K::r64_reg
            | K::r64_rm
            | K::r64_vvvv
            | K::r64_opcode
            | K::r64_reg_mem => {
                register(&mut it, R::RAX + any);
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => register(&mut it, R::MM0 + any % 8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                register(&mut it, R::XMM0 + any)
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                register(&mut it, R::YMM0 + any)
            }
            K::al => register(&mut it, R::AL),
            K::cl => register(&mut it, R::CL),
            K::ax => register(&mut it, R::AX),
            K::dx => register(&mut it, R::DX),
            K::eax => register(&mut it, R::EAX),
            K::rax => register(&mut it, R::RAX),
            K::st0 => register(&mut it, R::ST0),
            K::sti_opcode => register(&mut it, R::ST0 + any % 8),
            K::seg_rDI => it.set_op_kind(operand, OpKind::MemorySegRDI),
            K::imm8 => {
                // EXTRQ-like second immediates do not occur in what the models offer.
                it.set_op_kind(operand, OpKind::Immediate8);
                it.set_immediate8(random.next() as u8);
            }
            K::imm8_const_1 => {
                it.set_op_kind(operand, OpKind::Immediate8);
                it.set_immediate8(1);
            }
            K::imm8sex16 => {
                it.set_op_kind(operand, OpKind::Immediate8to16);
                it.set_immediate8to16(i16::from(random.next() as i8));
            }
            K::imm8sex32 => {
                it.set_op_kind(operand, OpKind::Immediate8to32);
                it.set_immediate8to32(i32::from(random.next() as i8));
            }
            K::imm8sex64 => {
                it.set_op_kind(operand, OpKind::Immediate8to64);
                it.set_immediate8to64(i64::from(random.next() as i8));
            }
            K::imm16 => {
                it.set_op_kind(operand, OpKind::Immediate16);
                it.set_immediate16(random.next() as u16);
            }
            K::imm32 => {
                it.set_op_kind(operand, OpKind::Immediate32);
                it.set_immediate32(random.next() as u32);
            }
            K::imm32sex64 => {
                it.set_op_kind(operand, OpKind::Immediate32to64);
                it.set_immediate32to64(i64::from(random.next() as i32));
            }
            K::imm64 => {
                it.set_op_kind(operand, OpKind::Immediate64);
                it.set_immediate64(random.next());
            }
            _ => return None,
        }
    }
    let lockable = op_code.can_use_lock_prefix() && it.op0_kind() == OpKind::Memory;
    it.set_has_lock_prefix(lockable && random.below(2) == 0);
    let mut encoder = Encoder::new(if op_code.mode64() { 64 } else { 32 });
    encoder.encode(&it, 0).ok()?;
    Some((it, encoder.take_buffer()))
}

/// The bits of a number that floating-point code finds interesting.
fn float64(random: &mut Random) -> u64 {
    match random.below(10) {
        0 => random.next(),
        1 => random.next() >> 12,
        2 => random.pick(&[
            0,
            1 << 63,
            0x7ff0 << 48,
            0xfff0 << 48,
            0x7ff8 << 48,
            0x7ff0 << 48 | 1,
            1,
            0x3ff0 << 48,
        ]),
        3 => (random.below(2000) as f64 - 1000.0).to_bits(),
        4 => (random.next() as i32 as f64 * 1e-3).to_bits(),
        5 => u64::from((random.below(512) as f32 / 16.0).to_bits()) * 0x1_0000_0001,
        6 => u64::from(random.next() as u32) << 32 | 0x7f80_0001,
        7 => random.pick(&[
            0x0000_0001_8000_0000,
            0x7f7f_ffff_0080_0000,
            0x0000_0000_3f80_0000,
            0x7fc0_0000_ff80_0000,
        ]),
        8 => (random.next() & 0x0fff_ffff_ffff_ffff | 0x3000 << 48) ^ random.below(2) << 63,
        _ => random.next() & 0x8fff_ffff_8fff_ffff | 0x3f00_0000_3f00_0000,
    }
}

/// Eighty bits, mostly a number.
fn float80(random: &mut Random) -> [u8; 10] {
    let mut value = [0; 10];
    let (significand, exponent) = match random.below(8) {
        0 => (random.next(), random.next() as u16),
        1 => (0, random.pick(&[0, 0x8000])),
        2 => (1 << 63, random.pick(&[0x7fff, 0xffff])),
        3 => (random.next() >> 3, 0),
        _ => (
            random.next() | 1 << 63,
            0x3fff_u16.wrapping_add(random.below(80) as u16).wrapping_sub(30),
        ),
    };
    value[..8].copy_from_slice(&significand.to_le_bytes());
    value[8..].copy_from_slice(&exponent.to_le_bytes());
    value
}

/// Random registers; floating-point exceptions masked, unless `unmasked`.
pub(super) fn state(into: &mut VcpuState, unmasked: bool, random: &mut Random) {
    for register in &mut into.gpr[..16] {
        *register = match random.below(4) {
            0 => random.next() & 0xff,
            1 => random.pick(&[0, 1, u64::MAX, 1 << 63, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]),
            _ => random.next(),
        };
    }
    into.rflags = RFlags::FIXED.with_status(random.next());
    for register in &mut into.vec {
        *register = VectorRegister(std::array::from_fn(|_| float64(random)));
    }
    // Flags, DAZ, rounding and FTZ.
    into.mxcsr = MXCSR_RESET | random.next() as u32 & 0xe07f;
    if random.below(2) == 0 {
        into.mxcsr &= !0x8040;
    }
    let fpu = &mut into.fpu;
    for i in 0..8 {
        fpu.set_st(i, &float80(random));
    }
    fpu.set_control(0x37f & !(random.next() as u16 & 0x300) | random.next() as u16 & 0xc00);
    // Condition codes and TOP at random, and mostly full or half-full stacks.
    fpu.set_status(random.next() as u16 & 0x7f7f);
    fpu.set_tags(match random.below(3) {
        0 => 0xff,
        1 => random.next() as u8,
        _ => 0x0f_u8.rotate_left(u32::from(fpu.top())),
    });
    if unmasked {
        into.mxcsr &= !(random.next() as u32 & 0x1f80) & !0x3f;
        let status = fpu.status() & !0x3f;
        fpu.set_status(status);
        fpu.set_control(0x37f & !(random.next() as u16 & 0x3f));
    }
}

/// Random memory, of the same kinds of numbers.
pub(super) fn memory(into: &mut [u8], random: &mut Random) {
    for chunk in into.chunks_mut(16) {
        let bytes = match random.below(3) {
            0 => [&float80(random)[..], &[0; 6]].concat(),
            _ => [float64(random).to_le_bytes(), float64(random).to_le_bytes()].concat(),
        };
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}
