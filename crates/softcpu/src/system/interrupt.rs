//! Interrupts and exceptions as the run loop sees them, and the instructions that
//! make them: `int n`, `int3`, `into`, `int1`.
//!
//! Source: SDM vol. 3, chapter 6. How one event reaches its handler is in
//! [`event`](super::event).

use super::event::Delivery;
use crate::decode::op::Op;
use crate::exception::{Exception, Vector};
use crate::state::DR6_FIXED;
use crate::state::rflags::RFlags;
use crate::supervisor::Trap;
use crate::vcpu::{Abort, Step, Vcpu};

/// A fault while delivering a double fault: the CPU shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shutdown;

/// DR6 bits 3..0 and 15..13: what a debug exception reports.
const DR6_CAUSES: u64 = 0xe00f;
/// DR7.GD: any use of the debug registers faults.
const DR7_GENERAL_DETECT: u64 = 1 << 13;

impl Vcpu {
    /// Delivers `exception`, which arose at (or, for traps, before) the current RIP.
    ///
    /// What faults on the way turns into other exceptions and at worst a double fault.
    ///
    /// # Errors
    /// [`Shutdown`] for a triple fault.
    pub(crate) fn deliver_exception(&mut self, exception: Exception) -> Result<(), Shutdown> {
        let mut current = exception;
        loop {
            self.counters.exceptions = self.counters.exceptions.wrapping_add(1);
            self.note_payload(&current);
            let delivery = Delivery {
                vector: current.vector as u8,
                error_code: current.error_code,
                software: false,
                rip: self.state.rip,
                resume: pushes_resume(current.vector),
            };
            // Real mode knows no error codes; `deliver` ignores it there.
            if self.deliver(&delivery).is_ok() {
                return Ok(());
            }
            current = self.fault.after(&current).ok_or(Shutdown)?;
        }
    }

    /// Records what the exception says outside its frame: CR2, DR6.
    fn note_payload(&mut self, exception: &Exception) {
        match exception.vector {
            Vector::PageFault => self.state.cr2 = exception.payload,
            Vector::Debug => {
                self.state.dr6 = self.state.dr6 & !0xf | exception.payload & DR6_CAUSES | DR6_FIXED;
                self.state.dr7 &= !DR7_GENERAL_DETECT;
            }
            _ => {}
        }
    }

    /// Delivers external interrupt `vector`, acknowledged by the environment.
    ///
    /// # Errors
    /// [`Shutdown`] for a triple fault.
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) -> Result<(), Shutdown> {
        let delivery = Delivery {
            vector,
            error_code: None,
            software: false,
            rip: self.state.rip,
            resume: false,
        };
        match self.deliver(&delivery) {
            Ok(()) => Ok(()),
            Err(_) => self.deliver_exception(self.fault),
        }
    }

    /// Delivers a non-maskable interrupt; further ones wait for `iret`.
    ///
    /// # Errors
    /// [`Shutdown`] for a triple fault.
    pub(crate) fn deliver_nmi(&mut self) -> Result<(), Shutdown> {
        self.nmi_blocked = true;
        self.deliver_interrupt(Vector::Nmi as u8)
    }

    fn software_interrupt(&mut self, op: &Op, vector: u8, privileged: bool) -> Step {
        let rip = op.next_rip();
        if self.supervised() {
            self.state.rip = rip;
            let trap = Trap::Software { vector, at: op.rip, checked: !privileged };
            return self.hand_over_from(trap);
        }
        let delivery =
            Delivery { vector, error_code: None, software: !privileged, rip, resume: false };
        let stepping = self.state.rflags.contains(RFlags::TF);
        self.deliver(&delivery)?;
        self.system.step_inhibited = stepping;
        Err(Abort::EndBlock)
    }
}

/// Whether the frame of exception `vector` has RF set: faults do, traps and aborts do
/// not (SDM vol. 3, 17.3.1.1). A debug exception's frame holds RF as it was.
const fn pushes_resume(vector: Vector) -> bool {
    !matches!(
        vector,
        Vector::Debug
            | Vector::Nmi
            | Vector::Breakpoint
            | Vector::Overflow
            | Vector::DoubleFault
            | Vector::MachineCheck
    )
}

/// `int imm8`.
pub(crate) fn int(cpu: &mut Vcpu, op: &Op) -> Step {
    if cpu.virtual_8086() && cpu.state.rflags.iopl() < 3 {
        return Err(cpu.gp(0));
    }
    cpu.software_interrupt(op, op.imm as u8, false)
}

/// `int3`: unlike `int 3`, not subject to IOPL in virtual-8086 mode.
pub(crate) fn int3(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.software_interrupt(op, Vector::Breakpoint as u8, false)
}

/// `into`: vector 4 if OF is set. Outside 64-bit mode only.
pub(crate) fn into(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.state.rflags.contains(RFlags::OF) {
        return Ok(());
    }
    cpu.software_interrupt(op, Vector::Overflow as u8, false)
}

/// `int1`: a debug exception that sets nothing in DR6, with no check of the gate's DPL.
/// What a `mov ss` before it put off comes with it.
pub(crate) fn int1(cpu: &mut Vcpu, op: &Op) -> Step {
    let put_off = cpu.system.data_breakpoints;
    let outcome = cpu.software_interrupt(op, Vector::Debug as u8, true);
    if outcome == Err(Abort::EndBlock) && put_off != 0 {
        cpu.system.data_breakpoints = 0;
        cpu.note_payload(&Exception::debug(put_off));
    }
    outcome
}
