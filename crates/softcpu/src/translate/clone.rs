//! Translations of code that is at other addresses too.
//!
//! Many processes have the same programs and libraries, in the same RAM frames, each at
//! addresses that chance has chosen. So translations are also found by where their code is in
//! RAM. One that was made for another address is moved ([`super::relocate`]): the new one, a
//! *clone*, has its own bytes, links and ops, and becomes stale by itself, but it is there
//! before the code has run once, and nothing was decoded for it.

#[cfg(test)]
pub(super) mod tests;

use super::block;
use super::frames::{Code, Sought};
use super::maker::Maker;
use super::ops::Ops;
use super::regions::Regions;
use super::relocate::{self, Distance, MadeWith, Relocation};
use super::translations::{Entry, Placed, Translations};

/// Relocations of one translation, among all of them, or its landings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Span {
    start: u32,
    len: u16,
}

impl Span {
    /// Puts `some` behind `all`.
    pub(super) fn push<T: Copy>(all: &mut Vec<T>, some: &[T]) -> Self {
        let (Ok(start), Ok(len)) = (u32::try_from(all.len()), u16::try_from(some.len())) else {
            return Self::default();
        };
        all.extend_from_slice(some);
        Self { start, len }
    }

    /// The same with relocations, which only what is `movable` needs.
    pub(super) fn of_movable(
        all: &mut Vec<Relocation>,
        some: &[Relocation],
        movable: bool,
    ) -> Self {
        if movable { Self::push(all, some) } else { Self::default() }
    }

    /// Those of `all` that it stands for, if there are any.
    pub(super) fn of<T>(self, all: &[T]) -> Option<&[T]> {
        let start = self.start as usize;
        all.get(start..start.checked_add(usize::from(self.len))?).filter(|all| !all.is_empty())
    }
}

/// What a clone is made from.
struct Source<'a> {
    placed: Placed,
    /// The ops that are its region's, and the clone's.
    ops: &'a Ops,
    moved_ops: &'a Ops,
    /// Which of those is the first one of the clone.
    first_op: usize,
    regions: &'a Regions,
}

impl MadeWith for Source<'_> {
    fn op(&self, address: u64) -> Option<u64> {
        let first = self.placed.first_op as usize;
        let number = self.ops.number(address, first)?.checked_sub(first)?;
        let op = self.moved_ops.get(self.first_op.checked_add(number)?)?;
        Some(std::ptr::from_ref(op) as u64)
    }

    fn link(&self, number: u32) -> Option<usize> {
        let link = self.regions.link(number)?;
        Some(link.offset.checked_sub(self.placed.offset)? as usize)
    }
}

impl Translations {
    /// The number of a translation of `sought`, at whichever address it was made.
    pub(super) fn find(&self, sought: Sought) -> Option<u32> {
        let Sought { rip, frame, version, mode } = sought;
        let number = self.frames.newest(frame, Code::at(rip, mode))?;
        let stands = !self.regions.block(number)?.stale;
        (stands && self.frames.version(frame) == Some(version)).then_some(number)
    }

    /// The translation `number`, if it is for the code at `rip`, and who had it made.
    pub(super) fn entry_at(&self, number: u32, rip: u64) -> Option<(Entry, u32)> {
        let placed = self.regions.block(number).filter(|placed| placed.rip == rip)?;
        let address = self.memory.address(placed.offset as usize) as u64;
        let filling = self.regions.filling_of(number)?;
        let entry = Entry { filling, mode: placed.mode, address, crosses: false };
        Some((entry, placed.by))
    }

    /// How much room a clone of the translation `number` takes, for its code at `rip`. `None` if
    /// it cannot or should not be moved there.
    pub(super) fn room_for_clone(&self, number: u32, rip: u64) -> Option<usize> {
        let origin = self.regions.block(number)?;
        origin.relocations.of(&self.regions.of(number)?.relocations)?;
        // What is to have a check for each access here has something better to come.
        let wish = self.wish(origin.frame, rip, origin.mode);
        let better = origin.manner.shares && wish.separate || !origin.manner.hot && wish.hot;
        (!better && origin.mode.is_movable() && relocate::is_movable(rip))
            .then_some(origin.len as usize)
    }
}

impl Maker {
    /// Makes a clone of the translation `number`, for its code at `rip`. `None` if it cannot
    /// be moved there, or there is no room.
    pub(super) fn clone_to(
        &mut self,
        translations: &mut Translations,
        number: u32,
        version: u32,
        rip: u64,
    ) -> Option<Entry> {
        let origin = *translations.regions.block(number)?;
        let relocations =
            origin.relocations.of(&translations.regions.of(number)?.relocations)?.to_vec();
        let landings = origin.landings.of(&translations.regions.of(number)?.landings);
        let landings = landings.unwrap_or_default().to_vec();
        let newest = translations.regions.newest()?;
        let placed = Placed {
            offset: translations.regions.next_offset()?,
            rip,
            first_op: u32::try_from(newest.ops.count()).ok()?,
            first_link: translations.regions.number(newest.links.len())?,
            relocations: Span::push(&mut translations.regions.current()?.relocations, &relocations),
            landings: Span::push(&mut translations.regions.current()?.landings, &landings),
            by: self.number,
            ..origin
        };
        let distance = Distance {
            guest: rip.wrapping_sub(origin.rip),
            host: u64::from(placed.offset).wrapping_sub(origin.offset.into()),
            links: placed.first_link.wrapping_sub(origin.first_link),
        };
        let (first, count) = (origin.first_op as usize, origin.ops);
        for op in first..first.checked_add(count.into())? {
            let op = translations.regions.of(number)?.ops.get(op)?.moved(distance.guest);
            translations.regions.current()?.ops.keep(&op);
        }
        let source = Source {
            placed: origin,
            ops: &translations.regions.of(number)?.ops,
            moved_ops: &translations.regions.newest()?.ops,
            first_op: placed.first_op as usize,
            regions: &translations.regions,
        };
        let mut code =
            translations.memory.read(origin.offset as usize, origin.len as usize).to_vec();
        if relocate::relocate(&mut code, &relocations, distance, &source).is_none() {
            // Nobody tries that again.
            if let Some(origin) = translations.regions.block_mut(number) {
                origin.relocations = Span::default();
            }
            return None;
        }
        let links = translations.regions.links_from(origin.first_link).iter();
        let links: Vec<block::Link> = links
            .take_while(|link| link.from == number)
            .map(|link| block::Link {
                at: link.offset.wrapping_sub(origin.offset) as usize,
                target: link.target.wrapping_add(distance.guest),
            })
            .collect();
        let address = translations.memory.address(placed.offset as usize) as u64;
        self.look_at(rip, &code, address, &landings)?;
        let entry = translations.add(&code, &links, placed, version, None)?;
        #[cfg(test)]
        tests::compare(translations, &self.thunks, number, &links);
        self.counters.moved = self.counters.moved.wrapping_add(1);
        self.counters.bytes = self.counters.bytes.wrapping_add(placed.len.into());
        Some(entry)
    }
}
