//! The time-stamp counter and who may read it.
//!
//! Guest TSC = host TSC + offset, at the host's own rate: no scaling, no exits. Sources:
//! SDM vol. 3, 17.17; vol. 2, RDTSC, RDTSCP, RDPID, RDPMC.

use crate::decode::op::Op;
use crate::lockstep::tape::Tape;
use crate::state::control::Cr4;
use crate::state::regs::Gpr;
use crate::vcpu::{Step, Vcpu};

/// The host's time-stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux leaves it enabled in user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Has all that comes before, loads too, happen before anything behind it: `rdtsc` alone does not
/// wait.
#[inline]
pub(crate) fn wait_for_earlier() {
    // SAFETY: LFENCE is part of SSE2, which every x86-64 CPU has, and does nothing but wait.
    unsafe { core::arch::x86_64::_mm_lfence() };
}

impl Vcpu {
    /// The guest's time-stamp counter now.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        self.host_time().wrapping_add(self.state.msr.tsc_offset)
    }

    /// The host's counter: now, or, for who does again what was done already, then.
    fn host_time(&self) -> u64 {
        self.tape.as_ref().map_or_else(host_tsc, Tape::time)
    }

    /// Moves the guest's counter to `offset` from the host's; what counts in it follows.
    pub(crate) fn set_tsc_offset(&mut self, offset: u64) {
        self.state.msr.tsc_offset = offset;
        self.env.tsc_offset_changed(offset);
    }

    /// A write of IA32_TSC: IA32_TSC_ADJUST moves along by the same amount.
    pub(crate) fn write_tsc(&mut self, value: u64) {
        let offset = value.wrapping_sub(self.host_time());
        let moved = offset.wrapping_sub(self.state.msr.tsc_offset);
        self.state.msr.tsc_adjust = self.state.msr.tsc_adjust.wrapping_add(moved);
        self.set_tsc_offset(offset);
    }

    /// A write of IA32_TSC_ADJUST: the counter moves by the change.
    pub(crate) fn write_tsc_adjust(&mut self, value: u64) {
        let moved = value.wrapping_sub(self.state.msr.tsc_adjust);
        self.state.msr.tsc_adjust = value;
        self.set_tsc_offset(self.state.msr.tsc_offset.wrapping_add(moved));
    }

    fn require_time(&mut self) -> Step {
        if self.state.cr4.contains(Cr4::TSD) && self.state.cpl() != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }
}

/// `rdtsc`.
pub(crate) fn rdtsc(cpu: &mut Vcpu, _op: &Op) -> Step {
    cpu.require_time()?;
    cpu.set_edx_eax(cpu.tsc());
    Ok(())
}

/// `rdtscp`: with IA32_TSC_AUX in ECX.
pub(crate) fn rdtscp(cpu: &mut Vcpu, _op: &Op) -> Step {
    cpu.require_time()?;
    wait_for_earlier();
    cpu.set_edx_eax(cpu.tsc());
    cpu.state.set_reg32(Gpr::Rcx, cpu.state.msr.tsc_aux as u32);
    Ok(())
}

/// `rdpid r`: IA32_TSC_AUX.
pub(crate) fn rdpid(cpu: &mut Vcpu, op: &Op) -> Step {
    *cpu.state.gpr_slot_mut(op.dst) = cpu.state.msr.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// `rdpmc`: this CPU has no performance counters, so every index is one too many.
pub(crate) fn rdpmc(cpu: &mut Vcpu, _op: &Op) -> Step {
    Err(cpu.gp(0))
}
