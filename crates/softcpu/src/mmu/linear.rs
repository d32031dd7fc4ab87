//! Segmentation: from an offset in a segment to a linear address.
//!
//! In 64-bit code that is an addition. Elsewhere the segment's type and limit are
//! checked first (SDM vol. 3, 5.3 to 5.5). Instruction handlers call this before
//! [`super::access`].

use super::Access;
use crate::decode::op::{Op, OpFlags};
use crate::exception::Exception;
use crate::state::CodeSize;
use crate::state::segment::{Access as Rights, SegReg};
use crate::vcpu::{Abort, Vcpu};

impl Vcpu {
    /// The linear address of `size` bytes at `offset` in segment `seg`, with the
    /// segment's checks outside 64-bit mode (SDM vol. 3, 5.3 to 5.5).
    #[inline]
    pub(crate) fn segmented(
        &mut self,
        seg: SegReg,
        offset: u64,
        size: u64,
        access: Access,
    ) -> Result<u64, Abort> {
        if self.state.code_size() == CodeSize::Bits64 {
            let base = if matches!(seg, SegReg::Fs | SegReg::Gs) {
                self.state.segment(seg).base
            } else {
                0
            };
            return Ok(base.wrapping_add(offset));
        }
        self.check_segment(seg as u8, offset, size, access)?;
        Ok(self.state.segment(seg).base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Whether `size` bytes at `offset` of segment slot `seg` may be accessed, outside
    /// 64-bit mode. `#SS(0)` for the stack segment, `#GP(0)` for the others.
    #[inline(never)]
    pub(crate) fn check_segment(
        &mut self,
        seg: u8,
        offset: u64,
        size: u64,
        access: Access,
    ) -> Result<(), Abort> {
        let segment = *self.state.seg_slot(seg);
        let last = offset.wrapping_add(size.wrapping_sub(1));
        let code = segment.access.contains(Rights::CODE);
        let low_bit = segment.access.contains(Rights::WRITE_OR_READ);
        let permitted = match access {
            Access::Fetch => code || !self.state.protected_mode(),
            Access::Read => !code || low_bit,
            // Real and virtual-8086 mode never check the type.
            Access::Write => !code && low_bit || !self.state.protected_mode(),
        };
        let limit = u64::from(segment.limit);
        let inside = if !code && segment.access.contains(Rights::DOWN_OR_CONFORMING) {
            let top = if segment.is_big() { u64::from(u32::MAX) } else { 0xffff };
            offset > limit && last <= top && last >= offset
        } else {
            last <= limit && last >= offset
        };
        if permitted && inside && !segment.access.contains(Rights::UNUSABLE) {
            return Ok(());
        }
        Err(self.raise(if seg == SegReg::Ss as u8 {
            Exception::stack_segment(0)
        } else {
            Exception::general_protection(0)
        }))
    }

    /// The linear address of `op`'s memory operand of `size` bytes.
    #[inline(always)]
    pub(crate) fn linear(&mut self, op: &Op, size: u64, access: Access) -> Result<u64, Abort> {
        let offset = op.effective(&self.state);
        if op.flags.contains(OpFlags::LEGACY) {
            return self.linear_legacy(op.seg, offset, size, access);
        }
        let base = self.state.seg_slot(op.seg).base;
        Ok(base.wrapping_add(offset))
    }

    fn linear_legacy(
        &mut self,
        seg: u8,
        offset: u64,
        size: u64,
        access: Access,
    ) -> Result<u64, Abort> {
        self.check_segment(seg, offset, size, access)?;
        let base = self.state.seg_slot(seg).base;
        Ok(base.wrapping_add(offset) & 0xffff_ffff)
    }
}
