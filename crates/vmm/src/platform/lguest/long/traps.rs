//! Traps and system calls: into the guest's gates, on frames as the CPU makes them.

use std::mem::offset_of;

use lguest_abi::long::Virt;
use lguest_abi::long::entry::{KERNEL_CS, KERNEL_DS};
use lguest_abi::long::shared_data::{IRQ_FLAG, SharedData};
use lguest_abi::long::traps::{
    Frame, HYPERCALL_VECTOR, frame_on, handler_flags, saved_flags, syscall_flags,
};
use softcpu::exception::{Exception, PageFaultCode, Vector};
use softcpu::state::regs::Gpr;
use softcpu::state::rflags::RFlags;
use softcpu::state::segment::SegReg;
use softcpu::{Vcpu, Verdict};

use super::calls::field;
use super::{Gate, LongDeath, LongGuest, start};

/// The guest's kernel, and its users.
const KERNEL_RING: u8 = 1;
const USER_RING: u8 = 3;
/// Error code bit 1: the index is one of the IDT.
const IDT: u32 = 2;
/// `int1`'s and `int3`'s frames are of a trap: no error code.
const NO_CODE: Option<u32> = None;

impl LongGuest {
    /// An exception of the CPU's.
    pub(super) fn exception(
        &mut self,
        cpu: &mut Vcpu,
        exception: Exception,
    ) -> Result<Verdict, LongDeath> {
        let code = exception.error_code;
        let mut detail = u64::from(code.unwrap_or(0));
        match exception.vector {
            Vector::PageFault => {
                let at = exception.payload;
                detail = at;
                if code.is_some_and(|code| code & PageFaultCode::RESERVED.bits() != 0)
                    && let Some(table) = self.stray_table(cpu, at)
                {
                    return Err(LongDeath::StrayTable { table, at });
                }
                if let Some(session) = &self.session {
                    self.ram.set_word64(field(session.data, offset_of!(SharedData, cr2)), at);
                }
            }
            Vector::Debug => cpu.state.dr6 |= exception.payload,
            _ => {}
        }
        self.reflect(cpu, exception.vector as u8, code, detail)
    }

    /// `int n` and its kin: a hypercall, or what the guest's gate for the vector allows.
    pub(super) fn software_interrupt(
        &mut self,
        cpu: &mut Vcpu,
        vector: u8,
        at: u64,
        checked: bool,
    ) -> Result<Verdict, LongDeath> {
        let ring = cpu.state.cpl();
        if vector == HYPERCALL_VECTOR && ring == KERNEL_RING {
            return self.hypercall(cpu);
        }
        let allowed = |gate: &Gate| !checked || ring == KERNEL_RING || gate.kind.user;
        if checked && !self.gate(vector).is_some_and(|gate| allowed(&gate)) {
            cpu.state.rip = at;
            let code = u32::from(vector) << 3 | IDT;
            return self.exception(cpu, Exception::general_protection(code));
        }
        self.reflect(cpu, vector, NO_CODE, 0)
    }

    /// `syscall`; RIP is behind it.
    pub(super) fn system_call(&mut self, cpu: &mut Vcpu, at: u64) -> Result<Verdict, LongDeath> {
        let entry = self.syscall.filter(|_| cpu.state.cpl() == USER_RING);
        let (Some(entry), Some(_)) = (entry, &self.session) else {
            return self.invalid_opcode(cpu, at);
        };
        let flags = cpu.state.rflags.difference(RFlags::RF);
        // The vector is for the message of a stack that is none: that of a double fault.
        self.push_frame(cpu, Vector::DoubleFault as u8, NO_CODE)?;
        cpu.state.set_reg(Gpr::Rcx, cpu.state.rip);
        cpu.state.set_reg(Gpr::R11, flags.bits());
        self.set_irq_enabled(0);
        enter_kernel(cpu, entry, syscall_flags(flags.bits()));
        Ok(Verdict::Resume)
    }

    /// An instruction that is not there.
    pub(super) fn invalid_opcode(&mut self, cpu: &mut Vcpu, at: u64) -> Result<Verdict, LongDeath> {
        cpu.state.rip = at;
        self.exception(cpu, Exception::invalid_opcode())
    }

    /// The guest's gate for `vector`.
    pub(super) fn gate(&self, vector: u8) -> Option<Gate> {
        self.gates.get(usize::from(vector)).copied().flatten()
    }

    fn reflect(
        &mut self,
        cpu: &mut Vcpu,
        vector: u8,
        code: Option<u32>,
        detail: u64,
    ) -> Result<Verdict, LongDeath> {
        let gate = self.gate(vector).filter(|_| self.session.is_some());
        let gate = gate.ok_or(LongDeath::UnhandledTrap { vector, detail })?;
        self.push_frame(cpu, vector, code)?;
        self.run_handler(cpu, gate);
        Ok(Verdict::Resume)
    }

    /// Pushes a frame with the state as it is, and moves RSP there.
    pub(super) fn push_frame(
        &self,
        cpu: &mut Vcpu,
        vector: u8,
        code: Option<u32>,
    ) -> Result<(), LongDeath> {
        let outer = cpu.state.cpl() == USER_RING;
        let rsp = if outer { self.stack.0 } else { cpu.state.reg(Gpr::Rsp) };
        let frame = Frame {
            rip: cpu.state.rip,
            cs: cpu.state.segment(SegReg::Cs).selector.into(),
            rflags: saved_flags(cpu.state.rflags.bits(), self.irq_enabled()),
            rsp: cpu.state.reg(Gpr::Rsp),
            ss: cpu.state.segment(SegReg::Ss).selector.into(),
        };
        let broken = |at| LongDeath::Frame { vector, at };
        let (words, at) = frame_on(rsp, &frame, code).ok_or(broken(rsp))?;
        let count = if code.is_some() { words.len() } else { words.len().saturating_sub(1) };
        let mut bytes = [0; size_of::<[u64; 6]>()];
        for (slot, word) in bytes.chunks_exact_mut(size_of::<u64>()).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let len = count.saturating_mul(size_of::<u64>());
        cpu.write_virtual(at, bytes.get(..len).unwrap_or_default()).map_err(|_| broken(at))?;
        cpu.state.set_reg(Gpr::Rsp, at);
        Ok(())
    }

    /// Begins a gate's handler with RSP as it is.
    pub(super) fn run_handler(&self, cpu: &mut Vcpu, gate: Gate) {
        let flags = handler_flags(cpu.state.rflags.bits());
        if !gate.kind.trap {
            self.set_irq_enabled(0);
        }
        enter_kernel(cpu, gate.handler, flags);
    }

    /// The guest's interrupt flag, with whatever else its return path left there.
    pub(super) fn irq_enabled(&self) -> u32 {
        self.session.map_or(0, |session| self.ram.word32(session.greeting.irq_words.0))
    }

    fn set_irq_enabled(&self, value: u32) {
        if let Some(session) = &self.session {
            self.ram.set_word32(session.greeting.irq_words.0, value & IRQ_FLAG);
        }
    }
}

/// Goes to `rip` in ring 1.
fn enter_kernel(cpu: &mut Vcpu, rip: Virt, flags: u64) {
    *cpu.state.segment_mut(SegReg::Cs) = start::segment(KERNEL_CS);
    *cpu.state.segment_mut(SegReg::Ss) = start::segment(KERNEL_DS);
    cpu.state.rip = rip.0;
    cpu.segments_changed();
    cpu.load_flags(RFlags::from_bits_truncate(flags));
}
