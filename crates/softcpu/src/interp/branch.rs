//! Near branches: `jmp`, `call`, `ret`, `loop`, `jcxz`. All end a block and set RIP.

use super::operand::Source;
use crate::addr::GuestVirtAddr;
use crate::decode::op::Op;
use crate::memory::access::Scalar;
use crate::state::CodeSize;
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::vcpu::{Abort, Step, Vcpu};

impl Vcpu {
    /// Checks a branch target before anything is committed: canonical in 64-bit code,
    /// inside CS elsewhere.
    #[inline(always)]
    pub(super) fn check_target(&mut self, target: u64) -> Result<(), Abort> {
        let good = if self.code_size == CodeSize::Bits64 {
            GuestVirtAddr(target).is_canonical()
        } else {
            target <= u64::from(self.state.segment(crate::state::segment::SegReg::Cs).limit)
        };
        if good { Ok(()) } else { Err(self.gp(0)) }
    }
}

/// `jmp rel`.
pub(crate) fn jump(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.check_target(op.imm)?;
    cpu.state.rip = op.imm;
    Ok(())
}

/// `jmp r/m`.
pub(crate) fn jump_indirect<T: Scalar, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let target = S::get::<T>(cpu, op)?.zero_extend();
    cpu.check_target(target)?;
    cpu.state.rip = target;
    Ok(())
}

/// `call rel`.
pub(crate) fn call<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.check_target(op.imm)?;
    cpu.push(T::truncate(op.next_rip()))?;
    cpu.state.rip = op.imm;
    Ok(())
}

/// `call r/m`.
pub(crate) fn call_indirect<T: Scalar, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let target = S::get::<T>(cpu, op)?.zero_extend();
    cpu.check_target(target)?;
    cpu.push(T::truncate(op.next_rip()))?;
    cpu.state.rip = target;
    Ok(())
}

/// `ret` and `ret imm`: `imm` bytes of arguments are dropped.
pub(crate) fn ret<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let (target, after) = cpu.peek::<T>()?;
    let target = target.zero_extend();
    cpu.check_target(target)?;
    cpu.state.set_reg(Gpr::Rsp, after);
    if op.imm != 0 {
        let dropped = cpu.moved_stack_pointer(op.imm);
        cpu.state.set_reg(Gpr::Rsp, dropped);
    }
    cpu.state.rip = target;
    Ok(())
}

/// The counter register of `loop` and `jcxz`, in the address size's width.
fn counter(cpu: &Vcpu, op: &Op) -> u64 {
    cpu.state.reg(Gpr::Rcx) & op.addr_mask
}

/// Writes the counter back as a register of the address size.
pub(crate) fn set_counter(cpu: &mut Vcpu, op: &Op, value: u64) {
    let old = cpu.state.reg(Gpr::Rcx);
    let new = match op.addr_mask {
        0xffff => old & !0xffff | value & 0xffff,
        mask => value & mask,
    };
    cpu.state.set_reg(Gpr::Rcx, new);
}

/// `loop` (`aux` 2), `loope` (1), `loopne` (0).
pub(crate) fn loop_back(cpu: &mut Vcpu, op: &Op) -> Step {
    let left = counter(cpu, op).wrapping_sub(1) & op.addr_mask;
    let zero = cpu.state.rflags.contains(RFlags::ZF);
    let taken = left != 0
        && match op.aux {
            0 => !zero,
            1 => zero,
            _ => true,
        };
    if taken {
        cpu.check_target(op.imm)?;
    }
    set_counter(cpu, op, left);
    cpu.state.rip = if taken { op.imm } else { op.next_rip() };
    Ok(())
}

/// `jcxz`, `jecxz`, `jrcxz`.
pub(crate) fn jump_if_counter_zero(cpu: &mut Vcpu, op: &Op) -> Step {
    let taken = counter(cpu, op) == 0;
    if taken {
        cpu.check_target(op.imm)?;
    }
    cpu.state.rip = if taken { op.imm } else { op.next_rip() };
    Ok(())
}
