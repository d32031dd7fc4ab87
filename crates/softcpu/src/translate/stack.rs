//! Instructions that work on the guest's stack and do nothing else.

use iced_x86::{Instruction, OpKind, Register as R};

use super::access::Access;
use super::assembler::NotCopied;
use super::block::Block;
use super::fields;
use super::registers::{Home, STACK, VALUE};
use crate::decode::op::Op;
use crate::state::{GPR_ZERO, SEG_FLAT};

/// RSP's number.
pub(super) const RSP: u8 = 4;
pub(super) const RBP: u8 = 5;

/// What is pushed.
pub(super) enum Pushed {
    Register(R),
    Constant(u64),
}

/// The word at `displacement` from `register`.
pub(super) fn stack_operand(op: &Op, register: u8, displacement: i64) -> Op {
    Op {
        base: register,
        index: GPR_ZERO,
        disp: displacement as u64,
        addr_mask: u64::MAX,
        seg: SEG_FLAT,
        ..*op
    }
}

impl Block<'_> {
    pub(super) fn push(&mut self, op: &Op, what: Pushed) -> Result<(), NotCopied> {
        let place = self.check(op, &stack_operand(op, RSP, -8), Access::STORE_WORD)?;
        let from = match what {
            Pushed::Register(register) => match self.code.homes.of(register.number() as u8) {
                Home::Host(host) => host,
                Home::Memory => {
                    self.code.fetch(VALUE, register.number() as u8);
                    VALUE
                }
            },
            Pushed::Constant(value) => {
                self.code.constant(VALUE, value);
                VALUE
            }
        };
        self.code.store_at(place, from)?;
        self.moved_stack(-8)?;
        self.resume_here();
        Ok(())
    }

    /// A word of memory is pushed. Both accesses are checked before the second is made.
    pub(super) fn push_memory(&mut self, it: &Instruction, op: &Op) -> Result<(), NotCopied> {
        if it.op0_kind() != OpKind::Memory {
            return Err(NotCopied);
        }
        let detour = self.detour(op)?;
        let from = self.code.check(op, Access::LOAD_WORD, detour.unusual)?;
        self.code.load_at(VALUE, from)?;
        self.code.store(fields::SPARE, VALUE);
        let stack = stack_operand(op, RSP, -8);
        let to = self.code.check(&stack, Access::STORE_WORD, detour.unusual)?;
        self.code.load(VALUE, fields::SPARE);
        self.code.store_at(to, VALUE)?;
        self.moved_stack(-8)?;
        self.rejoin(detour);
        Ok(())
    }

    pub(super) fn pop(&mut self, op: &Op, register: u8) -> Result<(), NotCopied> {
        let place = self.check(op, &stack_operand(op, RSP, 0), Access::LOAD_WORD)?;
        self.overwrite(1 << RSP | 1 << (register & 15))?;
        match self.code.homes.of(register) {
            Home::Host(host) if host != STACK => self.code.load_at(host, place)?,
            _ => self.code.load_at(VALUE, place)?,
        }
        self.code.lea(STACK, STACK, R::None, 1, 8)?;
        if register == RSP || self.code.homes.of(register) == Home::Memory {
            self.code.put(register, VALUE);
        }
        self.resume_here();
        Ok(())
    }

    /// RSP changes by `by`.
    pub(super) fn moved_stack(&mut self, by: i64) -> Result<(), NotCopied> {
        self.overwrite(1 << RSP)?;
        self.code.lea(STACK, STACK, R::None, 1, by)
    }

    pub(super) fn leave(&mut self, op: &Op) -> Result<(), NotCopied> {
        let place = self.check(op, &stack_operand(op, RBP, 0), Access::LOAD_WORD)?;
        self.overwrite(1 << RSP | 1 << RBP)?;
        self.code.lea(STACK, R::RBP, R::None, 1, 8)?;
        self.code.load_at(R::RBP, place)?;
        self.resume_here();
        Ok(())
    }
}
