//! Choosing handlers for system instructions.

use iced_x86::Instruction;

use super::lower::Choice;
use super::op::Op;

/// The handler for `instruction` if it is a system instruction.
pub(crate) fn lower(_instruction: &Instruction, _op: &mut Op) -> Option<Choice> {
    None
}
