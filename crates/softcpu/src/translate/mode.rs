//! What a translation takes for granted of the mode that its code runs in.
//!
//! 64-bit code is alike wherever it runs. 32- and 16-bit code is not: where its segment is, how
//! wide the stack is, and whether a segment is all of the linear address space (*flat*) or must
//! be added and checked, is up to descriptors. What hardly ever changes is part of a
//! translation's [`Mode`], and is looked at once, when it is made; whoever looks for a translation
//! asks for the present mode's only. What changes with each thread (where FS and GS are, and
//! other segments that are not flat) is looked up in the vCPU as the code runs. Only
//! instructions that end a trace load segment registers, so a mode holds from the entry of a
//! trace to its end.
//!
//! Nobody comes to code beyond its segment's limit: jumps there that a trace knows of are the
//! interpreter's, and all others find what the run loop has found before, which has looked.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use foldhash::HashMap;
use iced_x86::Register as R;

use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::code_cache::CodeCache;
use super::fields::{self, Field};
use super::registers::{ADDRESS, VALUE};
use crate::addr::{GuestVirtAddr, PAGE_SHIFT};
use crate::decode::op::{Op, OpFlags};
use crate::state::segment::{Access, SegReg, Segment};
use crate::state::{CodeSize, GPR_ZERO, SEG_FLAT};
use crate::sync::lock;
use crate::vcpu::Vcpu;

bitflags::bitflags! {
    /// What is the case in a [`Mode`]; nothing of it in 64-bit code.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    struct Facts: u8 {
        /// Segments matter.
        const LEGACY = 1 << 0;
        /// The stack pointer is ESP, not SP.
        const BIG_STACK = 1 << 1;
        /// ES is flat.
        const FLAT_ES = 1 << 2;
        /// SS is.
        const FLAT_SS = 1 << 3;
        /// DS is.
        const FLAT_DS = 1 << 4;
        /// 16-bit code.
        const SMALL = 1 << 5;
    }
}

/// A mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Mode {
    facts: Facts,
    /// The number of the code segment, of [`CodeSegments`]: bytes, for which there is room in
    /// what blocks remember of their translations.
    segment: [u8; 2],
}

impl Mode {
    /// 64-bit code.
    pub(crate) const LONG: Self = Self { facts: Facts::empty(), segment: [0; 2] };

    /// 32-bit code in a flat segment, all others not.
    #[cfg(test)]
    pub(crate) const FLAT32: Self = Self { facts: Facts::LEGACY, ..Self::LONG };

    /// Whether the same code at another address can have the same translation: 16-bit code would
    /// wrap elsewhere, and in a segment with a base, RIP counts from there.
    pub(crate) fn is_movable(self) -> bool {
        self.segment == [0; 2] && !self.facts.contains(Facts::SMALL)
    }

    /// How wide the stack pointer is, bytes.
    pub(super) fn pointer(self) -> u8 {
        match (self.facts.contains(Facts::LEGACY), self.facts.contains(Facts::BIG_STACK)) {
            (false, _) => 8,
            (true, true) => 4,
            (true, false) => 2,
        }
    }

    /// `op` with the segment of its memory operand left out if that is flat.
    pub(super) fn operand(self, op: &Op) -> Op {
        let flat = match op.seg {
            0 => self.facts.contains(Facts::FLAT_ES),
            2 => self.facts.contains(Facts::FLAT_SS),
            3 => self.facts.contains(Facts::FLAT_DS),
            _ => false,
        };
        Op { seg: if flat { SEG_FLAT } else { op.seg }, ..*op }
    }
}

/// Where code is: what RIP counts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum CodeSegment {
    /// In 64-bit code, nothing.
    #[default]
    Long,
    /// The base of a segment, whose last byte is that far from there.
    Legacy { base: u32, limit: u32 },
}

impl CodeSegment {
    /// All of the address space.
    const FLAT: Self = Self::Legacy { base: 0, limit: u32::MAX };

    /// The linear address of the code at `rip`.
    pub(super) fn linear(self, rip: u64) -> u64 {
        match self {
            Self::Long => rip,
            Self::Legacy { base, .. } => u64::from(base).wrapping_add(rip) & 0xffff_ffff,
        }
    }

    /// Whether the code at `a` and at `b` is in one page.
    pub(super) fn in_one_page(self, a: u64, b: u64) -> bool {
        self.linear(a) >> PAGE_SHIFT == self.linear(b) >> PAGE_SHIFT
    }

    /// Whether code may jump to `target`.
    pub(super) fn reaches(self, target: u64) -> bool {
        match self {
            Self::Long => GuestVirtAddr(target).is_canonical(),
            Self::Legacy { limit, .. } => target <= u64::from(limit),
        }
    }
}

/// The numbers of the code segments that code was run in, for all vCPUs that share translations.
pub(super) type SegmentNumbers = Mutex<HashMap<CodeSegment, u16>>;

/// The code segments that code was run in, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct CodeSegments {
    numbers: Arc<SegmentNumbers>,
    /// The present one; none if there are no more numbers.
    number: Option<u16>,
}

impl CodeSegments {
    /// Those that vCPUs have who share `code`.
    pub(crate) fn of(code: &CodeCache) -> Self {
        Self { numbers: Arc::clone(&code.segments), number: None }
    }

    /// Code is in `segment` from now on.
    fn enter(&mut self, segment: CodeSegment) {
        self.number = match segment {
            CodeSegment::Long | CodeSegment::FLAT => Some(0),
            segment => {
                let mut numbers = lock(&self.numbers);
                numbers.get(&segment).copied().or_else(|| {
                    let number = u16::try_from(numbers.len().saturating_add(1)).ok()?;
                    numbers.insert(segment, number);
                    Some(number)
                })
            }
        };
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
            CodeSize::Bits32 => self.legacy_mode(Facts::LEGACY),
            CodeSize::Bits16 => self.legacy_mode(Facts::LEGACY | Facts::SMALL),
        }
    }

    fn legacy_mode(&self, mut facts: Facts) -> Option<Mode> {
        let protected = self.state.protected_mode();
        facts.set(Facts::BIG_STACK, self.state.segment(SegReg::Ss).is_big());
        let segments = [
            (SegReg::Es, Facts::FLAT_ES),
            (SegReg::Ss, Facts::FLAT_SS),
            (SegReg::Ds, Facts::FLAT_DS),
        ];
        for (register, flat) in segments {
            let segment = self.state.segment(register);
            facts.set(flat, segment.base == 0 && room(segment, protected) == ALL);
        }
        Some(Mode { facts, segment: self.code_segments.number?.to_le_bytes() })
    }

    /// Where code is now.
    #[inline]
    pub(super) fn code_segment(&self) -> CodeSegment {
        if self.code_size == CodeSize::Bits64 {
            return CodeSegment::Long;
        }
        let code = self.state.segment(SegReg::Cs);
        CodeSegment::Legacy { base: code.base as u32, limit: code.limit }
    }

    /// The code segment may be another one from now on.
    pub(crate) fn code_segment_changed(&mut self) {
        self.code_segments.enter(self.code_segment());
    }

    /// Brings what translated code reads of segments up to date.
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
