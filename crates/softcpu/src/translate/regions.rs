//! Code memory in regions that are filled one after the other, again and again: when there is
//! no room left in one, the next is taken, and what has been in that one for longest of all is
//! given up. Each keeps what belongs to its translations, so that it goes with them.
//!
//! Translations and links have numbers, which say what region they are in and which of those in
//! it they are. A number means something else after its region has been given up: whoever keeps
//! one for longer keeps the region's *filling* with it, of which no two are alike.
//!
//! A region that has been given up is not found any more, but may be running: what its code needs
//! stays until it is filled again ([`super::code_cache`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::alignment;
use super::ops::Ops;
use super::relocate::Relocation;
use super::translations::{Entry, Link, Placed};
use super::wishes::Wanted;
use crate::memory::ram::RamFrame;

/// More than any translation takes.
pub(super) const LARGEST: usize = 1 << 16;
/// Regions there are to be, unless each would be too small or too large.
const WANTED: usize = 16;
/// log2 of the sizes they may have: two of the largest translations fit, and one is given up
/// before the guest misses the time.
const SMALLEST: u32 = LARGEST.ilog2() + 1;
const LARGEST_SIZE: u32 = 20;
/// Bytes in front of each translation: a jump to its way out, for when it is closed.
pub(super) const BEFORE: usize = 5;
/// Bits of a number that say which of its region's it is.
const WITHIN: u32 = 22;

/// Which filling of which region: no two are alike, and none has the number zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filling(u32);

/// The region of what has `number`.
fn region_of(number: u32) -> usize {
    (number >> WITHIN) as usize
}

/// Which of its region's it is.
fn within(number: u32) -> usize {
    (number & ((1 << WITHIN) - 1)) as usize
}

/// An instruction that may fault, by where it is in its translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Landing {
    pub(super) at: u16,
    /// Where its translation goes on then.
    pub(super) to: u16,
}

/// A jump from another region to a translation in this one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    /// Where its distance is, and in which filling.
    pub(super) at: u32,
    filling: Filling,
    /// The distance that leads to its own translation's way out.
    pub(super) own: u32,
}

/// What is in a region.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Translations in the order they were made.
    pub(super) blocks: Vec<Placed>,
    /// What they call the interpreter with.
    pub(super) ops: Ops,
    pub(super) links: Vec<Link>,
    /// What changes in those that can be moved.
    pub(super) relocations: Vec<Relocation>,
    /// Where those that fault go on.
    pub(super) landings: Vec<Landing>,
    /// What was to be translated in another way while this was filled.
    pub(super) wishes: Vec<Wanted>,
    /// The second frames of those that have two.
    pub(super) tails: Vec<RamFrame>,
    /// Jumps from elsewhere to them.
    pub(super) incoming: Vec<Incoming>,
}

/// A region.
#[derive(Debug)]
struct Region {
    /// Where it begins, behind the thunks if those are in it, and ends.
    start: usize,
    end: usize,
    /// Where its translations end.
    filled: usize,
    filling: Filling,
    /// It has been given up, as the so many-th: nobody is to come here any more.
    given_up: Option<u64>,
    contents: Contents,
}

/// Which filling each region has now, for whoever only wants to know whether something is still
/// there: no lock is needed for that.
#[derive(Debug)]
pub(super) struct Fillings {
    /// log2 of the regions' size.
    shift: u32,
    /// Where the code memory is executed, and how many bytes it has.
    base: u64,
    capacity: u64,
    /// Zero for one that has been given up.
    all: Box<[AtomicU32]>,
}

impl Fillings {
    /// The region that the byte at `offset` of the code memory is in.
    fn at(&self, offset: u64) -> Option<usize> {
        let last = self.all.len().checked_sub(1)?;
        (offset < self.capacity).then(|| ((offset >> self.shift) as usize).min(last))
    }

    /// Whether `entry` is still there.
    pub(super) fn has(&self, entry: Entry) -> bool {
        let region = self.at(entry.address.wrapping_sub(self.base));
        let filling = region.and_then(|region| self.all.get(region));
        filling.is_some_and(|filling| Filling(filling.load(Ordering::Acquire)) == entry.filling)
            && entry.filling != Filling::default()
    }

    pub(super) fn set(&self, n: usize, filling: Filling) {
        if let Some(known) = self.all.get(n) {
            known.store(filling.0, Ordering::Release);
        }
    }
}

/// All regions of a code memory.
#[derive(Debug)]
pub(super) struct Regions {
    /// Each as large as the others, but for what is over at the end.
    regions: Vec<Region>,
    fillings_now: Arc<Fillings>,
    /// The one that is being filled.
    current: usize,
    fillings: u32,
    /// Bytes of translations in all of them.
    used: usize,
}

impl Regions {
    /// Those of `capacity` bytes executed at `base`, the first `fixed` of which are not theirs.
    pub(super) fn new(base: u64, capacity: usize, fixed: usize) -> Self {
        let shift = (capacity / WANTED).max(1).ilog2().clamp(SMALLEST, LARGEST_SIZE);
        let count = (capacity >> shift).max(1);
        let bound = |n: usize| if n == count { capacity } else { n << shift };
        let regions = (0..count).map(|n| {
            let start = if n == 0 { fixed } else { bound(n) };
            let end = bound(n.saturating_add(1));
            Region {
                start,
                end,
                filled: start,
                filling: Filling::default(),
                given_up: None,
                contents: Contents::default(),
            }
        });
        let regions: Vec<Region> = regions.collect();
        let none = (0..count).map(|_| AtomicU32::new(0)).collect();
        let fillings_now = Arc::new(Fillings { shift, base, capacity: capacity as u64, all: none });
        let mut all = Self { regions, fillings_now, current: 0, fillings: 0, used: 0 };
        all.clear();
        all
    }

    /// Which fillings there are now.
    pub(super) fn fillings(&self) -> Arc<Fillings> {
        Arc::clone(&self.fillings_now)
    }

    /// Bytes of translations.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Bytes that are left in the region that is being filled.
    fn left(&self) -> usize {
        let left = |region: &Region| region.end.saturating_sub(region.filled);
        self.regions.get(self.current).map_or(0, left)
    }

    /// Whether `bytes` more fit into the region that is being filled.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        bytes.saturating_add(BEFORE).saturating_add(alignment::BLOCKS) <= self.left()
    }

    /// Whether most of the region that is being filled is.
    pub(super) fn is_nearly_full(&self) -> bool {
        self.left() < (1 << self.fillings_now.shift) / 4
    }

    /// Which region comes after the one that is being filled.
    pub(super) fn next(&self) -> usize {
        let next = self.current.saturating_add(1);
        if next < self.regions.len() { next } else { 0 }
    }

    /// As the how many-th region `n` has been given up, if it has.
    pub(super) fn given_up(&self, n: usize) -> Option<u64> {
        self.regions.get(n)?.given_up
    }

    /// Gives up region `n` as the `number`-th, and returns what was in it. What runs there still is
    /// to be [put back](Regions::keep).
    pub(super) fn give_up(&mut self, n: usize, number: u64) -> Contents {
        self.fillings_now.set(n, Filling::default());
        let Some(region) = self.regions.get_mut(n) else { return Contents::default() };
        region.given_up = Some(number);
        std::mem::take(&mut region.contents)
    }

    /// Region `n`, which was given up, has these contents until it is filled again.
    pub(super) fn keep(&mut self, n: usize, contents: Contents) {
        if let Some(region) = self.regions.get_mut(n) {
            region.contents = contents;
        }
    }

    /// Region `n` is the one to be filled from now on: nobody runs what was there.
    pub(super) fn fill(&mut self, n: usize) {
        self.renew(n);
        self.current = n;
    }

    /// Empties all of them.
    pub(super) fn clear(&mut self) {
        for n in 0..self.regions.len() {
            self.renew(n);
        }
        self.current = 0;
    }

    /// Empties region `n`.
    fn renew(&mut self, n: usize) {
        self.fillings = self.fillings.wrapping_add(1).max(1);
        let filling = Filling(self.fillings);
        let Some(region) = self.regions.get_mut(n) else { return };
        self.used = self.used.saturating_sub(region.filled.saturating_sub(region.start));
        (region.filled, region.filling, region.given_up) = (region.start, filling, None);
        region.contents = Contents::default();
        self.fillings_now.set(n, filling);
    }

    /// Whether `entry` is still there.
    pub(super) fn has(&self, entry: Entry) -> bool {
        self.fillings_now.has(entry)
    }

    /// Where the next translation begins.
    pub(super) fn next_offset(&self) -> Option<u32> {
        let free = self.regions.get(self.current)?.filled.checked_add(BEFORE)?;
        u32::try_from(free.checked_next_multiple_of(alignment::BLOCKS)?).ok()
    }

    /// The translation at `offset`, which is [`Regions::next_offset`], takes `len` bytes. `None`
    /// if there is no room for it.
    pub(super) fn take(&mut self, offset: usize, len: usize) -> Option<()> {
        let region = self.regions.get_mut(self.current)?;
        // Nothing else is tried here either, so that the next one has a region that is empty.
        let end = offset.saturating_add(len);
        let fits = end <= region.end;
        let filled = end.min(region.end);
        self.used = self.used.saturating_add(filled.saturating_sub(region.filled));
        region.filled = filled;
        fits.then_some(())
    }

    /// What is in the region that is being filled.
    pub(super) fn current(&mut self) -> Option<&mut Contents> {
        Some(&mut self.regions.get_mut(self.current)?.contents)
    }

    /// The same, to look at.
    pub(super) fn newest(&self) -> Option<&Contents> {
        Some(&self.regions.get(self.current)?.contents)
    }

    /// What is in the region of what has `number`.
    pub(super) fn of(&self, number: u32) -> Option<&Contents> {
        Some(&self.regions.get(region_of(number))?.contents)
    }

    /// The number in all regions of the current one's number `within`.
    pub(super) fn number(&self, within: usize) -> Option<u32> {
        let within = u32::try_from(within).ok().filter(|within| *within < 1 << WITHIN)?;
        Some((self.current as u32) << WITHIN | within)
    }

    /// The translation of that number.
    pub(super) fn block(&self, number: u32) -> Option<&Placed> {
        self.of(number)?.blocks.get(within(number))
    }

    pub(super) fn block_mut(&mut self, number: u32) -> Option<&mut Placed> {
        let region = self.regions.get_mut(region_of(number))?;
        region.contents.blocks.get_mut(within(number))
    }

    /// The link of that number.
    pub(super) fn link(&self, number: u32) -> Option<&Link> {
        self.of(number)?.links.get(within(number))
    }

    /// The links from `number` on in its region.
    pub(super) fn links_from(&self, number: u32) -> &[Link] {
        self.of(number).and_then(|of| of.links.get(within(number)..)).unwrap_or_default()
    }

    /// The region that the byte at `offset` of the code memory is in.
    fn at(&self, offset: u64) -> Option<usize> {
        self.fillings_now.at(offset)
    }

    /// The translation that has code at `address`.
    pub(super) fn block_at(&self, address: u64) -> Option<&Placed> {
        let offset = address.wrapping_sub(self.fillings_now.base);
        let blocks = &self.regions.get(self.at(offset)?)?.contents.blocks;
        // They are in the order of their places.
        let behind = blocks.partition_point(|placed| u64::from(placed.offset) <= offset);
        blocks.get(behind.checked_sub(1)?)
    }

    /// Where translated code goes on whose instruction at `address` has faulted.
    pub(super) fn landing(&self, address: u64) -> Option<u64> {
        let offset = address.wrapping_sub(self.fillings_now.base);
        let contents = &self.regions.get(self.at(offset)?)?.contents;
        let placed = self.block_at(address)?;
        let landings = placed.landings.of(&contents.landings)?;
        let at = offset.checked_sub(placed.offset.into())?;
        let place = landings.binary_search_by_key(&at, |landing| landing.at.into()).ok()?;
        let to = u64::from(landings.get(place)?.to);
        Some(self.fillings_now.base.wrapping_add(placed.offset.into()).wrapping_add(to))
    }

    /// In which filling what has `number` is.
    pub(super) fn filling_of(&self, number: u32) -> Option<Filling> {
        Some(self.regions.get(region_of(number))?.filling)
    }

    /// The jump whose distance is at `at`, and is `own` if it stays in its translation, goes to
    /// the translation at offset `to` from now on.
    pub(super) fn note_jump(&mut self, at: u32, own: u32, to: u64) {
        let Some(from) = self.at(at.into()) else { return };
        let Some(to) = self.at(to).filter(|to| *to != from) else { return };
        let Some(filling) = self.regions.get(from).map(|region| region.filling) else { return };
        if let Some(region) = self.regions.get_mut(to) {
            region.contents.incoming.push(Incoming { at, filling, own });
        }
    }

    /// Whether the jump is still there.
    pub(super) fn is_there(&self, jump: &Incoming) -> bool {
        let region = self.at(jump.at.into()).and_then(|at| self.regions.get(at));
        region.is_some_and(|region| region.filling == jump.filling)
    }

    /// Forgets what was to be translated in another way.
    pub(super) fn forget_wishes(&mut self) {
        for region in &mut self.regions {
            region.contents.wishes.clear();
        }
    }

    /// Whether a jump whose distance at `at` is `distance` stays in its region.
    pub(super) fn stays(&self, at: u32, distance: u32) -> bool {
        let to = at.wrapping_add(4).wrapping_add(distance);
        self.at(at.into()) == self.at(to.into())
    }

    /// Whether a jump whose distance at `at` is `distance` goes to region `n`.
    pub(super) fn leads_into(&self, at: u32, distance: u32, n: usize) -> bool {
        let to = at.wrapping_add(4).wrapping_add(distance);
        self.at(to.into()) == Some(n)
    }

    /// The offsets that region `n` lies between.
    pub(super) fn bounds(&self, n: usize) -> std::ops::Range<usize> {
        self.regions.get(n).map_or(0..0, |region| region.start..region.end)
    }

    /// All translations, region by region.
    pub(super) fn blocks(&self) -> impl Iterator<Item = &[Placed]> {
        self.regions.iter().map(|region| region.contents.blocks.as_slice())
    }
}

/// Whether what has `number` is in region `n`.
pub(super) fn is_in(number: u32, n: usize) -> bool {
    region_of(number) == n
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::mode::Mode;

    #[test]
    fn regions_are_neither_too_small_nor_too_large() {
        for (capacity, count) in
            [(256 << 10, 2), (300 << 10, 2), (1 << 20, 8), (8 << 20, 16), (128 << 20, 128)]
        {
            let regions = Regions::new(0, capacity, 3000);
            assert_eq!(regions.regions.len(), count, "{capacity}");
            let mut next = 3000;
            for region in &regions.regions {
                assert_eq!(region.start, next);
                assert!(region.end - region.start >= LARGEST + alignment::BLOCKS);
                next = region.end;
            }
            assert_eq!(next, capacity);
        }
    }

    #[test]
    fn what_is_oldest_goes_first_and_numbers_tell_where_they_are() {
        let mut regions = Regions::new(0x7000_0000, 512 << 10, 0);
        let (fillings, mut entries) = (regions.fillings(), Vec::new());
        for n in 0..6 {
            let offset = regions.next_offset().unwrap();
            assert!(regions.has_room(LARGEST) && regions.take(offset as usize, 100_000).is_some());
            assert_eq!(region_of(regions.number(5).unwrap()), n % 4);
            let filling = regions.filling_of(regions.number(0).unwrap()).unwrap();
            let address = 0x7000_0000 + u64::from(offset);
            entries.push(Entry { filling, mode: Mode::LONG, address, crosses: false });
            let there: Vec<_> = entries.iter().map(|entry| fillings.has(*entry)).collect();
            assert_eq!(there.iter().filter(|there| **there).count(), (n + 1).min(4));
            assert!(there[n] && !there[..n.saturating_sub(3)].contains(&true));
            assert_eq!(regions.used(), (64 + 100_000) * (n + 1).min(4));
            assert!(!regions.has_room(LARGEST));
            let next = regions.next();
            assert_eq!((next, regions.given_up(next)), ((n + 1) % 4, None));
            regions.give_up(next, 7);
            let there = entries.iter().filter(|entry| fillings.has(**entry)).count();
            assert_eq!((there, regions.given_up(next)), ((n + 1).min(3), Some(7)));
            regions.fill(next);
            assert_eq!(regions.given_up(next), None);
        }
        assert!(!fillings.has(Entry::default()));
        // What does not fit is not tried there again.
        let offset = regions.next_offset().unwrap();
        assert!(regions.take(offset as usize, 200_000).is_none() && !regions.has_room(1));
        regions.clear();
        assert_eq!(regions.used(), 0);
        assert!(entries.iter().all(|entry| !fillings.has(*entry)));
    }
}
