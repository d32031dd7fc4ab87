//! Translations of code that is at other addresses too.
//!
//! Many processes have the same programs and libraries, in the same RAM frames, each at
//! addresses that chance has chosen. So translations are also found by where their code is in
//! RAM. One that was made for another address is moved ([`super::relocate`]): the new one, a
//! *clone*, has its own bytes, links and ops, and becomes stale by itself, but it is there
//! before the code has run once, and nothing was decoded for it.

#[cfg(test)]
mod tests;

use super::block;
use super::cache::{Entry, Link, Placed, Translator};
use super::mode::Mode;
use super::ops::Ops;
use super::relocate::{self, Distance, MadeWith, Relocation};
use crate::addr::PAGE_OFFSET;
use crate::memory::ram::RamFrame;

/// Relocations of one translation, among all of them. None has none: its way out has some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Span {
    start: u32,
    len: u16,
}

impl Span {
    /// Puts `relocations` behind `all`.
    pub(super) fn push(all: &mut Vec<Relocation>, relocations: &[Relocation]) -> Self {
        let (Ok(start), Ok(len)) = (u32::try_from(all.len()), u16::try_from(relocations.len()))
        else {
            return Self::default();
        };
        all.extend_from_slice(relocations);
        Self { start, len }
    }

    /// Those of `all` that it stands for, if there are any.
    fn of(self, all: &[Relocation]) -> Option<&[Relocation]> {
        let start = self.start as usize;
        all.get(start..start.checked_add(usize::from(self.len))?).filter(|all| !all.is_empty())
    }
}

/// The code at a page offset of a frame, in a mode.
pub(super) type Code = (RamFrame, u16, Mode);

/// The code at `rip`, which is in `frame`, in `mode`.
pub(super) fn code_at(frame: RamFrame, rip: u64, mode: Mode) -> Code {
    (frame, (rip & PAGE_OFFSET) as u16, mode)
}

/// What a clone is made from.
struct Source<'a> {
    placed: Placed,
    ops: &'a Ops,
    /// The number of the first op of the clone.
    first_op: usize,
    links: &'a [Link],
}

impl MadeWith for Source<'_> {
    fn op(&self, address: u64) -> Option<u64> {
        let first = self.placed.first_op as usize;
        let number = self.ops.number(address, first)?.checked_sub(first)?;
        let op = self.ops.get(self.first_op.checked_add(number)?)?;
        Some(std::ptr::from_ref(op) as u64)
    }

    fn link(&self, number: u32) -> Option<usize> {
        let link = self.links.get(number as usize)?;
        link.offset.checked_sub(self.placed.offset as usize)
    }
}

impl Translator {
    /// The number of a translation of the code at the place of `rip` in `frame`, in `mode`, at
    /// whichever address it was made.
    pub(super) fn find(&self, frame: RamFrame, version: u32, rip: u64, mode: Mode) -> Option<u32> {
        let number = *self.by_code.get(&code_at(frame, rip, mode))?;
        let stands =
            !self.blocks.get(number as usize)?.stale && self.frames.get(&frame)?.0 == version;
        stands.then_some(number)
    }

    /// The translation `number`, if it is for the code at `rip`.
    pub(super) fn entry_at(&self, number: u32, rip: u64) -> Option<Entry> {
        let placed = self.blocks.get(number as usize).filter(|placed| placed.rip == rip)?;
        let address = self.memory.address(placed.offset as usize) as u64;
        Some(Entry { generation: self.generation, mode: placed.mode, address, crosses: false })
    }

    /// Makes a clone of the translation `number`, for its code at `rip`. `None` if it cannot
    /// be moved there, or there is no room.
    pub(super) fn clone_to(&mut self, number: u32, version: u32, rip: u64) -> Option<Entry> {
        let origin = *self.blocks.get(number as usize)?;
        let relocations = origin.relocations.of(&self.relocations)?;
        // What is to have a check for each access here has something better to come.
        let wish = self.wish(origin.frame, rip, origin.mode);
        let better = origin.manner.shares && wish.separate || !origin.manner.hot && wish.hot;
        if better || !relocate::is_movable(rip) || !self.has_room() {
            return None;
        }
        let (first, last) = (origin.first_op as usize, origin.ops);
        let placed = Placed {
            offset: self.next_offset()?,
            rip,
            first_op: u32::try_from(self.ops.count()).ok()?,
            first_link: u32::try_from(self.links.len()).ok()?,
            ..origin
        };
        let distance = Distance {
            guest: rip.wrapping_sub(origin.rip),
            host: u64::from(placed.offset).wrapping_sub(origin.offset.into()),
            links: placed.first_link.wrapping_sub(origin.first_link),
        };
        for op in first..first.checked_add(last.into())? {
            let op = self.ops.get(op)?.moved(distance.guest);
            self.ops.keep(&op);
        }
        let source = Source {
            placed: origin,
            ops: &self.ops,
            first_op: placed.first_op as usize,
            links: &self.links,
        };
        let mut code = self.memory.read(origin.offset as usize, origin.len as usize).to_vec();
        if relocate::relocate(&mut code, relocations, distance, &source).is_none() {
            // Nobody tries that again.
            if let Some(origin) = self.blocks.get_mut(number as usize) {
                origin.relocations = Span::default();
            }
            return None;
        }
        let links = self.links.get(origin.first_link as usize..)?.iter();
        let links: Vec<block::Link> = links
            .take_while(|link| link.from == number)
            .map(|link| block::Link {
                at: link.offset.wrapping_sub(origin.offset as usize),
                target: link.target.wrapping_add(distance.guest),
            })
            .collect();
        let entry = self.add(&code, &links, placed, version, None)?;
        #[cfg(test)]
        tests::compare(self, number, &links);
        self.counters.moved = self.counters.moved.wrapping_add(1);
        Some(entry)
    }
}
