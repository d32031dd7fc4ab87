//! Accesses through the mirror: where its table was looked at, and what registers have become
//! since.
//!
//! What makes host addresses of guest addresses is kept there for as long as the registers that
//! those are made of stay what they were, or move by constants.

use iced_x86::{Code, Instruction, OpAccess, Register as R};

use super::Look;
use super::known::{Known, Shown, Sum, Term};
use crate::mmu::mirror::GUARD;
use crate::translate::registers::{ADDRESS, VALUE};

/// How far accesses may be from an address in a span that is mirrored: half of what windows
/// have beside them.
const NEAR: i64 = GUARD as i64 / 2;

impl Look<'_> {
    /// The registers that `it` changes are not what addresses were made of any more, or so far
    /// from it.
    pub(super) fn changes(&mut self, it: &Instruction) {
        let any = self.stubs.may_have_begun()
            || self.pointers.have_addends()
            || self.shown.is_some()
            || self.mirrored.is_some()
            || matches!(self.address, Known::Addend(_));
        if !any || self.stubs.brings_back(it) {
            return;
        }
        let by = distance(it);
        let used = self.factory.info(it).used_registers();
        let written = used
            .iter()
            .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead))
            .map(|used| used.register().full_register())
            .filter(|register| !matches!(*register, VALUE | ADDRESS));
        for register in written {
            self.stubs.changes(it);
            self.pointers.changes(register, by);
            for shown in [&mut self.shown, &mut self.mirrored] {
                shown.take_if(|shown| shown.has(&Term::Register(register, 1)));
            }
            if let Known::Addend(shown) = &mut self.address
                && !shown.changes(register, by)
            {
                self.address = Known::Nothing;
            }
        }
    }

    /// What is shown if the entry of the mirror's table that `it` looks at is not zero: accesses
    /// from the address on may be made, and to what is not too far before and behind it.
    pub(super) fn asks(&self, it: &Instruction) -> Option<Shown> {
        let Known::SpanEntry(sum) = &self.value else { return None };
        let right = it.code() == Code::Cmp_rm8_imm8
            && it.memory_base() == VALUE
            && it.immediate(1) == 0
            && !sum.is_narrow();
        let at = |distance| {
            let offset = sum.offset.checked_add(distance)?;
            Some(Sum { terms: sum.terms.clone(), offset })
        };
        let (first, last) = (at(NEAR.wrapping_neg())?, at(NEAR.wrapping_sub(1))?);
        right.then_some(Shown { first, last, stores: true, at: u64::MAX })
    }
}

/// The constant that `it` changes its first operand by, a register of 64 bits.
fn distance(it: &Instruction) -> Option<i64> {
    let constant = |it: &Instruction| it.try_immediate(1).ok().map(|value| value as i64);
    match it.code() {
        Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32 => constant(it),
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32 => {
            constant(it)?.checked_neg()
        }
        Code::Inc_rm64 => Some(1),
        Code::Dec_rm64 => Some(-1),
        Code::Lea_r64_m
            if it.memory_base() == it.op0_register() && it.memory_index() == R::None =>
        {
            Some(it.memory_displacement64() as i64)
        }
        _ => None,
    }
}
