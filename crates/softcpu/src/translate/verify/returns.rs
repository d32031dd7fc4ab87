//! What the verifier knows of the host's stack: calls that are noted there are pairs of a number
//! and a return address, each made by a push and a call that follows at once, so that what a
//! return goes to was left there by a call. Nothing else moves the stack pointer but what goes
//! back to its first place.

use iced_x86::{Code, Instruction, OpKind, Register as R};

use super::branches::is_entry_of_the_jump_cache;
use super::operands::field;
use crate::translate::fields::{self, Field};

/// Whether `it` does one of the few things that may be done with the host's stack pointer.
pub(super) fn may_use_the_stack(it: &Instruction) -> bool {
    is_push(it)
        || is_return(it)
        || is_call_by_the_jump_cache(it)
        || of_last_call(it)
        || of_field(it, Code::Cmp_r64_rm64, fields::STACK_LIMIT)
        || of_field(it, Code::Mov_r64_rm64, fields::HOST_STACK)
}

/// The first half of a pair.
pub(super) fn is_push(it: &Instruction) -> bool {
    it.code() == Code::Push_r64 && matches!(it.op0_register(), R::RAX | R::R13)
}

/// Takes a pair away.
pub(super) fn is_return(it: &Instruction) -> bool {
    it.code() == Code::Retnq_imm16 && it.try_immediate(0).ok() == Some(8)
}

/// The second half of a pair, whose target is what the jump cache has.
pub(super) fn is_call_by_the_jump_cache(it: &Instruction) -> bool {
    it.code() == Code::Call_rm64 && is_entry_of_the_jump_cache(it)
}

/// Whether `it` reads the number of the last pair.
pub(super) fn of_last_call(it: &Instruction) -> bool {
    matches!(it.code(), Code::Mov_r64_rm64 | Code::Cmp_r64_rm64)
        && it.op0_register() == R::RAX
        && it.op1_kind() == OpKind::Memory
        && it.segment_prefix() == R::None
        && (it.memory_base(), it.memory_index()) == (R::RSP, R::None)
        && it.memory_displacement64() == 8
}

fn of_field(it: &Instruction, code: Code, Field(at): Field) -> bool {
    it.code() == code && it.op0_register() == R::RSP && field(it) == Some(at.into())
}
