//! Memory operands that are fields of the vCPU.

use iced_x86::{Instruction, OpKind, Register as R};

/// Where in the vCPU the memory operand of `it` is, if it is there and at a fixed place.
pub(super) fn field(it: &Instruction) -> Option<u64> {
    let fixed =
        it.memory_segment() == R::GS && it.memory_base() == R::None && it.memory_index() == R::None;
    let is = fixed && it.op_kinds().any(|kind| kind == OpKind::Memory);
    is.then(|| it.memory_displacement64())
}

/// The same for what is its first operand: of a store, what is stored to.
pub(super) fn first_field(it: &Instruction) -> Option<u64> {
    let first = it.op_count() > 0 && it.op0_kind() == OpKind::Memory;
    field(it).filter(|_| first)
}
