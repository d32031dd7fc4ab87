//! Call gates: the way into more privileged code that far calls and jumps have.
//!
//! Sources: SDM vol. 3, 5.8.2 to 5.8.5 (32-bit gates, privilege, stack switch) and
//! 5.8.3.1, 5.8.5.1 (64-bit gates); vol. 2, CALL and JMP.

use super::descriptor::{Descriptor, Selector};
use super::far::Transfer;
use super::stack::Cursor;
use crate::addr::GuestVirtAddr;
use crate::decode::op::Op;
use crate::exception::Exception;
use crate::state::regs::Gpr;
use crate::state::segment::{SegReg, Segment};
use crate::vcpu::{Abort, Step, Vcpu};

impl Vcpu {
    /// A far transfer through `gate`, whose frames are made of `size`-byte words: 2 and 4
    /// outside long mode, 8 in it.
    pub(crate) fn call_gate(
        &mut self,
        op: &Op,
        kind: Transfer,
        selector: Selector,
        gate: Descriptor,
        size: u8,
    ) -> Step {
        let cpl = self.state.cpl();
        if gate.dpl() < cpl || gate.dpl() < selector.rpl() {
            return Err(self.gp(selector.code()));
        }
        if !gate.is_present() {
            return Err(self.raise(Exception::segment_not_present(selector.code())));
        }
        let long = size == 8;
        let gate = if long {
            self.widen_descriptor(selector, gate, Exception::general_protection)?
        } else {
            gate
        };
        let target = gate.gate_selector();
        if target.is_null() {
            return Err(self.gp(0));
        }
        let code = self.descriptor(target, Exception::general_protection)?;
        let privilege = match kind {
            Transfer::Jump if !code.is_conforming() => code.dpl() == cpl,
            _ => code.dpl() <= cpl,
        };
        if !code.is_code() || !privilege || long && !code.is_long_code() {
            return Err(self.gp(target.code()));
        }
        if !code.is_present() {
            return Err(self.raise(Exception::segment_not_present(target.code())));
        }
        self.mark_accessed(&code)?;
        let inner = kind == Transfer::Call && !code.is_conforming() && code.dpl() < cpl;
        let new_cpl = if inner { code.dpl() } else { cpl };
        let segment = code.segment(target.with_rpl(new_cpl));
        let rip = self.check_entry(&segment, gate.gate_offset(size != 2))?;
        if !inner {
            if kind == Transfer::Call {
                let mut stack = self.current_stack();
                self.push_return(&mut stack, size, op)?;
                self.commit_stack(&stack);
            }
            self.enter(segment, rip);
            return Err(Abort::EndBlock);
        }

        let (mut stack, stack_segment) =
            if long { self.inner_stack64(new_cpl)? } else { self.inner_stack(new_cpl)? };
        let old_stack = u64::from(self.state.segment(SegReg::Ss).selector);
        let old_pointer = self.state.reg(Gpr::Rsp);
        self.push_to(&mut stack, size, old_stack)?;
        self.push_to(&mut stack, size, old_pointer)?;
        if !long {
            self.copy_parameters(&mut stack, size, gate.gate_parameters())?;
        }
        self.push_return(&mut stack, size, op)?;
        *self.state.segment_mut(SegReg::Ss) = stack_segment;
        // The old upper half of RSP means nothing on another stack.
        self.state.set_reg(Gpr::Rsp, stack.merge(0));
        self.enter(segment, rip);
        Err(Abort::EndBlock)
    }

    fn push_return(&mut self, stack: &mut Cursor, size: u8, op: &Op) -> Result<(), Abort> {
        self.push_to(stack, size, u64::from(self.state.segment(SegReg::Cs).selector))?;
        self.push_to(stack, size, op.next_rip())
    }

    fn copy_parameters(&mut self, to: &mut Cursor, size: u8, count: u64) -> Result<(), Abort> {
        // They lie in memory in ascending order and are pushed in descending order.
        for index in (0..count).rev() {
            let mut from = self.current_stack();
            from.skip(index.wrapping_mul(u64::from(size)));
            let parameter = self.pop_from(&mut from, size)?;
            self.push_to(to, size, parameter)?;
        }
        Ok(())
    }

    /// The stack that the TSS names for ring `cpl`, with its segment: outside long mode.
    /// What is wrong with it is reported as `#TS` (SDM vol. 2, CALL).
    pub(crate) fn inner_stack(&mut self, cpl: u8) -> Result<(Cursor, Segment), Abort> {
        let (selector, pointer) = self.task_stack(cpl)?;
        if selector.is_null() {
            return Err(self.raise(Exception::invalid_tss(selector.code())));
        }
        let descriptor = self.descriptor(selector, Exception::invalid_tss)?;
        self.check_stack(&descriptor, selector, cpl, Exception::invalid_tss)?;
        self.mark_accessed(&descriptor)?;
        let segment = descriptor.segment(selector);
        Ok((self.stack_in(segment, pointer, cpl), segment))
    }

    /// The same in long mode, where the stack segment becomes null.
    pub(crate) fn inner_stack64(&mut self, cpl: u8) -> Result<(Cursor, Segment), Abort> {
        let pointer = self.task_stack64(cpl)?;
        if !GuestVirtAddr(pointer).is_canonical() {
            return Err(self.raise(Exception::stack_segment(0)));
        }
        Ok((self.flat_stack(pointer, cpl), Segment::null_stack(u16::from(cpl), cpl)))
    }
}
