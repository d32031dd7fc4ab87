//! Copies instructions as they are, but for where their operands are.
//!
//! Register operands are renamed to the guest registers' homes; a memory operand becomes
//! the host address that the TLB check left. What does not fit (operands in AH beside new
//! registers, two operands kept in memory beside a third) is refused, and interpreted.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic as M, OpKind, Register as R};

use smallvec::SmallVec;

use super::access::Access;
use super::assembler::NotCopied;
use super::block::Block;
use super::context::{AVX, SSE};
use super::fields;
use super::flags::Producer;
use super::registers::{ACCUMULATOR, ADDRESS, Home, Homes, VALUE, is_high_byte, part};
use crate::decode::op::Op;
use crate::native::features::FeatureSet;
use crate::native::{Plan, Traits, is_hint, is_special, plan, without_prefix};
use crate::state::rflags::RFlags;

/// RAX's number.
const RAX: usize = 0;

/// What copying needs to know besides the instruction.
pub(super) struct Copier<'a> {
    pub(super) features: &'a FeatureSet,
    pub(super) factory: &'a mut InstructionInfoFactory,
}

impl Copier<'_> {
    /// How `instruction` is copied.
    ///
    /// # Errors
    /// It must be interpreted.
    pub(super) fn plan(&mut self, instruction: &Instruction) -> Result<Plan, NotCopied> {
        let mut it = *instruction;
        it.set_code(without_prefix(it.code(), self.features));
        it.set_code(general_form(it.code()));
        if it.code() == Code::Xchg_r64_RAX || it.code() == Code::Xchg_r32_EAX {
            return Err(NotCopied);
        }
        if is_special(&it, self.features) {
            return Err(NotCopied);
        }
        let plan = plan(&it, self.features, self.factory).map_err(|_| NotCopied)?;
        if plan.traits.contains(Traits::X87) {
            return Err(NotCopied);
        }
        Ok(plan)
    }
}

/// What of the vector unit `instruction` uses, if it is copied as `plan` has it.
pub(super) fn vector_need(instruction: &Instruction, plan: &Option<Plan>) -> u8 {
    match plan {
        _ if instruction.code() == Code::VEX_Vzeroupper => SSE | AVX,
        Some(plan) if plan.traits.contains(Traits::AVX) => SSE | AVX,
        Some(plan) if plan.traits.contains(Traits::SSE) => SSE,
        _ => 0,
    }
}

/// Whether `instruction` does nothing a guest can see.
pub(super) fn is_nothing(instruction: &Instruction) -> bool {
    is_hint(instruction) && instruction.mnemonic() != M::Pause
}

/// What copying an instruction does to flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FlagUse {
    /// It reads some.
    pub(super) reads: bool,
    /// It changes some.
    pub(super) changes: bool,
    /// It leaves some alone.
    pub(super) leaves: bool,
}

impl FlagUse {
    pub(super) fn of(plan: &Plan) -> Self {
        let status = RFlags::STATUS.bits();
        let leaves = plan.flags_out & status != status;
        let reads = plan.flags_in && !overwrites_flags(&plan.instruction);
        Self { reads, changes: plan.flags_out != 0, leaves }
    }
}

/// Copies an instruction into `block` as `plan` has it.
///
/// # Errors
/// It must be interpreted. `block` may then hold part of it.
pub(super) fn copy(block: &mut Block<'_>, plan: &Plan, op: &Op) -> Result<(), NotCopied> {
    let memory = plan.traits.contains(Traits::MEMORY);
    let Renamed { mut instruction, temporaries, accumulator } =
        rename(plan, memory, block.code.homes)?;
    if memory {
        let access = Access {
            len: u8::try_from(plan.size).map_err(|_| NotCopied)?,
            stores: plan.traits.contains(Traits::STORES),
            align_mask: u8::try_from(plan.alignment.saturating_sub(1)).map_err(|_| NotCopied)?,
        };
        block.check(op, op, access)?.give_to(&mut instruction);
    }
    let flags = FlagUse::of(plan);
    // What changes some of them, and none is wanted again, need not find the others.
    let passes_on = flags.changes && flags.leaves && block.wants_flags_later();
    let finds = flags.reads || passes_on;
    if finds {
        block.want_flags()?;
    }
    if finds || !flags.changes {
        block.overwrite(written(plan))?;
    }
    if accumulator {
        block.code.copy(VALUE, ACCUMULATOR);
    }
    if temporaries.iter().any(|temporary| temporary.host == ADDRESS) {
        block.in_address = None;
    }
    for temporary in &temporaries {
        if temporary.loaded {
            block.code.load(temporary.host, fields::gpr(temporary.guest));
        }
    }
    block.code.emit(&instruction)?;
    for temporary in &temporaries {
        if temporary.written {
            block.code.store(fields::gpr(temporary.guest), temporary.host);
        }
    }
    if accumulator {
        block.code.copy(ACCUMULATOR, VALUE);
    }
    if flags.changes && flags.leaves && !passes_on {
        block.unmade_flags();
    } else if flags.changes {
        let again = |()| Producer::of(&plan.instruction, block.code.homes);
        block.made_flags((!finds).then_some(()).and_then(again));
    }
    if memory {
        block.resume_here();
    }
    Ok(())
}

/// The guest registers that an instruction changes, a bit each.
pub(super) fn written(plan: &Plan) -> u16 {
    let bit = |number: usize| 1_u16.checked_shl(number as u32).unwrap_or(0);
    plan.gprs.iter().filter(|used| used.written).fold(0, |all, used| all | bit(used.number))
}

/// Instructions whose flags do not depend on earlier ones: logic clears AF on every CPU,
/// whatever the manuals say, and shifts set or clear all of them; what multiplications and scans
/// leave undefined is anybody's.
fn overwrites_flags(it: &Instruction) -> bool {
    match it.mnemonic() {
        M::And | M::Or | M::Xor | M::Test | M::Mul | M::Imul | M::Bsf | M::Bsr => true,
        M::Andn | M::Blsr | M::Blsi | M::Blsmsk | M::Bzhi | M::Bextr => true,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd => {
            let last = it.op_count().saturating_sub(1);
            let wide = it.op0_register().size() == 8 || it.memory_size().size() == 8;
            // Not at all, if the count is none.
            it.try_immediate(last).is_ok_and(|count| count & if wide { 63 } else { 31 } != 0)
        }
        _ => false,
    }
}

/// A guest register that is kept in memory, in a scratch register for one instruction.
struct Temporary {
    guest: u8,
    host: R,
    loaded: bool,
    written: bool,
}

struct Renamed {
    instruction: Instruction,
    temporaries: SmallVec<[Temporary; 2]>,
    /// RAX is an implied operand: it must be the guest's.
    accumulator: bool,
}

fn rename(plan: &Plan, memory: bool, homes: Homes) -> Result<Renamed, NotCopied> {
    let mut it = plan.instruction;
    let registers: SmallVec<[(u32, R); 4]> = (0..it.op_count())
        .filter(|n| it.op_kind(*n) == OpKind::Register)
        .map(|n| (n, it.op_register(n)))
        .filter(|(_, register)| register.is_gpr())
        .collect();
    let named = |number: usize| registers.iter().any(|(_, r)| r.full_register().number() == number);
    let accumulator = plan.gprs.iter().any(|used| used.number == RAX) && !named(RAX)
        || registers.iter().any(|(_, r)| *r == R::AH)
        || matches!(it.mnemonic(), M::Cmpxchg | M::Mul)
        || it.mnemonic() == M::Imul && it.op_count() == 1;
    let mut free: SmallVec<[R; 2]> = SmallVec::new();
    if !accumulator {
        free.push(VALUE);
    }
    if !memory {
        free.push(ADDRESS);
    }
    let mut temporaries: SmallVec<[Temporary; 2]> = SmallVec::new();
    for used in &plan.gprs {
        let guest = u8::try_from(used.number).map_err(|_| NotCopied)?;
        if homes.of(guest) == Home::Memory {
            let host = free.pop().ok_or(NotCopied)?;
            let loaded = used.loaded;
            temporaries.push(Temporary { guest, host, loaded, written: used.written });
        }
    }
    for (n, register) in registers {
        let number = register.full_register().number() as u8;
        if is_high_byte(register) {
            // The encoder refuses it beside what needs a REX prefix.
            continue;
        }
        let host = match homes.of(number) {
            // Both AL and AH, or an implied RAX: all of them stay in RAX.
            Home::Host(_) if number == 0 && accumulator => R::RAX,
            Home::Host(host) => host,
            Home::Memory => temporaries.iter().find(|t| t.guest == number).ok_or(NotCopied)?.host,
        };
        it.try_set_op_register(n, part(host, register)).map_err(|_| NotCopied)?;
    }
    Ok(Renamed { instruction: it, temporaries, accumulator })
}

/// Forms with RAX built in, as forms that name their register; forms with an address built in,
/// as forms that may have any operand.
fn general_form(code: Code) -> Code {
    match code {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        Code::Add_AL_imm8 => Code::Add_rm8_imm8,
        Code::Add_AX_imm16 => Code::Add_rm16_imm16,
        Code::Add_EAX_imm32 => Code::Add_rm32_imm32,
        Code::Add_RAX_imm32 => Code::Add_rm64_imm32,
        Code::Or_AL_imm8 => Code::Or_rm8_imm8,
        Code::Or_AX_imm16 => Code::Or_rm16_imm16,
        Code::Or_EAX_imm32 => Code::Or_rm32_imm32,
        Code::Or_RAX_imm32 => Code::Or_rm64_imm32,
        Code::Adc_AL_imm8 => Code::Adc_rm8_imm8,
        Code::Adc_AX_imm16 => Code::Adc_rm16_imm16,
        Code::Adc_EAX_imm32 => Code::Adc_rm32_imm32,
        Code::Adc_RAX_imm32 => Code::Adc_rm64_imm32,
        Code::Sbb_AL_imm8 => Code::Sbb_rm8_imm8,
        Code::Sbb_AX_imm16 => Code::Sbb_rm16_imm16,
        Code::Sbb_EAX_imm32 => Code::Sbb_rm32_imm32,
        Code::Sbb_RAX_imm32 => Code::Sbb_rm64_imm32,
        Code::And_AL_imm8 => Code::And_rm8_imm8,
        Code::And_AX_imm16 => Code::And_rm16_imm16,
        Code::And_EAX_imm32 => Code::And_rm32_imm32,
        Code::And_RAX_imm32 => Code::And_rm64_imm32,
        Code::Sub_AL_imm8 => Code::Sub_rm8_imm8,
        Code::Sub_AX_imm16 => Code::Sub_rm16_imm16,
        Code::Sub_EAX_imm32 => Code::Sub_rm32_imm32,
        Code::Sub_RAX_imm32 => Code::Sub_rm64_imm32,
        Code::Xor_AL_imm8 => Code::Xor_rm8_imm8,
        Code::Xor_AX_imm16 => Code::Xor_rm16_imm16,
        Code::Xor_EAX_imm32 => Code::Xor_rm32_imm32,
        Code::Xor_RAX_imm32 => Code::Xor_rm64_imm32,
        Code::Cmp_AL_imm8 => Code::Cmp_rm8_imm8,
        Code::Cmp_AX_imm16 => Code::Cmp_rm16_imm16,
        Code::Cmp_EAX_imm32 => Code::Cmp_rm32_imm32,
        Code::Cmp_RAX_imm32 => Code::Cmp_rm64_imm32,
        Code::Test_AL_imm8 => Code::Test_rm8_imm8,
        Code::Test_AX_imm16 => Code::Test_rm16_imm16,
        Code::Test_EAX_imm32 => Code::Test_rm32_imm32,
        Code::Test_RAX_imm32 => Code::Test_rm64_imm32,
        other => other,
    }
}

/// The condition of a Jcc, as its opcode has it.
pub(super) fn condition(instruction: &Instruction) -> Result<u8, NotCopied> {
    use iced_x86::ConditionCode as C;
    Ok(match instruction.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
        C::None => return Err(NotCopied),
    })
}
