//! Delivering an interrupt or exception through the IVT or IDT.
//!
//! Source: the pseudo-code of SDM vol. 2, INT n; vol. 3, 6.12 and 6.14. One attempt is
//! made here; what happens when it faults is decided in [`interrupt`](super::interrupt).

use super::descriptor::{Descriptor, system_type};
use super::stack::Cursor;
use crate::exception::{Exception, Vector};
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::state::segment::{SegReg, Segment};
use crate::vcpu::{Abort, Shadow, Vcpu};

/// What is delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delivery {
    pub(crate) vector: u8,
    /// The error code to push, if this exception has one.
    pub(crate) error_code: Option<u32>,
    /// `int n`, `int3`, `into`: the gate's DPL is checked, and errors on the way are the
    /// program's own (EXT clear).
    pub(crate) software: bool,
    /// The return address to push.
    pub(crate) rip: u64,
    /// Whether RF is set in the pushed flags: for faults, so that the instruction breakpoint
    /// of the faulting instruction does not fire twice.
    pub(crate) resume: bool,
}

/// Error code bit 0: the event was external to the program.
const EXT: u32 = 1;
/// Error code bit 1: the index is one of the IDT.
const IDT: u32 = 2;

impl Delivery {
    /// The error code for what is wrong with the IDT entry itself.
    fn gate_code(&self) -> u32 {
        u32::from(self.vector) << 3 | IDT
    }
}

/// A checked way from a gate to a code segment.
struct Entry {
    gate: Descriptor,
    code: Segment,
    rip: u64,
    cpl: u8,
    /// Frame word size.
    size: u8,
    /// The handler runs in a more privileged ring than the interrupted code.
    inner: bool,
}

impl Vcpu {
    /// One attempt to deliver; on a fault nothing but the fault record has changed.
    pub(crate) fn deliver(&mut self, delivery: &Delivery) -> Result<(), Abort> {
        let result = if !self.state.protected_mode() {
            self.deliver_real(delivery)
        } else if self.state.long_mode() {
            self.deliver_long(delivery)
        } else {
            self.deliver_legacy(delivery)
        };
        match result {
            Ok(()) => {
                self.shadow = Shadow::None;
                self.update_event_mask();
                Ok(())
            }
            Err(abort) => {
                let with_selector = matches!(
                    self.fault.vector,
                    Vector::InvalidTss
                        | Vector::SegmentNotPresent
                        | Vector::StackSegment
                        | Vector::GeneralProtection
                );
                if !delivery.software && with_selector {
                    self.fault.error_code = self.fault.error_code.map(|code| code | EXT);
                }
                Err(abort)
            }
        }
    }

    /// The flags image a frame holds.
    fn pushed_flags(&self, delivery: &Delivery) -> u64 {
        let mut flags = self.state.rflags;
        if delivery.resume {
            flags |= RFlags::RF;
        }
        flags.bits()
    }

    /// Flags as the handler starts with them.
    fn handler_flags(&self, interrupt_gate: bool) -> RFlags {
        let mut flags =
            self.state.rflags.difference(RFlags::TF | RFlags::NT | RFlags::RF | RFlags::VM);
        if interrupt_gate {
            flags.remove(RFlags::IF);
        }
        flags
    }

    fn deliver_real(&mut self, delivery: &Delivery) -> Result<(), Abort> {
        let offset = u64::from(delivery.vector) << 2;
        if offset | 3 > u64::from(self.state.idtr.limit) {
            return Err(self.gp(delivery.gate_code()));
        }
        let at = self.wrap_linear(self.state.idtr.base.wrapping_add(offset));
        let vector = self.read_system::<u32>(at)?;
        let mut stack = self.current_stack();
        self.push_to(&mut stack, 2, self.state.rflags.bits())?;
        self.push_to(&mut stack, 2, u64::from(self.state.segment(SegReg::Cs).selector))?;
        self.push_to(&mut stack, 2, delivery.rip)?;
        self.commit_stack(&stack);
        let flags = self.state.rflags.difference(RFlags::IF | RFlags::TF | RFlags::AC | RFlags::RF);
        self.set_rflags(flags);
        let code = self.plain_segment(SegReg::Cs, (vector >> 16) as u16);
        self.enter(code, u64::from(vector & 0xffff));
        Ok(())
    }

    /// Reads and checks the IDT entry: limit, type, privilege, presence.
    fn interrupt_gate(&mut self, delivery: &Delivery, long: bool) -> Result<Descriptor, Abort> {
        let code = delivery.gate_code();
        let (shift, last) = if long { (4, 15) } else { (3, 7) };
        let offset = u64::from(delivery.vector) << shift;
        if offset | last > u64::from(self.state.idtr.limit) {
            return Err(self.gp(code));
        }
        let at = self.wrap_linear(self.state.idtr.base.wrapping_add(offset));
        let raw = self.read_system::<u64>(at)?;
        let high = if long { self.read_system::<u64>(at.wrapping_add(8))? } else { 0 };
        let gate = Descriptor { raw, high, at };
        match gate.system_type() {
            Some(system_type::INTERRUPT_GATE | system_type::TRAP_GATE) => {}
            Some(
                system_type::INTERRUPT_GATE16 | system_type::TRAP_GATE16 | system_type::TASK_GATE,
            ) if !long => {}
            _ => return Err(self.gp(code)),
        }
        if delivery.software && gate.dpl() < self.state.cpl() {
            return Err(self.gp(code));
        }
        if !gate.is_present() {
            return Err(self.raise(Exception::segment_not_present(code)));
        }
        if gate.system_type() == Some(system_type::TASK_GATE) {
            self.note_task_switch();
            return Err(self.gp(code));
        }
        Ok(gate)
    }

    /// Follows the gate to its code segment.
    fn interrupt_entry(&mut self, gate: Descriptor, long: bool) -> Result<Entry, Abort> {
        let cpl = self.state.cpl();
        let target = gate.gate_selector();
        if target.is_null() {
            return Err(self.gp(0));
        }
        let code = self.descriptor(target, Exception::general_protection)?;
        if !code.is_code() || code.dpl() > cpl || long && !code.is_long_code() {
            return Err(self.gp(target.code()));
        }
        if !code.is_present() {
            return Err(self.raise(Exception::segment_not_present(target.code())));
        }
        let inner = !code.is_conforming() && code.dpl() < cpl;
        // Virtual-8086 code is interrupted into ring 0 or not at all.
        if self.virtual_8086() && !(inner && code.dpl() == 0) {
            return Err(self.gp(target.code()));
        }
        self.mark_accessed(&code)?;
        let new_cpl = if inner { code.dpl() } else { cpl };
        let wide = matches!(
            gate.system_type(),
            Some(system_type::INTERRUPT_GATE | system_type::TRAP_GATE)
        );
        let segment = code.segment(target.with_rpl(new_cpl));
        let rip = self.check_entry(&segment, gate.gate_offset(wide))?;
        let size = match (long, wide) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 2,
        };
        Ok(Entry { gate, code: segment, rip, cpl: new_cpl, size, inner })
    }

    fn deliver_legacy(&mut self, delivery: &Delivery) -> Result<(), Abort> {
        let gate = self.interrupt_gate(delivery, false)?;
        let entry = self.interrupt_entry(gate, false)?;
        let (mut stack, segment) = if entry.inner {
            let (stack, segment) = self.inner_stack(entry.cpl)?;
            (stack, Some(segment))
        } else {
            (self.current_stack(), None)
        };
        let from_8086 = self.virtual_8086();
        if from_8086 {
            for reg in [SegReg::Gs, SegReg::Fs, SegReg::Ds, SegReg::Es] {
                self.push_to(&mut stack, entry.size, u64::from(self.state.segment(reg).selector))?;
            }
        }
        self.push_frame(&mut stack, delivery, entry.size, segment.is_some())?;
        match segment {
            Some(segment) => {
                *self.state.segment_mut(SegReg::Ss) = segment;
                self.state.set_reg(Gpr::Rsp, stack.merge(self.state.reg(Gpr::Rsp)));
            }
            None => self.commit_stack(&stack),
        }
        if from_8086 {
            for reg in [SegReg::Gs, SegReg::Fs, SegReg::Ds, SegReg::Es] {
                *self.state.segment_mut(reg) = Segment::null(0);
            }
        }
        self.enter_handler(&entry);
        Ok(())
    }

    fn deliver_long(&mut self, delivery: &Delivery) -> Result<(), Abort> {
        let gate = self.interrupt_gate(delivery, true)?;
        let entry = self.interrupt_entry(gate, true)?;
        let pointer = match gate.gate_ist() {
            0 if entry.inner => self.task_stack64(entry.cpl)?,
            0 => self.state.reg(Gpr::Rsp),
            ist => self.interrupt_stack(ist)?,
        };
        // The frame is aligned to 16 bytes, whatever the stack was (SDM vol. 3, 6.14.2).
        let mut stack = self.flat_stack(pointer & !15, entry.cpl);
        self.push_frame(&mut stack, delivery, 8, true)?;
        self.state.set_reg(Gpr::Rsp, stack.pointer);
        if entry.inner {
            *self.state.segment_mut(SegReg::Ss) =
                Segment::null_stack(u16::from(entry.cpl), entry.cpl);
        }
        self.enter_handler(&entry);
        Ok(())
    }

    fn push_frame(
        &mut self,
        stack: &mut Cursor,
        delivery: &Delivery,
        size: u8,
        with_stack: bool,
    ) -> Result<(), Abort> {
        if with_stack {
            self.push_to(stack, size, u64::from(self.state.segment(SegReg::Ss).selector))?;
            self.push_to(stack, size, self.state.reg(Gpr::Rsp))?;
        }
        self.push_to(stack, size, self.pushed_flags(delivery))?;
        self.push_to(stack, size, u64::from(self.state.segment(SegReg::Cs).selector))?;
        self.push_to(stack, size, delivery.rip)?;
        if let Some(code) = delivery.error_code {
            self.push_to(stack, size, u64::from(code))?;
        }
        Ok(())
    }

    fn enter_handler(&mut self, entry: &Entry) {
        let interrupt = matches!(
            entry.gate.system_type(),
            Some(system_type::INTERRUPT_GATE | system_type::INTERRUPT_GATE16)
        );
        let flags = self.handler_flags(interrupt);
        self.set_rflags(flags);
        self.enter(entry.code, entry.rip);
    }
}
