//! The sixteen conditions, and what is done on them: `jcc`, `setcc`, `cmovcc`.

use super::operand::{Source, Target};
use crate::decode::op::{Op, read_reg, write_reg};
use crate::memory::access::Scalar;
use crate::state::rflags::RFlags;
use crate::vcpu::{Step, Vcpu};

/// Whether condition `CC` (the low four bits of the opcode) holds (SDM vol. 1, appendix B).
#[inline(always)]
pub(crate) fn holds<const CC: u8>(flags: RFlags) -> bool {
    let has = |flag: RFlags| flags.intersects(flag);
    let less = has(RFlags::SF) != has(RFlags::OF);
    let base = match CC >> 1 {
        0 => has(RFlags::OF),
        1 => has(RFlags::CF),
        2 => has(RFlags::ZF),
        3 => has(RFlags::CF.union(RFlags::ZF)),
        4 => has(RFlags::SF),
        5 => has(RFlags::PF),
        6 => less,
        _ => less || has(RFlags::ZF),
    };
    base != (CC & 1 != 0)
}

/// `jcc`: ends the block.
pub(crate) fn jump<const CC: u8>(cpu: &mut Vcpu, op: &Op) -> Step {
    let taken = holds::<CC>(cpu.state.rflags);
    if taken {
        cpu.check_target(op.imm)?;
    }
    cpu.state.rip = if taken { op.imm } else { op.next_rip() };
    Ok(())
}

/// `setcc`.
pub(crate) fn set<const CC: u8, D: Target>(cpu: &mut Vcpu, op: &Op) -> Step {
    let value = u8::from(holds::<CC>(cpu.state.rflags));
    D::set(cpu, op, value)
}

/// `cmovcc`: the source is read (and may fault) and, with 32-bit operands, the upper
/// half cleared whether or not the condition holds.
pub(crate) fn conditional_move<const CC: u8, T: Scalar, S: Source>(
    cpu: &mut Vcpu,
    op: &Op,
) -> Step {
    let new = S::get::<T>(cpu, op)?;
    let old = read_reg::<T>(&cpu.state, op.dst);
    let value = if holds::<CC>(cpu.state.rflags) { new } else { old };
    write_reg(&mut cpu.state, op.dst, value);
    Ok(())
}
