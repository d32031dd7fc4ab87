//! What a translation takes for granted of the mode that its code runs in.
//!
//! 64-bit code is alike wherever it runs. 32-bit code is not: how wide the stack is, and
//! whether a segment is all of the linear address space (*flat*) or must be added and checked,
//! is up to descriptors. What hardly ever changes is part of a translation's [`Mode`], and is
//! looked at once, when it is made; whoever looks for a translation asks for the present mode's
//! only. What changes with each thread (where FS and GS are, and other segments that are not
//! flat) is looked up in the vCPU as the code runs. Only instructions that end a trace load
//! segment registers, so a mode holds from the entry of a trace to its end.

#[cfg(test)]
mod tests;

use iced_x86::Register as R;

use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::fields::{self, Field};
use super::registers::{ADDRESS, VALUE};
use crate::decode::op::{Op, OpFlags};
use crate::state::segment::{Access, SegReg, Segment};
use crate::state::{CodeSize, GPR_ZERO, SEG_FLAT};
use crate::vcpu::Vcpu;

bitflags::bitflags! {
    /// A mode. None of the flags is 64-bit code.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub(crate) struct Mode: u8 {
        /// 32-bit code, in a segment that is flat.
        const LEGACY = 1 << 0;
        /// The stack pointer is ESP, not SP.
        const BIG_STACK = 1 << 1;
        /// ES is flat.
        const FLAT_ES = 1 << 2;
        /// SS is.
        const FLAT_SS = 1 << 3;
        /// DS is.
        const FLAT_DS = 1 << 4;
    }
}

impl Mode {
    /// 64-bit code.
    pub(crate) const LONG: Self = Self::empty();

    /// `op` with the segment of its memory operand left out if that is flat.
    pub(super) fn operand(self, op: &Op) -> Op {
        let flat = match op.seg {
            0 => self.contains(Self::FLAT_ES),
            2 => self.contains(Self::FLAT_SS),
            3 => self.contains(Self::FLAT_DS),
            _ => false,
        };
        Op { seg: if flat { SEG_FLAT } else { op.seg }, ..*op }
    }
}

/// How many bytes a segment has from offset zero on that may be loaded and stored; none if it is
/// not of that kind.
fn room(segment: &Segment, protected: bool) -> u64 {
    let access = segment.access;
    let plain = access.contains(Access::WRITE_OR_READ) || !protected;
    let other = Access::CODE | Access::DOWN_OR_CONFORMING | Access::UNUSABLE;
    if plain && !access.intersects(other) { u64::from(segment.limit).wrapping_add(1) } else { 0 }
}

/// Bytes of a segment that is all of the address space.
const ALL: u64 = 1 << 32;

impl Vcpu {
    /// The mode that code is translated for now; `None` for code that is not translated.
    #[inline]
    pub(crate) fn translation_mode(&self) -> Option<Mode> {
        match self.code_size {
            CodeSize::Bits64 => Some(Mode::LONG),
            CodeSize::Bits32 => self.legacy_mode(),
            CodeSize::Bits16 => None,
        }
    }

    fn legacy_mode(&self) -> Option<Mode> {
        let code = self.state.segment(SegReg::Cs);
        if code.base != 0 || code.limit != u32::MAX {
            return None;
        }
        let protected = self.state.protected_mode();
        let mut mode = Mode::LEGACY;
        mode.set(Mode::BIG_STACK, self.state.segment(SegReg::Ss).is_big());
        let segments =
            [(SegReg::Es, Mode::FLAT_ES), (SegReg::Ss, Mode::FLAT_SS), (SegReg::Ds, Mode::FLAT_DS)];
        for (register, flat) in segments {
            let segment = self.state.segment(register);
            mode.set(flat, segment.base == 0 && room(segment, protected) == ALL);
        }
        Some(mode)
    }

    /// Brings what translated 32-bit code reads of segments up to date.
    pub(super) fn sync_segments(&mut self) {
        let protected = self.state.protected_mode();
        for (known, segment) in self.context.rooms.iter_mut().zip(&self.state.seg) {
            *known = room(segment, protected);
        }
    }
}

/// Whether `op`'s memory operand is in a segment whose base and limit are to be looked up.
pub(super) fn is_segmented(op: &Op) -> bool {
    op.flags.contains(OpFlags::LEGACY) && op.seg != SEG_FLAT
}

/// Where it is that segment `slot` has so many bytes.
const fn room_of(slot: u8) -> Field {
    Field(fields::ROOMS.0.wrapping_add((slot as u32 & 7).wrapping_mul(8)))
}

impl Assembler {
    /// Goes to `slow` unless all `len` bytes of `op`'s memory operand lie in its segment, which
    /// may be loaded and stored then. Uses [`VALUE`] and [`ADDRESS`].
    ///
    /// # Errors
    /// As [`Assembler::effective`].
    pub(super) fn within_segment(
        &mut self,
        op: &Op,
        len: u8,
        slow: Label,
    ) -> Result<(), NotCopied> {
        let last = u64::from(len).saturating_sub(1);
        if op.base == GPR_ZERO && op.index == GPR_ZERO && op.disp.wrapping_add(last) >= ALL {
            return Err(NotCopied);
        }
        self.effective(VALUE, op, 0)?;
        self.lea(ADDRESS, VALUE, R::None, 1, last as i64)?;
        self.compare(ADDRESS, room_of(op.seg));
        self.jump_if(Condition::BELOW.negated(), slow);
        Ok(())
    }
}
