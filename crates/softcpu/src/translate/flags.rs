//! Where the guest's status flags are, and how to have them again.
//!
//! A TLB check destroys the host's flags, and a fault wants the guest's exactly. Keeping them
//! takes three instructions. But most can be had again from registers by one: `cmp` once more,
//! `test` of what `and` has left, `cmp` of what a subtraction started from. So flags that a
//! check destroys are usually not kept but *deferred*: what goes to the interpreter makes
//! them first, and the fast path does not pay.

use iced_x86::{Code, Instruction, MemoryOperand, OpKind, Register as R};

use super::fields;
use super::registers::{Home, Homes, VALUE, is_high_byte, part, whole};

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

/// Instructions that make the flags again, from registers that still have their values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Producer {
    steps: [Option<Instruction>; 3],
    /// Guest registers it reads, a bit each.
    pub(super) reads: u16,
}

impl Producer {
    /// The instructions. They use [`VALUE`] and nothing else.
    pub(super) fn steps(&self) -> impl Iterator<Item = &Instruction> {
        self.steps.iter().flatten()
    }

    /// What makes the flags of `it` again, which is a guest's instruction in its form with
    /// named operands, once it has run, as long as guest registers are in `homes`.
    pub(super) fn of(it: &Instruction, homes: Homes) -> Option<Self> {
        let mut operands = Operands { homes, loads: None, reads: 0 };
        match general(it.code())? {
            Kind::Compare => {
                let steps = operands.as_it_was(it)?;
                Some(Self { steps: [operands.loads, Some(steps), None], reads: operands.reads })
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
                Some(Self { steps: [operands.loads, Some(test), None], reads: operands.reads })
            }
            Kind::Sum { subtracts } => {
                let register = named(it, 0).filter(|register| register.size() >= 4)?;
                let to = operands.host(register)?;
                let scratch = part(VALUE, register);
                let wide = register.size() == 8;
                if it.op1_kind() == OpKind::Register {
                    let second = named(it, 1)?;
                    let from = operands.host(second)?;
                    if to == from || operands.loads.is_some() {
                        return None;
                    }
                    let sum = MemoryOperand::new(
                        to.full_register(),
                        from.full_register(),
                        1,
                        0,
                        0,
                        false,
                        R::None,
                    );
                    let steps = if subtracts {
                        let code = if wide { Code::Cmp_r64_rm64 } else { Code::Cmp_r32_rm32 };
                        [
                            Some(Instruction::with2(Code::Lea_r64_m, VALUE, sum).ok()?),
                            Some(Instruction::with2(code, scratch, from).ok()?),
                            None,
                        ]
                    } else {
                        let (sub, add) = if wide {
                            (Code::Sub_r64_rm64, Code::Add_r64_rm64)
                        } else {
                            (Code::Sub_r32_rm32, Code::Add_r32_rm32)
                        };
                        let copy =
                            Instruction::with2(Code::Mov_r64_rm64, VALUE, to.full_register());
                        [
                            Some(copy.ok()?),
                            Some(Instruction::with2(sub, scratch, from).ok()?),
                            Some(Instruction::with2(add, scratch, from).ok()?),
                        ]
                    };
                    return Some(Self { steps, reads: operands.reads });
                }
                let value = it.try_immediate(1).ok()? as i32;
                let back =
                    if subtracts { i64::from(value) } else { i64::from(value).checked_neg()? };
                i32::try_from(back).ok()?;
                let before = MemoryOperand::with_base_displ_size(to.full_register(), back, 1);
                let before = Instruction::with2(Code::Lea_r64_m, VALUE, before).ok()?;
                let code = match (subtracts, wide) {
                    (true, true) => Code::Cmp_rm64_imm32,
                    (true, false) => Code::Cmp_rm32_imm32,
                    (false, true) => Code::Add_rm64_imm32,
                    (false, false) => Code::Add_rm32_imm32,
                };
                let again = Instruction::with2(code, scratch, value).ok()?;
                let steps = [operands.loads, Some(before), Some(again)];
                Some(Self { steps, reads: operands.reads })
            }
        }
    }
}

/// How the flags of an instruction can be had again.
enum Kind {
    /// By running it again: it changes nothing else.
    Compare,
    /// They say everything of its result and nothing else.
    Logic,
    /// By undoing it first.
    Sum { subtracts: bool },
}

fn general(code: Code) -> Option<Kind> {
    use iced_x86::Mnemonic as M;
    match code.mnemonic() {
        M::Cmp | M::Test => Some(Kind::Compare),
        M::And | M::Or | M::Xor => Some(Kind::Logic),
        M::Add => Some(Kind::Sum { subtracts: false }),
        M::Sub => Some(Kind::Sum { subtracts: true }),
        _ => None,
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
    reads: u16,
}

impl Operands {
    /// Where guest register `register` is for the instructions to come.
    fn host(&mut self, register: R) -> Option<R> {
        let number = register.full_register().number() as u8 & 15;
        let first = self.reads & 1 << number == 0;
        self.reads |= 1 << number;
        match self.homes.of(number) {
            Home::Host(host) => Some(part(host, register)),
            // There is one scratch register only.
            Home::Memory if first && self.loads.is_some() => None,
            Home::Memory => {
                let at = i64::from(fields::gpr(number).0);
                let from = MemoryOperand::new(R::None, R::None, 1, at, 4, false, R::GS);
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
