//! Where the guest's status flags are, and how to have them again.
//!
//! A TLB check destroys the host's flags, and a fault wants the guest's exactly. Keeping them
//! takes three instructions. But most can be had again from registers by one: `cmp` once more,
//! `test` of what `and` has left, `cmp` of what a subtraction started from. So flags that a
//! check destroys are usually not kept but *deferred*: what goes to the interpreter makes
//! them first, and the fast path does not pay.

use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic as M, OpKind, Register as R};

use super::assembler::{Assembler, NotCopied};
use super::fields;
use super::registers::{GprSet, Home, Homes, VALUE, is_high_byte, part, whole};
use super::trace::Trace;

/// Where the guest's status flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flags {
    /// In the context only.
    Context,
    /// In the host's flags only.
    Host,
    /// In both.
    Both,
    /// Nowhere: the [`Producer`] makes them.
    Deferred,
    /// Nowhere, and nobody will ask before they are made anew.
    Dead,
}

/// How to make the flags again, from registers that still have their values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Producer {
    /// The step of the trace that made them, whose instruction has named operands.
    step: u16,
    kind: Kind,
    /// Where guest registers were for it.
    homes: Homes,
    /// Guest registers it reads.
    pub(super) reads: GprSet,
}

impl Producer {
    /// What makes the flags of `it` again, the instruction of step number `step` in its form with
    /// named operands, once it has run, as long as guest registers are in `homes`.
    pub(super) fn of(it: &Instruction, step: usize, homes: Homes) -> Option<Self> {
        let kind = Kind::of(it.code())?;
        let step = u16::try_from(step).ok()?;
        let mut reads = GprSet::NONE;
        let mut in_memory = 0_u32;
        let operands = if kind == Kind::Logic { 1 } else { it.op_count() };
        for n in 0..operands {
            match it.op_kind(n) {
                OpKind::Register => {
                    let number = named(it, n)?.full_register().number() as u8 & 15;
                    let new = !reads.has(number);
                    // What a sum is of must be told apart, to undo it.
                    if !new && matches!(kind, Kind::Sum { .. }) {
                        return None;
                    }
                    reads = reads.or(GprSet::of(number));
                    let loaded = new && homes.of(number) == Home::Memory;
                    in_memory = in_memory.saturating_add(loaded.into());
                }
                OpKind::Memory => return None,
                _ => {}
            }
        }
        let registers = reads.count();
        let possible = match kind {
            Kind::Compare => in_memory <= 1,
            Kind::Logic => true,
            Kind::Sum { subtracts } => {
                // The negative of the smallest number is none of 32 bits.
                let undone = subtracts || it.try_immediate(1).is_ok_and(|by| by as i32 != i32::MIN);
                it.op0_register().size() >= 4 && if registers < 2 { undone } else { in_memory == 0 }
            }
        };
        possible.then_some(Self { step, kind, homes, reads })
    }

    /// Writes the instructions that make them in `trace`, which use [`VALUE`] and nothing else.
    ///
    /// # Errors
    /// As [`Assembler::emit`].
    pub(super) fn write(&self, code: &mut Assembler, trace: &Trace) -> Result<(), NotCopied> {
        let step = trace.steps.get(usize::from(self.step)).ok_or(NotCopied)?;
        let again = self.again(&step.instruction).ok_or(NotCopied)?;
        again.iter().flatten().try_for_each(|one| code.emit(one))
    }

    fn again(&self, it: &Instruction) -> Option<[Option<Instruction>; 3]> {
        let mut operands = Operands { homes: self.homes, loads: None, reads: GprSet::NONE };
        let subtracts = match self.kind {
            Kind::Compare => {
                let again = operands.as_it_was(it)?;
                return Some([operands.loads, Some(again), None]);
            }
            Kind::Logic => {
                let register = named(it, 0)?;
                let to = operands.host(register)?;
                let code = match register.size() {
                    8 => Code::Test_rm64_r64,
                    4 => Code::Test_rm32_r32,
                    2 => Code::Test_rm16_r16,
                    _ => Code::Test_rm8_r8,
                };
                let test = Instruction::with2(code, to, to).ok()?;
                return Some([operands.loads, Some(test), None]);
            }
            Kind::Sum { subtracts } => subtracts,
        };
        let register = named(it, 0)?;
        let to = operands.host(register)?;
        let scratch = part(VALUE, register);
        let wide = register.size() == 8;
        if it.op1_kind() == OpKind::Register {
            let from = operands.host(named(it, 1)?)?;
            if subtracts {
                let (base, index) = (to.full_register(), from.full_register());
                let sum = MemoryOperand::new(base, index, 1, 0, 0, false, R::None);
                let code = if wide { Code::Cmp_r64_rm64 } else { Code::Cmp_r32_rm32 };
                return Some([
                    Some(Instruction::with2(Code::Lea_r64_m, VALUE, sum).ok()?),
                    Some(Instruction::with2(code, scratch, from).ok()?),
                    None,
                ]);
            }
            let (sub, add) = if wide {
                (Code::Sub_r64_rm64, Code::Add_r64_rm64)
            } else {
                (Code::Sub_r32_rm32, Code::Add_r32_rm32)
            };
            let copy = Instruction::with2(Code::Mov_r64_rm64, VALUE, to.full_register());
            return Some([
                Some(copy.ok()?),
                Some(Instruction::with2(sub, scratch, from).ok()?),
                Some(Instruction::with2(add, scratch, from).ok()?),
            ]);
        }
        let value = it.try_immediate(1).ok()? as i32;
        let back = if subtracts { value } else { value.wrapping_neg() };
        let before = MemoryOperand::with_base_displ_size(to.full_register(), back.into(), 1);
        let before = Instruction::with2(Code::Lea_r64_m, VALUE, before).ok()?;
        let code = match (subtracts, wide) {
            (true, true) => Code::Cmp_rm64_imm32,
            (true, false) => Code::Cmp_rm32_imm32,
            (false, true) => Code::Add_rm64_imm32,
            (false, false) => Code::Add_rm32_imm32,
        };
        let again = Instruction::with2(code, scratch, value).ok()?;
        Some([operands.loads, Some(before), Some(again)])
    }
}

/// How the flags of an instruction can be had again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// By running it again: it changes nothing else.
    Compare,
    /// They say everything of its result and nothing else.
    Logic,
    /// By undoing it first.
    Sum { subtracts: bool },
}

impl Kind {
    fn of(code: Code) -> Option<Self> {
        match code.mnemonic() {
            M::Cmp | M::Test => Some(Self::Compare),
            M::And | M::Or | M::Xor => Some(Self::Logic),
            M::Add => Some(Self::Sum { subtracts: false }),
            M::Sub => Some(Self::Sum { subtracts: true }),
            _ => None,
        }
    }
}

/// Operand `n`, if it is a register that has no high byte.
fn named(it: &Instruction, n: u32) -> Option<R> {
    (it.op_kind(n) == OpKind::Register)
        .then(|| it.op_register(n))
        .filter(|register| register.is_gpr() && !is_high_byte(*register))
}

/// Guest registers on their way to host registers.
struct Operands {
    homes: Homes,
    /// Loads the one that is kept in memory.
    loads: Option<Instruction>,
    reads: GprSet,
}

impl Operands {
    /// Where guest register `register` is for the instructions to come.
    fn host(&mut self, register: R) -> Option<R> {
        let number = register.full_register().number() as u8 & 15;
        let first = !self.reads.has(number);
        self.reads = self.reads.or(GprSet::of(number));
        match self.homes.of(number) {
            Home::Host(host) => Some(part(host, register)),
            // There is one scratch register only.
            Home::Memory if first && self.loads.is_some() => None,
            Home::Memory => {
                let at = i64::from(fields::gpr(number).0);
                let from = MemoryOperand::new(R::None, R::None, 1, at, 8, false, R::GS);
                self.loads = Instruction::with2(Code::Mov_r64_rm64, VALUE, from).ok();
                Some(part(whole(0), register))
            }
        }
    }

    /// `it` with its registers where they are.
    fn as_it_was(&mut self, it: &Instruction) -> Option<Instruction> {
        let mut again = *it;
        for n in 0..it.op_count() {
            match it.op_kind(n) {
                OpKind::Register => {
                    let host = self.host(named(it, n)?)?;
                    again.try_set_op_register(n, host).ok()?;
                }
                OpKind::Memory => return None,
                _ => {}
            }
        }
        Some(again)
    }
}
