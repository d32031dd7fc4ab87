//! Writes the machine code of a stub.
//!
//! A stub is a leaf function `fn(state, mem)`: it loads what the instruction uses from
//! the register state, executes the instruction with its memory operand replaced by
//! `[mem]`, and stores what changed. The state's address and the operand's sit in
//! registers the instruction does not use. Guest RSP never becomes host RSP: another
//! register stands in for it.

use std::mem::offset_of;

use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, Register as R};

use super::classify::{Plan, Refused, Traits, Use};
use crate::state::VcpuState;
use crate::state::fpu::image;

/// The general registers in the order of their numbers.
const GPR: [R; 16] = [
    R::RAX,
    R::RCX,
    R::RDX,
    R::RBX,
    R::RSP,
    R::RBP,
    R::RSI,
    R::RDI,
    R::R8,
    R::R9,
    R::R10,
    R::R11,
    R::R12,
    R::R13,
    R::R14,
    R::R15,
];
const RSP: usize = 4;
/// What System V callees must preserve.
const CALLEE_SAVED: [R; 6] = [R::RBX, R::RBP, R::R12, R::R13, R::R14, R::R15];
/// Candidates for the state's address. RAX, RCX and RSI are taken by the code around.
const FOR_STATE: [R; 5] = [R::RDI, R::R8, R::R9, R::R10, R::R11];
/// Candidates for the memory operand's address and for RSP's stand-in: none that needs
/// a REX prefix, which instructions on AH to BH cannot have.
const FOR_MEMORY: [R; 5] = [R::RSI, R::RDX, R::RCX, R::RAX, R::RBX];

/// The MXCSR that Rust code runs with, in the state's dead corner.
const HOST_MXCSR: usize = offset_of!(VcpuState, fpu) + image::MXCSR;

/// The machine code for `plan`.
///
/// # Errors
/// [`Refused::NotEncodable`] when 64-bit code has no such instruction.
pub(super) fn stub(plan: &Plan) -> Result<Vec<u8>, Refused> {
    build(plan).map_err(|_| Refused::NotEncodable)?.ok_or(Refused::NotEncodable)
}

fn build(plan: &Plan) -> Result<Option<Vec<u8>>, IcedError> {
    let Some(places) = Places::choose(plan) else { return Ok(None) };
    let mut code = Assembler::new(places.state);
    for register in &places.saved {
        code.emit(Instruction::with1(Code::Push_r64, *register)?)?;
    }
    if plan.flags_in {
        load_flags(&mut code)?;
    }
    // In this order: neither overwrites the other's source (see the candidates).
    if plan.traits.contains(Traits::MEMORY) && places.memory != R::RSI {
        code.emit(Instruction::with2(Code::Mov_r64_rm64, places.memory, R::RSI)?)?;
    }
    if places.state != R::RDI {
        code.emit(Instruction::with2(Code::Mov_r64_rm64, places.state, R::RDI)?)?;
    }
    if plan.traits.contains(Traits::X87) {
        code.emit(Instruction::with1(
            Code::Fxrstor64_m512byte,
            code.at(offset_of!(VcpuState, fpu)),
        )?)?;
    }
    for used in plan.vectors.iter().filter(|used| used.loaded) {
        code.load_vector(plan, used)?;
    }
    if plan.traits.contains(Traits::SIMD_FP) {
        code.emit(Instruction::with1(Code::Ldmxcsr_m32, code.at(offset_of!(VcpuState, mxcsr)))?)?;
    }
    for used in plan.gprs.iter().filter(|used| used.loaded) {
        let from = code.at(gpr_offset(used.index()));
        code.emit(Instruction::with2(Code::Mov_r64_rm64, places.home(used.index()), from)?)?;
    }

    code.emit(places.adapt(&plan.instruction))?;

    for used in plan.gprs.iter().filter(|used| used.written) {
        let to = code.at(gpr_offset(used.index()));
        code.emit(Instruction::with2(Code::Mov_rm64_r64, to, places.home(used.index()))?)?;
    }
    if plan.flags_out != 0 {
        store_flags(&mut code, plan.flags_out as u32)?;
    }
    for used in plan.vectors.iter().filter(|used| used.written) {
        code.store_vector(plan, used)?;
    }
    let host_mxcsr = code.at(HOST_MXCSR);
    if plan.traits.contains(Traits::SIMD_FP) {
        code.emit(Instruction::with1(Code::Stmxcsr_m32, code.at(offset_of!(VcpuState, mxcsr)))?)?;
        code.emit(Instruction::with1(Code::Ldmxcsr_m32, host_mxcsr)?)?;
    }
    if plan.traits.contains(Traits::X87) {
        code.emit(Instruction::with1(
            Code::Fxsave64_m512byte,
            code.at(offset_of!(VcpuState, fpu)),
        )?)?;
        // Rust expects an empty x87 stack, and no exception waiting in it.
        code.emit(Instruction::with(Code::Fninit))?;
    }
    if plan.traits.contains(Traits::AVX) {
        code.emit(Instruction::with(Code::VEX_Vzeroupper))?;
    }
    for register in places.saved.iter().rev() {
        code.emit(Instruction::with1(Code::Pop_r64, *register)?)?;
    }
    code.emit(Instruction::with(Code::Retnq))?;
    Ok(Some(code.finish()))
}

/// Status flags from the state into the host's. SAHF sets all but OF, which is made by
/// an addition that overflows exactly when it should. Uses RAX and RCX.
fn load_flags(code: &mut Assembler) -> Result<(), IcedError> {
    let state = MemoryOperand::with_base_displ(R::RDI, offset_of!(VcpuState, rflags) as i64);
    code.emit(Instruction::with2(Code::Mov_r32_rm32, R::EAX, state)?)?;
    code.emit(Instruction::with2(Code::Mov_r32_rm32, R::ECX, R::EAX)?)?;
    code.emit(Instruction::with2(Code::Shr_rm32_imm8, R::ECX, 11)?)?;
    code.emit(Instruction::with2(Code::And_rm32_imm8, R::ECX, 1)?)?;
    code.emit(Instruction::with2(Code::Mov_r8_rm8, R::AH, R::AL)?)?;
    code.emit(Instruction::with2(Code::Mov_r8_rm8, R::AL, R::CL)?)?;
    code.emit(Instruction::with2(Code::Add_AL_imm8, R::AL, 0x7f)?)?;
    code.emit(Instruction::with(Code::Sahf))
}

/// The host's flags, as far as `mask` goes, into the state. Uses RAX and RCX.
fn store_flags(code: &mut Assembler, mask: u32) -> Result<(), IcedError> {
    let state = code.at(offset_of!(VcpuState, rflags));
    code.emit(Instruction::with(Code::Pushfq))?;
    code.emit(Instruction::with1(Code::Pop_r64, R::RAX)?)?;
    code.emit(Instruction::with2(Code::And_EAX_imm32, R::EAX, mask)?)?;
    code.emit(Instruction::with2(Code::Mov_r32_rm32, R::ECX, state)?)?;
    code.emit(Instruction::with2(Code::And_rm32_imm32, R::ECX, !mask)?)?;
    code.emit(Instruction::with2(Code::Or_r32_rm32, R::EAX, R::ECX)?)?;
    code.emit(Instruction::with2(Code::Mov_rm32_r32, state, R::EAX)?)
}

fn gpr_offset(number: usize) -> usize {
    offset_of!(VcpuState, gpr).wrapping_add((number & 15).wrapping_mul(8))
}

/// Which host register holds what.
struct Places {
    state: R,
    memory: R,
    /// What stands in for RSP.
    stack: R,
    saved: Vec<R>,
}

impl Places {
    fn choose(plan: &Plan) -> Option<Self> {
        let used: Vec<R> =
            plan.gprs.iter().filter_map(|used| GPR.get(used.index()).copied()).collect();
        let state = FOR_STATE.into_iter().find(|r| !used.contains(r))?;
        let memory = FOR_MEMORY.into_iter().find(|r| !used.contains(r))?;
        let stack = FOR_MEMORY.into_iter().find(|r| !used.contains(r) && *r != memory);
        let stack = if used.contains(&R::RSP) { stack? } else { R::RSP };
        let ours =
            |r: &R| used.contains(r) || *r == memory || *r == stack && used.contains(&R::RSP);
        let saved = CALLEE_SAVED.into_iter().filter(ours).collect();
        Some(Self { state, memory, stack, saved })
    }

    /// The host register that holds guest register `number` in the stub.
    fn home(&self, number: usize) -> R {
        if number == RSP { self.stack } else { GPR.get(number).copied().unwrap_or(self.stack) }
    }

    /// The instruction with our registers in place of its memory operand and of RSP.
    fn adapt(&self, instruction: &Instruction) -> Instruction {
        let mut it = *instruction;
        if super::classify::has_memory(&it) {
            it.set_memory_base(self.memory);
        }
        for operand in 0..it.op_count() {
            let register = it.try_op_register(operand).unwrap_or(R::None);
            if register.is_gpr() && register.full_register() == R::RSP {
                let stand_in = match register {
                    R::RSP => self.stack,
                    R::ESP => self.stack.full_register32(),
                    R::SP => part(self.stack, R::AX),
                    _ => part(self.stack, R::AL),
                };
                // Fails only for operands that do not exist.
                let _ = it.try_set_op_register(operand, stand_in);
            }
        }
        it
    }
}

/// The 16- or 8-bit part of `full`, one of [`FOR_MEMORY`], of the width `like` has.
fn part(full: R, like: R) -> R {
    match (full, like) {
        (R::RSI, R::AX) => R::SI,
        (R::RDX, R::AX) => R::DX,
        (R::RCX, R::AX) => R::CX,
        (R::RBX, R::AX) => R::BX,
        (_, R::AX) => R::AX,
        (R::RSI, _) => R::SIL,
        (R::RDX, _) => R::DL,
        (R::RCX, _) => R::CL,
        (R::RBX, _) => R::BL,
        _ => R::AL,
    }
}

struct Assembler {
    encoder: Encoder,
    state: R,
}

impl Assembler {
    fn new(state: R) -> Self {
        Self { encoder: Encoder::new(64), state }
    }

    fn at(&self, offset: usize) -> MemoryOperand {
        MemoryOperand::with_base_displ(self.state, offset as i64)
    }

    fn emit(&mut self, instruction: Instruction) -> Result<(), IcedError> {
        // Nothing in a stub is relative to where it lies.
        self.encoder.encode(&instruction, 0).map(|_| ())
    }

    /// Legacy SSE touches the lower half only, and the upper one stays in the state. VEX
    /// code of 128 bits reads no upper halves either.
    fn load_vector(&mut self, plan: &Plan, used: &Use) -> Result<(), IcedError> {
        let from = self.vector(used.index());
        let load = match (plan.traits.contains(Traits::AVX), plan.wide) {
            (false, _) => Instruction::with2(Code::Movaps_xmm_xmmm128, xmm(used.index()), from),
            (true, false) => {
                Instruction::with2(Code::VEX_Vmovaps_xmm_xmmm128, xmm(used.index()), from)
            }
            (true, true) => {
                Instruction::with2(Code::VEX_Vmovaps_ymm_ymmm256, ymm(used.index()), from)
            }
        };
        self.emit(load?)
    }

    /// VEX code clears what it does not write: the whole register is stored.
    fn store_vector(&mut self, plan: &Plan, used: &Use) -> Result<(), IcedError> {
        let to = self.vector(used.index());
        let store = if plan.traits.contains(Traits::AVX) {
            Instruction::with2(Code::VEX_Vmovaps_ymmm256_ymm, to, ymm(used.index()))
        } else {
            Instruction::with2(Code::Movaps_xmmm128_xmm, to, xmm(used.index()))
        };
        self.emit(store?)
    }

    fn vector(&self, number: usize) -> MemoryOperand {
        self.at(offset_of!(VcpuState, vec).wrapping_add((number & 15).wrapping_mul(32)))
    }

    fn finish(mut self) -> Vec<u8> {
        self.encoder.take_buffer()
    }
}

#[allow(clippy::arithmetic_side_effects, reason = "sixteen registers follow one another")]
fn xmm(number: usize) -> R {
    R::XMM0 + (number & 15) as u32
}

#[allow(clippy::arithmetic_side_effects, reason = "sixteen registers follow one another")]
fn ymm(number: usize) -> R {
    R::YMM0 + (number & 15) as u32
}
