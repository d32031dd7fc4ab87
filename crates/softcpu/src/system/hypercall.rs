//! `vmcall` and `vmmcall`: the guest asks the machine for something, by KVM's convention.

use crate::decode::op::Op;
use crate::env::Hypercall;
use crate::state::CodeSize;
use crate::state::regs::Gpr;
use crate::supervisor::Trap;
use crate::vcpu::{Step, Vcpu};

/// `vmcall`, `vmmcall`: both encodings mean the same here, as guests pick one by vendor.
pub(crate) fn hypercall(cpu: &mut Vcpu, op: &Op) -> Step {
    if cpu.supervised() {
        cpu.state.rip = op.next_rip();
        return cpu.hand_over_from(Trap::Hypercall { at: op.rip });
    }
    let long = cpu.state.code_size() == CodeSize::Bits64;
    let width = if long { u64::MAX } else { 0xffff_ffff };
    let reg = |which| cpu.state.reg(which) & width;
    let call = Hypercall {
        number: reg(Gpr::Rax),
        args: [reg(Gpr::Rbx), reg(Gpr::Rcx), reg(Gpr::Rdx), reg(Gpr::Rsi)],
        cpl: cpu.state.cpl(),
        long,
    };
    let result = cpu.env.hypercall(&call);
    cpu.state.set_reg(Gpr::Rax, result & width);
    // The call may have raised an event for this very vCPU.
    cpu.end_block(op)
}
