//! What far returns and `iret` share: checking the code and stack segments that were
//! popped, and arriving in an outer ring.
//!
//! Sources: SDM vol. 2, RET and IRET pseudo-code; vol. 3, 5.8.6.

use super::descriptor::Selector;
use crate::exception::Exception;
use crate::state::regs::Gpr;
use crate::state::segment::{Access, SegReg, Segment};
use crate::vcpu::{Abort, Vcpu};

/// Where a return goes: all checks on the code segment have passed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landing {
    /// CS as it will be.
    pub(crate) segment: Segment,
    /// RIP as it will be.
    pub(crate) rip: u64,
    /// The privilege level returned to: the selector's RPL.
    pub(crate) cpl: u8,
}

impl Vcpu {
    /// Checks the code segment a return names.
    pub(crate) fn return_code(
        &mut self,
        selector: Selector,
        offset: u64,
    ) -> Result<Landing, Abort> {
        if selector.is_null() {
            return Err(self.gp(0));
        }
        let descriptor = self.descriptor(selector, Exception::general_protection)?;
        let cpl = selector.rpl();
        let privilege = if descriptor.is_conforming() {
            descriptor.dpl() <= cpl
        } else {
            descriptor.dpl() == cpl
        };
        let reserved = self.state.long_mode() && descriptor.is_long_and_big();
        if !descriptor.is_code() || cpl < self.state.cpl() || !privilege || reserved {
            return Err(self.gp(selector.code()));
        }
        if !descriptor.is_present() {
            return Err(self.raise(Exception::segment_not_present(selector.code())));
        }
        let segment = descriptor.segment(selector);
        let rip = self.check_entry(&segment, offset)?;
        self.mark_accessed(&descriptor)?;
        Ok(Landing { segment, rip, cpl })
    }

    /// Checks the stack segment a return pops along with its stack pointer.
    pub(crate) fn return_stack(
        &mut self,
        selector: Selector,
        landing: &Landing,
    ) -> Result<Segment, Abort> {
        if selector.is_null() {
            let long = self.state.long_mode() && landing.segment.is_long();
            if long && landing.cpl != 3 && selector.rpl() == landing.cpl {
                return Ok(Segment::null_stack(selector.0, landing.cpl));
            }
            return Err(self.gp(0));
        }
        let descriptor = self.descriptor(selector, Exception::general_protection)?;
        self.check_stack(&descriptor, selector, landing.cpl, Exception::general_protection)?;
        self.mark_accessed(&descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Arrives at `landing` with a new stack, `skip` bytes above `pointer`. Data segments
    /// that the outer ring may not use become null, but keep their bases, as on hardware:
    /// that of GS is in use in 64-bit code whatever its selector says.
    pub(crate) fn land_outside(
        &mut self,
        landing: &Landing,
        stack: Segment,
        pointer: u64,
        skip: u64,
    ) {
        self.set_returned_stack(landing, stack, pointer.wrapping_add(skip));
        let outer = landing.cpl > self.state.cpl();
        *self.state.segment_mut(SegReg::Ss) = stack;
        if outer {
            for reg in [SegReg::Es, SegReg::Fs, SegReg::Gs, SegReg::Ds] {
                let segment = *self.state.segment(reg);
                let conforming = segment.access.contains(Access::CODE | Access::DOWN_OR_CONFORMING);
                if !segment.is_unusable() && !conforming && segment.dpl() < landing.cpl {
                    *self.state.segment_mut(reg) =
                        Segment { base: segment.base, ..Segment::null(0) };
                }
            }
        }
        self.enter(landing.segment, landing.rip);
    }

    /// A 16-bit stack takes only SP; the rest of RSP stays (which Linux's espfix code
    /// both suffers from and works around).
    fn set_returned_stack(&mut self, landing: &Landing, stack: Segment, pointer: u64) {
        let long = self.state.long_mode() && landing.segment.is_long();
        let old = self.state.reg(Gpr::Rsp);
        let rsp = if long {
            pointer
        } else if stack.is_big() {
            pointer & 0xffff_ffff
        } else {
            old & !0xffff | pointer & 0xffff
        };
        self.state.set_reg(Gpr::Rsp, rsp);
    }
}
