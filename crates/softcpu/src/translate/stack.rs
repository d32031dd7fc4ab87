//! Instructions that work on the guest's stack and do nothing else.

use iced_x86::{Code, Instruction, OpKind, Register as R};

use super::access::{Access, Place};
use super::assembler::NotCopied;
use super::block::Block;
use super::cold::Cold;
use super::fields;
use super::mode::Mode;
use super::registers::{GprSet, Home, STACK, VALUE, of_word};
use super::shapes::How;
use super::sharing::Share;
use super::trace::{Step, Then};
use crate::decode::op::{Op, OpFlags};
use crate::state::segment::SegReg;
use crate::state::{GPR_ZERO, SEG_FLAT};

/// RSP's number.
pub(super) const RSP: u8 = 4;
pub(super) const RBP: u8 = 5;

/// What an instruction does on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StackUse {
    /// Pushes a register or a constant.
    Push,
    /// Pushes a word of memory.
    PushMemory,
    /// Pops a register.
    Pop,
    /// `leave`
    Leave,
    /// A direct call.
    Call,
    /// A return.
    Return,
}

impl StackUse {
    /// What `instruction` does, and the size of the word that it does it with.
    pub(super) fn of(instruction: &Instruction) -> Option<(Self, u8)> {
        let memory = instruction.op0_kind() == OpKind::Memory;
        Some(match instruction.code() {
            Code::Push_rm64 if memory => (Self::PushMemory, 8),
            Code::Push_rm32 if memory => (Self::PushMemory, 4),
            Code::Push_rm16 if memory => (Self::PushMemory, 2),
            Code::Push_rm64 | Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 => {
                (Self::Push, 8)
            }
            Code::Push_rm32 | Code::Push_r32 | Code::Pushd_imm8 | Code::Pushd_imm32 => {
                (Self::Push, 4)
            }
            Code::Push_rm16 | Code::Push_r16 | Code::Pushw_imm8 | Code::Push_imm16 => {
                (Self::Push, 2)
            }
            Code::Pop_r64 => (Self::Pop, 8),
            Code::Pop_r32 => (Self::Pop, 4),
            Code::Pop_r16 => (Self::Pop, 2),
            Code::Leaveq => (Self::Leave, 8),
            Code::Leaved => (Self::Leave, 4),
            Code::Leavew => (Self::Leave, 2),
            Code::Call_rel32_64 => (Self::Call, 8),
            Code::Call_rel32_32 => (Self::Call, 4),
            Code::Call_rel16 => (Self::Call, 2),
            Code::Retnq | Code::Retnq_imm16 => (Self::Return, 8),
            Code::Retnd | Code::Retnd_imm16 => (Self::Return, 4),
            Code::Retnw | Code::Retnw_imm16 => (Self::Return, 2),
            _ => return None,
        })
    }
}

/// How far a word that is pushed is from where the stack pointer was.
pub(super) fn down(word: u8) -> i64 {
    i64::from(word).wrapping_neg()
}

/// The word at `displacement` from `register`, as what `op` does on the stack addresses it.
pub(super) fn stack_operand(mode: Mode, op: &Op, register: u8, displacement: i64) -> Op {
    let legacy = op.flags.contains(OpFlags::LEGACY);
    mode.operand(&Op {
        base: register,
        index: GPR_ZERO,
        disp: displacement as u64,
        addr_mask: match mode.pointer() {
            8 => u64::MAX,
            4 => 0xffff_ffff,
            _ => 0xffff,
        },
        seg: if legacy { SegReg::Ss as u8 } else { SEG_FLAT },
        ..*op
    })
}

impl Block<'_> {
    /// Does what `instruction` does on the stack, which is `what` with words of `word` bytes.
    pub(super) fn stack(
        &mut self,
        instruction: &Instruction,
        op: &Op,
        what: StackUse,
        word: u8,
    ) -> Result<(), NotCopied> {
        match what {
            StackUse::Push => self.push(instruction, op, word),
            StackUse::PushMemory => self.push_memory(op, word),
            StackUse::Pop => self.pop(op, instruction.op0_register().number() as u8, word),
            StackUse::Leave => self.leave(op, word),
            StackUse::Call | StackUse::Return => Err(NotCopied),
        }
    }

    fn push(&mut self, instruction: &Instruction, op: &Op, word: u8) -> Result<(), NotCopied> {
        let to = stack_operand(self.mode, op, RSP, down(word));
        let place = self.check(op, &to, Access::store(word))?;
        let from = if instruction.op0_kind() == OpKind::Register {
            let number = instruction.op0_register().number() as u8;
            match self.code.homes.of(number) {
                Home::Host(host) => host,
                Home::Memory => {
                    self.code.fetch(VALUE, number);
                    VALUE
                }
            }
        } else {
            self.code.constant(VALUE, instruction.immediate(0));
            VALUE
        };
        self.code.store_at(place, of_word(from, word))?;
        self.overwrite(GprSet::of(RSP))?;
        self.move_stack_or_wait(down(word))?;
        self.resume_here();
        Ok(())
    }

    /// Two accesses, and the interpreter does both where one of them is not in place.
    fn push_memory(&mut self, op: &Op, word: u8) -> Result<(), NotCopied> {
        let to = stack_operand(self.mode, op, RSP, down(word));
        self.lose_flags()?;
        let resume = self.code.label();
        let kept = self.keep(op);
        let slow = self.apart(Cold::Interpret { op: kept, resume, to_host: false, again: None });
        self.in_address = None;
        let from = self.code.check(&self.mode.operand(op), Access::load(word), slow)?;
        self.load_word(from, word)?;
        self.code.store(fields::SPARE, VALUE);
        let place = self.code.check(&to, Access::store(word), slow)?;
        self.code.load(VALUE, fields::SPARE);
        self.code.store_at(place, of_word(VALUE, word))?;
        self.overwrite(GprSet::of(RSP))?;
        self.move_stack(down(word))?;
        self.resume_here();
        Ok(())
    }

    fn pop(&mut self, op: &Op, register: u8, word: u8) -> Result<(), NotCopied> {
        let from = stack_operand(self.mode, op, RSP, 0);
        let place = self.check(op, &from, Access::load(word))?;
        self.overwrite(GprSet::of(RSP).or(GprSet::of(register)))?;
        match self.code.homes.of(register) {
            Home::Host(host) if host != STACK => self.code.load_at(of_word(host, word), place)?,
            // The rest of the register would have to stay.
            _ if word == 2 => return Err(NotCopied),
            _ => self.code.load_at(of_word(VALUE, word), place)?,
        }
        self.move_stack_or_wait(i64::from(word))?;
        if register == RSP || self.code.homes.of(register) == Home::Memory {
            self.code.put(register, VALUE);
        }
        self.resume_here();
        Ok(())
    }

    fn leave(&mut self, op: &Op, word: u8) -> Result<(), NotCopied> {
        let from = stack_operand(self.mode, op, RBP, 0);
        let place = self.check(op, &from, Access::load(word))?;
        self.overwrite(GprSet::of(RSP).or(GprSet::of(RBP)))?;
        let stack = of_word(STACK, self.mode.pointer());
        self.code.lea(stack, R::RBP, R::None, 1, i64::from(word))?;
        self.code.load_at(of_word(R::RBP, word), place)?;
        self.resume_here();
        Ok(())
    }

    /// Whether the stack pointer's last moves may still be made behind `step`, which works on
    /// the stack where others have checked it, or does not have to do with it. Pushes in a row,
    /// and what comes between them, then have one move for all; nobody sees the others, as
    /// nothing here can fault or leave.
    pub(super) fn may_wait_with_stack(&self, step: &Step, op: &Op) -> bool {
        if step.then != Then::Next || self.heads.has(op.rip) {
            return false;
        }
        match &step.shape.how {
            How::Stack(StackUse::Push | StackUse::Pop, _) => {
                let share = self.share_of(self.step);
                let first = step.instruction.op0_register();
                matches!(share, Share::Follows { mirrored: false, .. })
                    && first.full_register() != R::RSP
            }
            How::Copied(copying) => copying.access.is_none() && !copying.gprs.has(RSP),
            How::Lea => {
                let to = step.instruction.op0_register().full_register();
                op.base != RSP && op.index != RSP && to != R::RSP
            }
            How::Nothing => true,
            _ => false,
        }
    }

    /// The stack pointer moves by `by`, if need be now.
    fn move_stack_or_wait(&mut self, by: i64) -> Result<(), NotCopied> {
        if self.stack_waits {
            self.stack_moves = self.stack_moves.wrapping_add(by);
            return Ok(());
        }
        self.move_stack(by)
    }

    /// The stack pointer makes the moves that have waited.
    pub(super) fn move_stack_at_last(&mut self) -> Result<(), NotCopied> {
        match std::mem::take(&mut self.stack_moves) {
            0 => Ok(()),
            by => self.move_stack(by),
        }
    }

    /// The stack pointer moves by `by`.
    pub(super) fn move_stack(&mut self, by: i64) -> Result<(), NotCopied> {
        self.code.lea(of_word(STACK, self.mode.pointer()), STACK, R::None, 1, by)
    }

    /// The word of `word` bytes in `place` comes to [`VALUE`], and nothing else is there.
    pub(super) fn load_word(&mut self, place: Place, word: u8) -> Result<(), NotCopied> {
        if word == 2 {
            let load = Instruction::with2(Code::Movzx_r32_rm16, R::EAX, place.operand());
            return self.code.emit(&load.map_err(|_| NotCopied)?);
        }
        self.code.load_at(of_word(VALUE, word), place)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::TestMachine;
    use crate::translate::Config;
    use crate::vcpu::Exit;

    /// A function's beginning and end, a thousand times; then `hlt`. RBX is what the stack pointer
    /// was amid the pushes.
    const PUSHES: &[u8] = &[
        0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
        0x41, 0x57, // again: push r15
        0x49, 0x89, 0xcf, // mov r15, rcx
        0x41, 0x56, // push r14
        0x4c, 0x8d, 0x71, 0x08, // lea r14, [rcx + 8]
        0x41, 0x55, // push r13
        0x54, // push rsp
        0x48, 0x8d, 0x5c, 0x24, 0x20, // lea rbx, [rsp + 32]
        0x6a, 0x07, // push 7
        0x55, // push rbp
        0x5d, // pop rbp
        0x58, // pop rax
        0x5a, // pop rdx
        0x48, 0x31, 0xda, // xor rdx, rbx
        0x41, 0x5d, // pop r13
        0x41, 0x5e, // pop r14
        0x4d, 0x01, 0xf5, // add r13, r14
        0x41, 0x5f, // pop r15
        0x4d, 0x01, 0xfe, // add r14, r15
        0xff, 0xc9, // dec ecx
        0x75, 0xd4, // jnz again
        0xf4, // hlt
    ];

    #[test]
    fn a_stack_that_moves_once_for_all_is_where_it_would_be() {
        // In one page, and with a page's end at each of the words.
        for stack in (0..10).map(|word| 0x9000 + 8 * word) {
            let ends = [false, true].map(|translated| {
                let mut machine = TestMachine::long_mode();
                if translated {
                    let config = Config { verify: true, ..Config::default() };
                    machine = machine.translating_as(3, config);
                }
                machine.put(0x1000, PUSHES);
                let state = &mut machine.vcpu.state;
                for (number, register) in state.gpr.iter_mut().take(16).enumerate() {
                    *register = 0x1111 * number as u64;
                }
                (state.rip, state.gpr[4]) = (0x1000, stack);
                assert_eq!(machine.vcpu.run(), Exit::Halt);
                (machine.vcpu.state.gpr, machine.get(0x8000, 0x2000))
            });
            assert_eq!(ends[0].0, ends[1].0, "{stack:#x}");
            assert!(ends[0].1 == ends[1].1, "{stack:#x}");
        }
    }
}
