//! Pushing and popping for control transfers, which must touch no register until
//! they are sure to succeed.
//!
//! A [`Cursor`] is a stack pointer on the side: frames are built or read through it,
//! and only a transfer that has passed all its checks writes it back.

use crate::addr::GuestVirtAddr;
use crate::exception::Exception;
use crate::mmu::View;
use crate::state::CodeSize;
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::state::segment::{SegReg, Segment};
use crate::vcpu::{Abort, Vcpu};

/// A stack pointer that has not been committed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    segment: Segment,
    /// 64-bit mode: no segment base, no limit, canonical addresses.
    flat: bool,
    view: View,
    /// The stack pointer's width.
    mask: u64,
    /// The stack pointer; only bits in `mask` are meaningful.
    pub(crate) pointer: u64,
    /// The selector part of the error code when the limit is exceeded.
    code: u32,
}

impl Cursor {
    /// The value the whole RSP register takes from this cursor, given what it held:
    /// a 16-bit stack leaves the upper bits alone.
    pub(crate) const fn merge(&self, rsp: u64) -> u64 {
        if self.mask == 0xffff {
            rsp & !0xffff | self.pointer & 0xffff
        } else {
            self.pointer & self.mask
        }
    }

    /// Moves over `bytes` without reading them.
    pub(crate) const fn skip(&mut self, bytes: u64) {
        self.pointer = self.pointer.wrapping_add(bytes) & self.mask;
    }
}

impl Vcpu {
    /// The view of ordinary accesses made at privilege level `cpl`.
    pub(crate) fn view_at(&self, cpl: u8) -> View {
        if cpl == 3 {
            View::User
        } else if self.mmu.rules.smap && self.state.rflags.contains(RFlags::AC) {
            View::KernelOverUser
        } else {
            View::Kernel
        }
    }

    /// The current stack.
    pub(crate) fn current_stack(&self) -> Cursor {
        let flat = self.state.code_size() == CodeSize::Bits64;
        let segment = *self.state.segment(SegReg::Ss);
        let mask = if flat {
            u64::MAX
        } else if segment.is_big() {
            0xffff_ffff
        } else {
            0xffff
        };
        let pointer = self.state.reg(Gpr::Rsp) & mask;
        Cursor { segment, flat, view: self.mmu.view, mask, pointer, code: 0 }
    }

    /// A stack in segment `segment` for code at privilege `cpl` outside 64-bit mode.
    pub(crate) fn stack_in(&self, segment: Segment, pointer: u64, cpl: u8) -> Cursor {
        let mask = if segment.is_big() { 0xffff_ffff } else { 0xffff };
        let code = u32::from(segment.selector & !3);
        let view = self.view_at(cpl);
        Cursor { segment, flat: false, view, mask, pointer: pointer & mask, code }
    }

    /// A 64-bit mode stack for code at privilege `cpl`.
    pub(crate) fn flat_stack(&self, pointer: u64, cpl: u8) -> Cursor {
        let segment = Segment::null_stack(0, cpl);
        Cursor { segment, flat: true, view: self.view_at(cpl), mask: u64::MAX, pointer, code: 0 }
    }

    fn stack_address(&mut self, stack: &Cursor, pointer: u64, size: u8) -> Result<u64, Abort> {
        if stack.flat {
            if GuestVirtAddr(pointer).is_canonical() {
                return Ok(pointer);
            }
        } else if stack.segment.admits(pointer, u64::from(size)) && !stack.segment.is_unusable() {
            return Ok(stack.segment.base.wrapping_add(pointer) & 0xffff_ffff);
        }
        Err(self.raise(Exception::stack_segment(stack.code)))
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of `value`.
    pub(crate) fn push_to(
        &mut self,
        stack: &mut Cursor,
        size: u8,
        value: u64,
    ) -> Result<(), Abort> {
        let pointer = stack.pointer.wrapping_sub(u64::from(size)) & stack.mask;
        let addr = self.stack_address(stack, pointer, size)?;
        match size {
            2 => self.write_as::<u16>(stack.view, addr, value as u16)?,
            4 => self.write_as::<u32>(stack.view, addr, value as u32)?,
            _ => self.write_as::<u64>(stack.view, addr, value)?,
        }
        stack.pointer = pointer;
        Ok(())
    }

    /// Pops `size` bytes (2, 4 or 8), zero-extended.
    pub(crate) fn pop_from(&mut self, stack: &mut Cursor, size: u8) -> Result<u64, Abort> {
        let addr = self.stack_address(stack, stack.pointer, size)?;
        let value = match size {
            2 => u64::from(self.read_as::<u16>(stack.view, addr)?),
            4 => u64::from(self.read_as::<u32>(stack.view, addr)?),
            _ => self.read_as::<u64>(stack.view, addr)?,
        };
        stack.skip(u64::from(size));
        Ok(value)
    }

    /// Writes the stack pointer back.
    pub(crate) fn commit_stack(&mut self, stack: &Cursor) {
        let rsp = stack.merge(self.state.reg(Gpr::Rsp));
        self.state.set_reg(Gpr::Rsp, rsp);
    }
}
