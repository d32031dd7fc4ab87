//! Far jumps, calls and returns.
//!
//! Sources: SDM vol. 2, JMP, CALL, RET; vol. 3, 5.8. Call gates are in
//! [`gate`](super::gate); what returns share with `iret` in [`returning`](super::returning).

use super::descriptor::{Descriptor, Selector, system_type};
use super::mask_of;
use crate::addr::GuestVirtAddr;
use crate::decode::op::Op;
use crate::exception::Exception;
use crate::mmu::Access as MemAccess;
use crate::state::segment::{SegReg, Segment};
use crate::vcpu::{Abort, Step, Vcpu};

/// Jump or call: what a far transfer leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// Nothing.
    Jump,
    /// A return address.
    Call,
}

impl Vcpu {
    /// Checks that `offset` is a place code in `segment` can run at and cuts it to the
    /// segment's width: canonical in 64-bit code, within the limit elsewhere.
    pub(crate) fn check_entry(&mut self, segment: &Segment, offset: u64) -> Result<u64, Abort> {
        let valid = if self.state.long_mode() && segment.is_long() {
            GuestVirtAddr(offset).is_canonical()
        } else {
            offset <= u64::from(segment.limit)
        };
        if valid { Ok(offset) } else { Err(self.gp(0)) }
    }

    /// Loads CS and RIP; the transfer's checks are done.
    pub(crate) fn enter(&mut self, segment: Segment, rip: u64) {
        *self.state.segment_mut(SegReg::Cs) = segment;
        self.state.rip = rip;
        self.mode_changed();
    }

    /// A far transfer of either kind, in any mode.
    fn far(&mut self, op: &Op, kind: Transfer, selector: Selector, offset: u64) -> Step {
        if !self.has_descriptors() {
            let segment = self.plain_segment(SegReg::Cs, selector.0);
            return self.far_within(op, kind, segment, offset);
        }
        if selector.is_null() {
            return Err(self.gp(0));
        }
        let descriptor = self.descriptor(selector, Exception::general_protection)?;
        if let Some(kind_of_system) = descriptor.system_type() {
            return self.far_system(op, kind, selector, descriptor, kind_of_system);
        }
        let cpl = self.state.cpl();
        let allowed = if descriptor.is_conforming() {
            descriptor.dpl() <= cpl
        } else {
            selector.rpl() <= cpl && descriptor.dpl() == cpl
        };
        let reserved = self.state.long_mode() && descriptor.is_long_and_big();
        if !descriptor.is_code() || !allowed || reserved {
            return Err(self.gp(selector.code()));
        }
        if !descriptor.is_present() {
            return Err(self.raise(Exception::segment_not_present(selector.code())));
        }
        self.mark_accessed(&descriptor)?;
        self.far_within(op, kind, descriptor.segment(selector.with_rpl(cpl)), offset)
    }

    /// Finishes a transfer that keeps privilege and stack.
    fn far_within(&mut self, op: &Op, kind: Transfer, segment: Segment, offset: u64) -> Step {
        let rip = self.check_entry(&segment, offset)?;
        if kind == Transfer::Call {
            let mut stack = self.current_stack();
            self.push_to(&mut stack, op.size, u64::from(self.state.segment(SegReg::Cs).selector))?;
            self.push_to(&mut stack, op.size, op.next_rip())?;
            self.commit_stack(&stack);
        }
        self.enter(segment, rip);
        Err(Abort::EndBlock)
    }

    fn far_system(
        &mut self,
        op: &Op,
        kind: Transfer,
        selector: Selector,
        descriptor: Descriptor,
        system: u8,
    ) -> Step {
        let long = self.state.long_mode();
        match system {
            system_type::CALL_GATE => {
                self.call_gate(op, kind, selector, descriptor, if long { 8 } else { 4 })
            }
            system_type::CALL_GATE16 if !long => self.call_gate(op, kind, selector, descriptor, 2),
            system_type::TASK_GATE | system_type::TSS16_AVAILABLE | system_type::TSS_AVAILABLE
                if !long =>
            {
                self.note_task_switch();
                Err(self.gp(selector.code()))
            }
            _ => Err(self.gp(selector.code())),
        }
    }

    /// Selector and offset in `op`'s memory operand.
    fn far_pointer(&mut self, op: &Op) -> Result<(Selector, u64), Abort> {
        let size = u64::from(op.size);
        let addr = self.linear(op, size.wrapping_add(2), MemAccess::Read)?;
        let offset = match op.size {
            2 => u64::from(self.read::<u16>(addr)?),
            4 => u64::from(self.read::<u32>(addr)?),
            _ => self.read::<u64>(addr)?,
        };
        let selector = self.read::<u16>(self.wrap_linear(addr.wrapping_add(size)))?;
        Ok((Selector(selector), offset))
    }
}

/// `jmp ptr16:16/32`.
pub(crate) fn jmp_far(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.far(op, Transfer::Jump, Selector(op.disp as u16), op.imm & mask_of(op.size))
}

/// `call ptr16:16/32`.
pub(crate) fn call_far(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.far(op, Transfer::Call, Selector(op.disp as u16), op.imm & mask_of(op.size))
}

/// `jmp m16:16/32/64`.
pub(crate) fn jmp_far_mem(cpu: &mut Vcpu, op: &Op) -> Step {
    let (selector, offset) = cpu.far_pointer(op)?;
    cpu.far(op, Transfer::Jump, selector, offset)
}

/// `call m16:16/32/64`.
pub(crate) fn call_far_mem(cpu: &mut Vcpu, op: &Op) -> Step {
    let (selector, offset) = cpu.far_pointer(op)?;
    cpu.far(op, Transfer::Call, selector, offset)
}

/// `retf` and `retf imm16`: `imm` bytes of parameters are dropped from the stack, and
/// on a return to outer rings from the outer stack too.
pub(crate) fn ret_far(cpu: &mut Vcpu, op: &Op) -> Step {
    let mut stack = cpu.current_stack();
    let offset = cpu.pop_from(&mut stack, op.size)?;
    let selector = cpu.pop_from(&mut stack, op.size)? as u16;
    let parameters = op.imm & 0xffff;
    if !cpu.has_descriptors() {
        let segment = cpu.plain_segment(SegReg::Cs, selector);
        let rip = cpu.check_entry(&segment, offset)?;
        stack.skip(parameters);
        cpu.commit_stack(&stack);
        cpu.enter(segment, rip);
        return Err(Abort::EndBlock);
    }
    let landing = cpu.return_code(Selector(selector), offset)?;
    stack.skip(parameters);
    if landing.cpl == cpu.state.cpl() {
        cpu.commit_stack(&stack);
        cpu.enter(landing.segment, landing.rip);
        return Err(Abort::EndBlock);
    }
    let pointer = cpu.pop_from(&mut stack, op.size)?;
    let selector = cpu.pop_from(&mut stack, op.size)? as u16;
    let segment = cpu.return_stack(Selector(selector), &landing)?;
    cpu.land_outside(&landing, segment, pointer, parameters);
    Err(Abort::EndBlock)
}
