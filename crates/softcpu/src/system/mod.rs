//! System instructions and everything that changes privilege, mode or mapping.
//!
//! Handlers here are rare on the clock but decide whether a kernel boots, so they
//! follow the manual's pseudo-code closely and are written to be read next to it.
//! The decoder points [`Op::run`](crate::decode::op::Op::run) at them.
//!
//! # What handlers may assume of an op
//! * Operand 0 is in `dst` and operand 1 in `src`, as numbers of their class: general
//!   registers, segment registers ([`SegReg`](crate::state::segment::SegReg) order),
//!   control registers, debug registers.
//! * [`OpFlags::MEM`](crate::decode::op::OpFlags::MEM) says that the r/m operand is
//!   memory and not a register.
//! * `size` is the operand size in bytes; `imm` the immediate. Direct far transfers
//!   have the offset in `imm` and the selector in `disp`.
//!
//! # What they promise
//! On a fault the architectural state is as before. Whatever changes privilege,
//! mapping, code size or the interrupt flag sets RIP and ends the block.

pub(crate) mod control;
pub(crate) mod debug;
pub(crate) mod descriptor;
pub(crate) mod event;
pub(crate) mod far;
pub(crate) mod flags;
pub(crate) mod gate;
pub(crate) mod hypercall;
pub(crate) mod interrupt;
pub(crate) mod invalidate;
pub(crate) mod io;
pub(crate) mod iret;
pub(crate) mod msr;
pub(crate) mod msr_table;
pub(crate) mod mtrr;
pub(crate) mod returning;
pub(crate) mod segment;
pub(crate) mod stack;
pub(crate) mod string_io;
pub(crate) mod syscall;
pub(crate) mod tables;
pub(crate) mod task;
pub(crate) mod tsc;
pub(crate) mod xsave;

#[cfg(test)]
mod tests;

use crate::decode::op::Op;
use crate::vcpu::{Abort, Shadow, Step, Vcpu};

/// What system instructions keep besides the architectural registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SystemExtras {
    /// DR6 bits of data breakpoints hit by the instruction that is being run.
    pub(crate) data_breakpoints: u64,
    /// The instruction that is being run swallows the single-step trap: software
    /// interrupts and system calls clear TF before it would come.
    pub(crate) step_inhibited: bool,
    /// A single-step trap comes before the next instruction: `sysret` has set TF, and what
    /// counts there is TF at the end (AMD's APM vol. 3, SYSRET).
    pub(crate) step_due: bool,
    /// Things the guest asked for that this CPU refuses, for traces.
    pub(crate) refused: Refused,
}

/// Counts of what the guest asked for and did not get. A guest that stops where real
/// hardware would go on is explained by one of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// Task switches through a TSS or task gate. Hardware task switching is not
    /// implemented: no 64-bit system can use it, and 32-bit Linux uses it only for its
    /// double-fault handler. It ends in `#GP(selector)`.
    pub task_switches: u32,
    /// `rdmsr` or `wrmsr` of a register that neither the CPU nor the machine has.
    pub msrs: u32,
    /// The last such register.
    pub last_msr: u32,
}

impl Vcpu {
    /// What the guest asked for and did not get.
    #[must_use]
    pub fn refused(&self) -> Refused {
        self.system.refused
    }

    /// `#GP(0)` unless the CPL is 0. (Real mode has CPL 0, virtual-8086 mode CPL 3.)
    #[inline]
    pub(crate) fn require_cpl0(&mut self) -> Step {
        if self.state.cpl() == 0 { Ok(()) } else { Err(self.gp(0)) }
    }

    /// Completes an instruction that changed something the rest of the block depends on.
    #[inline]
    pub(crate) fn end_block(&mut self, op: &Op) -> Step {
        self.state.rip = op.next_rip();
        Err(Abort::EndBlock)
    }

    /// Holds interrupts off for one instruction: after `sti`, and after `mov ss` and
    /// `pop ss` (whose handlers call this with [`Shadow::MovSs`]). The run loop lifts
    /// the shadow when the next instruction is done.
    pub(crate) fn cast_shadow(&mut self, shadow: Shadow) {
        self.shadow = shadow;
        self.update_event_mask();
    }

    /// Counts a refused task switch; the caller raises `#GP`.
    #[cold]
    pub(crate) fn note_task_switch(&mut self) {
        let refused = &mut self.system.refused;
        refused.task_switches = refused.task_switches.saturating_add(1);
    }
}

/// The mask of an operand of `size` bytes.
#[inline]
pub(crate) const fn mask_of(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}
