//! What the compiler made of a caller: bytes, spills and reloads, by disassembly.

use super::styles::Caller;
use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, OpKind, Register};

/// Counts in one function.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shape {
    pub(crate) bytes: usize,
    /// Stores of registers to stack slots.
    pub(crate) spills: usize,
    /// Loads (also as operands) from stack slots.
    pub(crate) reloads: usize,
    /// Callee-saved registers pushed at entry.
    pub(crate) saved: usize,
}

/// Decodes up to the `ret` that no branch passes over.
pub(crate) fn function(start: *const ()) -> Vec<Instruction> {
    // SAFETY: text of this program; the longest caller is shorter, and the text is longer.
    let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), 1 << 10) };
    let mut furthest = 0;
    let mut found = vec![];
    for instruction in Decoder::with_ip(64, bytes, start.addr() as u64, 0) {
        found.push(instruction);
        match instruction.flow_control() {
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                furthest = furthest.max(instruction.near_branch_target());
            }
            FlowControl::Return if instruction.next_ip() > furthest => break,
            _ => {}
        }
    }
    found
}

pub(crate) fn shape(caller: Caller) -> Shape {
    let mut shape = Shape::default();
    for instruction in function(caller as *const ()) {
        shape.bytes += instruction.len();
        match instruction.mnemonic() {
            // Of RAX: no value is kept, only the stack aligned.
            Mnemonic::Push if instruction.op0_register() == Register::RAX => {}
            Mnemonic::Push if instruction.op_kind(0) == OpKind::Register => {
                let kept = [
                    Register::RBX,
                    Register::RBP,
                    Register::R12,
                    Register::R13,
                    Register::R14,
                    Register::R15,
                ];
                shape.saved += usize::from(kept.contains(&instruction.op0_register()));
            }
            _ if instruction.memory_base() == Register::RSP
                && instruction.mnemonic() != Mnemonic::Lea =>
            {
                let store = [Mnemonic::Mov, Mnemonic::Movaps, Mnemonic::Movups];
                if instruction.op_kind(0) == OpKind::Memory
                    && store.contains(&instruction.mnemonic())
                {
                    shape.spills += 1;
                } else {
                    shape.reloads += 1;
                }
            }
            _ => {}
        }
    }
    shape
}

/// Bytes of a function without branches past its `ret`.
pub(crate) fn length(start: *const ()) -> usize {
    function(start).iter().map(Instruction::len).sum()
}
