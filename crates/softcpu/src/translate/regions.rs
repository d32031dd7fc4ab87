//! Code memory in regions that are filled one after the other, again and again: when there is
//! no room left in one, the next is taken, and what has been in that one for longest of all is
//! given up. Each keeps what belongs to its translations, so that it goes with them.
//!
//! Translations and links have numbers, which say what region they are in and which of those in
//! it they are. A number means something else after its region has been given up: whoever keeps
//! one for longer keeps the region's *filling* with it, of which no two are alike.

use foldhash::HashSet;

use super::alignment;
use super::cache::{Entry, Link, Placed};
use super::ops::Ops;
use super::relocate::Relocation;
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
    /// The addresses of those that were translated otherwise since.
    pub(super) retired: HashSet<u64>,
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
    contents: Contents,
}

/// All regions of a code memory.
#[derive(Debug)]
pub(super) struct Regions {
    /// Each as large as the others, but for what is over at the end.
    regions: Vec<Region>,
    /// log2 of the size.
    shift: u32,
    /// Where the code memory is executed.
    base: u64,
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
                filling: Filling(n as u32),
                contents: Contents::default(),
            }
        });
        let mut all =
            Self { regions: regions.collect(), shift, base, current: 0, fillings: 0, used: 0 };
        for n in 0..count {
            all.renew(n);
        }
        all
    }

    /// Bytes of translations.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Whether `bytes` more fit into the region that is being filled.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let room = |region: &Region| region.end.saturating_sub(region.filled);
        let bytes = bytes.saturating_add(alignment::BLOCKS);
        self.regions.get(self.current).is_some_and(|region| bytes <= room(region))
    }

    /// Goes on to the next region, and returns its number and what was in it until now.
    pub(super) fn next(&mut self) -> (u32, Contents) {
        self.current = self.current.saturating_add(1);
        if self.current >= self.regions.len() {
            self.current = 0;
        }
        (self.current as u32, self.renew(self.current))
    }

    /// Empties all of them.
    pub(super) fn clear(&mut self) {
        for n in 0..self.regions.len() {
            self.renew(n);
        }
        self.current = 0;
    }

    /// Empties region `n`, and returns what was in it.
    fn renew(&mut self, n: usize) -> Contents {
        self.fillings = self.fillings.wrapping_add(1);
        let filling = Filling(self.fillings);
        let Some(region) = self.regions.get_mut(n) else { return Contents::default() };
        self.used = self.used.saturating_sub(region.filled.saturating_sub(region.start));
        (region.filled, region.filling) = (region.start, filling);
        std::mem::take(&mut region.contents)
    }

    /// Where the next translation begins.
    pub(super) fn next_offset(&self) -> Option<u32> {
        let filled = self.regions.get(self.current)?.filled;
        u32::try_from(filled.checked_next_multiple_of(alignment::BLOCKS)?).ok()
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
        let last = self.regions.len().checked_sub(1)?;
        let end = self.regions.get(last)?.end as u64;
        (offset < end).then(|| ((offset >> self.shift) as usize).min(last))
    }

    /// Where translated code goes on whose instruction at `address` has faulted.
    pub(super) fn landing(&self, address: u64) -> Option<u64> {
        let offset = address.wrapping_sub(self.base);
        let contents = &self.regions.get(self.at(offset)?)?.contents;
        // They are in the order of their places.
        let behind = contents.blocks.partition_point(|placed| u64::from(placed.offset) <= offset);
        let placed = contents.blocks.get(behind.checked_sub(1)?)?;
        let landings = placed.landings.of(&contents.landings)?;
        let at = offset.checked_sub(placed.offset.into())?;
        let place = landings.binary_search_by_key(&at, |landing| landing.at.into()).ok()?;
        let to = u64::from(landings.get(place)?.to);
        Some(self.base.wrapping_add(placed.offset.into()).wrapping_add(to))
    }

    /// In which region `entry` was.
    fn region_of(&self, entry: Entry) -> Option<&Region> {
        self.regions.get(self.at(entry.address.wrapping_sub(self.base))?)
    }

    /// Whether `entry` is still there.
    pub(super) fn has(&self, entry: Entry) -> bool {
        self.region_of(entry).is_some_and(|region| region.filling == entry.filling)
    }

    /// In which filling what has `number` is.
    pub(super) fn filling_of(&self, number: u32) -> Option<Filling> {
        Some(self.regions.get(region_of(number))?.filling)
    }

    /// Whether `entry` was retired.
    pub(super) fn is_retired(&self, entry: Entry) -> bool {
        let retired = self.region_of(entry).map(|region| &region.contents.retired);
        retired.is_some_and(|retired| !retired.is_empty() && retired.contains(&entry.address))
    }

    /// The translation of that number is retired, which is at `address`.
    pub(super) fn retire(&mut self, number: u32, address: u64) {
        if let Some(region) = self.regions.get_mut(region_of(number)) {
            region.contents.retired.insert(address);
        }
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
    pub(super) fn leads_into(&self, at: u32, distance: u32, n: u32) -> bool {
        let to = at.wrapping_add(4).wrapping_add(distance);
        self.at(to.into()) == Some(n as usize)
    }

    /// The offsets that region `n` lies between.
    pub(super) fn bounds(&self, n: u32) -> std::ops::Range<usize> {
        self.regions.get(n as usize).map_or(0..0, |region| region.start..region.end)
    }

    /// All translations, region by region.
    pub(super) fn blocks(&self) -> impl Iterator<Item = &[Placed]> {
        self.regions.iter().map(|region| region.contents.blocks.as_slice())
    }
}

/// Whether what has `number` is in region `n`.
pub(super) fn is_in(number: u32, n: u32) -> bool {
    number >> WITHIN == n
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
        let mut entries = Vec::new();
        for n in 0..6 {
            let offset = regions.next_offset().unwrap();
            assert!(regions.has_room(LARGEST) && regions.take(offset as usize, 100_000).is_some());
            assert_eq!(region_of(regions.number(5).unwrap()), n % 4);
            let filling = regions.filling_of(regions.number(0).unwrap()).unwrap();
            let address = 0x7000_0000 + u64::from(offset);
            entries.push(Entry { filling, mode: Mode::LONG, address, crosses: false });
            let there: Vec<_> = entries.iter().map(|entry| regions.has(*entry)).collect();
            assert_eq!(there.iter().filter(|there| **there).count(), (n + 1).min(4));
            assert!(there[n] && !there[..n.saturating_sub(3)].contains(&true));
            assert_eq!(regions.used(), 100_000 * (n + 1).min(4));
            assert!(!regions.has_room(LARGEST));
            regions.next();
        }
        assert!(!regions.has(Entry::default()));
        // What does not fit is not tried there again.
        let offset = regions.next_offset().unwrap();
        assert!(regions.take(offset as usize, 200_000).is_none() && !regions.has_room(1));
        regions.clear();
        assert_eq!(regions.used(), 0);
        assert!(entries.iter().all(|entry| !regions.has(*entry)));
    }
}
