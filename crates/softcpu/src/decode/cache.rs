//! Decoded blocks, and finding the one for an address.
//!
//! A block is a straight run of instructions from one page, ending at a branch, at
//! something that changes the CPU's mode, or at the page's end. It is found by RIP and
//! checked against everything it was decoded under: the RAM frame and that frame's
//! version, the code size, CS base. So neither address-space switches nor TLB flushes
//! need to touch the cache, and stale blocks are never run; they are just overwritten.
//!
//! Each address has one place, so that looking there is quick. Some hot blocks share theirs
//! with another, and decoding both in turn would cost more than running all the others. So
//! what is displaced goes to a second table, by another hash, and comes back from there when
//! it is wanted again.
//!
//! Blocks that are not wanted any more are dropped when there are many ([`super::sweep`]).
//!
//! A third table finds a block by where its code is in RAM: many processes have the same
//! library at different addresses, and a block for another of them needs no decoding but only
//! to be moved ([`BlockCache::moved`]). Where there is a translation for it already, not even that is
//! done: the block is *hollow*, and gets its ops only when it is to be interpreted.

use std::cell::Cell;
use std::ops::Range;

use super::op::Op;
use super::sweep::Sweep;
use crate::addr::PAGE_OFFSET;
use crate::memory::huge;
use crate::memory::ram::RamFrame;
use crate::state::CodeSize;
use crate::translate::Entry;

/// Slots of the cache; direct-mapped.
const SLOTS: usize = 1 << 17;
/// Places to remember where the block for some code is.
const BY_CODE: usize = 1 << 17;
/// Blocks and ops, of 64 bytes each, at which the cache is swept: 16 MiB.
pub(super) const WEIGHT: usize = 1 << 18;
/// Places for displaced blocks.
const DISPLACED: usize = 1 << 16;

/// The part of a block that reaches into the next page: the single instruction of a
/// block may straddle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tail {
    /// Linear address of the second page.
    pub(crate) page: u64,
    pub(crate) frame: RamFrame,
    pub(crate) version: u32,
}

/// A decoded run of instructions. One cache line, like each of its ops.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Block {
    /// Linear address of its first byte.
    pub(crate) linear: u64,
    /// RIP of its first instruction.
    pub(crate) rip: u64,
    pub(crate) size: CodeSize,
    pub(crate) frame: RamFrame,
    pub(crate) version: u32,
    /// What few blocks have.
    pub(crate) rare: Option<Box<Rare>>,
    /// Its first op, among all that the cache has, and how many they are. None if it is hollow:
    /// there only for its translation.
    pub(super) first: u32,
    count: u16,
    /// Runs so far, until it is translated, and [`ORDERED`].
    runs: Cell<u32>,
    /// Its translation.
    pub(crate) entry: Cell<Option<Entry>>,
    /// It was wanted again since the cache was last swept.
    pub(crate) used: Cell<bool>,
}

const _: () = assert!(size_of::<Block>() == 64);

/// With the runs of a block whose translation is being made elsewhere.
const ORDERED: u32 = 1 << 31;

/// What a block must be looked at for more closely, each time before it runs.
#[derive(Debug)]
pub(crate) struct Rare {
    pub(crate) tail: Option<Tail>,
    /// The bytes it was decoded from, kept while another vCPU might still be able to
    /// write to them unseen, and the epoch that settles it.
    pub(crate) unsettled: Option<Unsettled>,
}

impl Block {
    /// A block at `rip`, whose first byte is at `linear` and in `frame` at `version`. It has what
    /// ops are in [`BlockCache::fresh`] when it is put to its slot.
    pub(crate) fn new(
        rip: u64,
        linear: u64,
        size: CodeSize,
        frame: RamFrame,
        version: u32,
    ) -> Self {
        Self {
            linear,
            rip,
            size,
            frame,
            version,
            rare: None,
            first: 0,
            count: 0,
            runs: Cell::default(),
            entry: Cell::default(),
            used: Cell::default(),
        }
    }

    /// The same, with a `tail` and what is not settled of it, if anything.
    pub(crate) fn with(mut self, tail: Option<Tail>, unsettled: Option<Unsettled>) -> Self {
        self.rare =
            (tail.is_some() || unsettled.is_some()).then(|| Box::new(Rare { tail, unsettled }));
        self
    }

    /// Nothing but a translation of code at `linear`, in a segment of base zero, for which nothing
    /// was decoded: it is as good as if it had run `runs` times.
    pub(crate) fn hollow(
        linear: u64,
        size: CodeSize,
        frame: RamFrame,
        version: u32,
        entry: Entry,
        runs: u32,
    ) -> Self {
        let block = Self::new(linear, linear, size, frame, version);
        block.set_runs(runs);
        block.entry.set(Some(entry));
        block
    }

    /// How often it has run.
    pub(crate) fn runs(&self) -> u32 {
        self.runs.get() & !ORDERED
    }

    /// It is as good as if it had run `runs` times, and nobody makes a translation of it.
    pub(crate) fn set_runs(&self, runs: u32) {
        self.runs.set(runs & !ORDERED);
    }

    /// Counts a run, and says how many there were.
    pub(crate) fn count_run(&self) -> u32 {
        let runs = self.runs().saturating_add(1) & !ORDERED;
        self.runs.set(self.runs.get() & ORDERED | runs);
        runs
    }

    /// Whether its translation, or one that comes by it, is being made elsewhere.
    pub(crate) fn is_ordered(&self) -> bool {
        self.runs.get() & ORDERED != 0
    }

    /// Its translation, or one that comes by it, is being made elsewhere, or is not any more.
    pub(crate) fn set_ordered(&self, ordered: bool) {
        self.runs.set(if ordered { self.runs() | ORDERED } else { self.runs() });
    }

    /// Whether it has no ops and cannot be interpreted.
    #[inline(always)]
    pub(crate) fn is_hollow(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn tail(&self) -> Option<Tail> {
        self.rare.as_ref()?.tail
    }

    pub(crate) fn unsettled(&self) -> Option<&Unsettled> {
        self.rare.as_ref()?.unsettled.as_ref()
    }

    /// Where its ops are.
    pub(super) fn range(&self) -> Range<usize> {
        let first = self.first as usize;
        first..first.saturating_add(self.count.into())
    }
}

/// See [`Rare::unsettled`].
#[derive(Debug)]
pub(crate) struct Unsettled {
    pub(crate) epoch: u64,
    pub(crate) bytes: Box<[u8]>,
}

/// The number of a block, or of none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Number(u32);

impl Number {
    pub(super) const NONE: Self = Self(0);

    pub(super) fn new(index: usize) -> Self {
        u32::try_from(index.saturating_add(1)).map_or(Self::NONE, Self)
    }

    fn index(self) -> Option<usize> {
        self.0.checked_sub(1).map(|index| index as usize)
    }
}

/// All decoded blocks of one vCPU.
///
/// Blocks and ops are each in one stretch of memory, in the order in which they were made. What
/// was replaced stays there until the cache is swept, and the others close up ([`Sweep`]).
#[derive(Debug, Default)]
pub(crate) struct BlockCache {
    pub(super) slots: Box<[Number]>,
    pub(super) displaced: Box<[Number]>,
    /// The last block that was made of some code, by where in RAM that is.
    pub(super) by_code: Box<[Number]>,
    pub(super) blocks: Vec<Block>,
    pub(super) ops: Vec<Op>,
    /// Ops of the block that is being made.
    pub(crate) fresh: Vec<Op>,
    /// How many blocks and ops there may be before those are dropped that nobody wants.
    pub(super) limit: usize,
    /// How far that has come, if it is being done.
    pub(super) sweep: Option<Sweep>,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        let empty = |places: usize| vec![Number::NONE; places].into_boxed_slice();
        Self {
            slots: empty(SLOTS),
            displaced: empty(DISPLACED),
            by_code: empty(BY_CODE),
            blocks: huge::vec_of(WEIGHT / 2),
            ops: huge::vec_of(WEIGHT),
            fresh: Vec::new(),
            limit: WEIGHT,
            sweep: None,
        }
    }

    /// The slot of the block at `linear`.
    #[inline(always)]
    pub(crate) fn slot(linear: u64) -> usize {
        ((linear ^ linear >> 17) as usize) & (SLOTS - 1)
    }

    /// Whatever block is in `slot`.
    #[inline(always)]
    pub(crate) fn get(&self, slot: usize) -> Option<&Block> {
        self.numbered(*self.slots.get(slot)?)
    }

    #[inline(always)]
    fn numbered(&self, number: Number) -> Option<&Block> {
        self.blocks.get(number.index()?)
    }

    /// The ops of `block`, one of this cache's.
    #[inline(always)]
    pub(crate) fn ops(&self, block: &Block) -> &[Op] {
        self.ops.get(block.range()).unwrap_or_default()
    }

    /// Puts `block`, with the fresh ops, into `slot`. What was there is kept for a while, unless
    /// the new block stands for the same code.
    pub(crate) fn put(&mut self, slot: usize, mut block: Block) {
        let number = Number::new(self.blocks.len());
        (block.first, block.count) = match u32::try_from(self.ops.len()) {
            Ok(first) => (first, self.fresh.len() as u16),
            Err(_) => (0, 0),
        };
        self.ops.append(&mut self.fresh);
        if !block.is_hollow()
            && let Some(known) = self.by_code.get_mut(code_slot(block.linear, block.frame))
        {
            *known = number;
        }
        self.blocks.push(block);
        self.install(slot, number);
    }

    /// Puts a hollow `block` into `slot`.
    pub(crate) fn put_hollow(&mut self, slot: usize, block: Block) {
        self.fresh.clear();
        self.put(slot, block);
    }

    /// Has block `number` in `slot`.
    fn install(&mut self, slot: usize, number: Number) {
        let Some(place) = self.slots.get_mut(slot) else { return };
        let old = std::mem::replace(place, number);
        let (Some(old_block), Some(block)) = (self.numbered(old), self.numbered(number)) else {
            return;
        };
        let same = old_block.linear == block.linear && old_block.frame == block.frame;
        let displaced = displaced_slot(old_block.linear);
        if let Some(place) = self.displaced.get_mut(displaced).filter(|_| !same) {
            *place = old;
        }
    }

    pub(super) fn held(&self) -> usize {
        self.blocks.len().saturating_add(self.ops.len())
    }

    /// A block for the same code at another address.
    pub(crate) fn twin(&self, linear: u64, frame: RamFrame) -> Option<&Block> {
        let number = *self.by_code.get(code_slot(linear, frame))?;
        let same = |block: &&Block| {
            block.frame == frame && (block.linear ^ linear) & PAGE_OFFSET == 0 && !block.is_hollow()
        };
        self.numbered(number).filter(same)
    }

    /// A block for 64-bit code at `linear`, made of its twin: programs are loaded where chance has
    /// it, and libraries by many. Its ops are fresh.
    pub(crate) fn moved(&mut self, linear: u64, frame: RamFrame) -> Option<Block> {
        let twin = self.twin(linear, frame)?;
        let distance = linear.wrapping_sub(twin.linear);
        let rip = twin.rip.wrapping_add(distance);
        let block = Block::new(rip, linear, twin.size, frame, twin.version);
        // What was hot there will be here, if it runs more than once.
        block.set_runs(twin.runs() / 2);
        let ops = self.ops.get(twin.range())?;
        self.fresh.clear();
        self.fresh.extend(ops.iter().map(|op| op.moved(distance)));
        Some(block)
    }

    /// Brings the block for this code back into `slot`, if it was displaced. Whether it is
    /// stale is for the caller to see.
    #[cold]
    pub(crate) fn bring_back(&mut self, slot: usize, linear: u64, frame: RamFrame) -> bool {
        let displaced = displaced_slot(linear);
        let Some(number) = self.displaced.get(displaced).copied() else { return false };
        let wanted = |block: &Block| block.linear == linear && block.frame == frame;
        if !self.numbered(number).is_some_and(wanted) {
            return false;
        }
        if let Some(place) = self.displaced.get_mut(displaced) {
            *place = Number::NONE;
        }
        self.install(slot, number);
        true
    }

    /// Forgets every block (the vCPU's own native stubs are about to be thrown away).
    pub(crate) fn clear(&mut self) {
        for places in [&mut self.slots, &mut self.displaced, &mut self.by_code] {
            places.fill(Number::NONE);
        }
        self.blocks.clear();
        self.ops.clear();
        self.limit = WEIGHT;
        self.sweep = None;
    }
}

/// Where it is remembered that there is a block for the code at `linear`, which is in `frame`.
pub(super) fn code_slot(linear: u64, frame: RamFrame) -> usize {
    // Frames that follow one another must not share places, so they are scattered.
    let scattered = u64::from(frame.0).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    ((linear & PAGE_OFFSET) ^ scattered) as usize & (BY_CODE - 1)
}

/// Where the block at `linear` goes when it is displaced: not by the bits that decide about
/// its slot, or those who share one would share this too.
pub(super) fn displaced_slot(linear: u64) -> usize {
    ((linear >> 4 ^ linear >> 17 ^ linear << 9) as usize) & (DISPLACED - 1)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Puts a block of one op to its slot.
    pub(in crate::decode) fn put(cache: &mut BlockCache, linear: u64, version: u32) {
        cache.fresh.push(Op::idle(linear));
        let block = Block::new(linear, linear, CodeSize::Bits64, RamFrame(1), version);
        cache.make_room();
        cache.put(BlockCache::slot(linear), block);
    }

    #[test]
    fn the_same_code_is_found_by_where_it_is_in_memory() {
        let mut cache = BlockCache::new();
        put(&mut cache, 0x1234, 1);
        assert_eq!(cache.twin(0x55_5234, RamFrame(1)).unwrap().linear, 0x1234);
        assert!(cache.twin(0x55_5235, RamFrame(1)).is_none());
        assert!(cache.twin(0x55_5234, RamFrame(2)).is_none());
    }

    #[test]
    fn a_block_without_ops_is_no_twin() {
        let mut cache = BlockCache::new();
        put(&mut cache, 0x1234, 1);
        let entry = Entry::default();
        let hollow = |linear| Block::hollow(linear, CodeSize::Bits64, RamFrame(1), 1, entry, 9);
        cache.put_hollow(BlockCache::slot(0x7_1234), hollow(0x7_1234));
        assert_eq!(cache.twin(0x55_5234, RamFrame(1)).unwrap().linear, 0x1234);
        assert!(cache.get(BlockCache::slot(0x7_1234)).unwrap().is_hollow());
    }

    #[test]
    fn blocks_that_share_a_slot_take_turns_in_it() {
        let mut cache = BlockCache::new();
        let (a, b) = (0x1234, 0x1234 ^ 0x4_0002_0001);
        let slot = BlockCache::slot(a);
        assert_eq!(slot, BlockCache::slot(b));
        assert_ne!(displaced_slot(a), displaced_slot(b));
        put(&mut cache, a, 1);
        put(&mut cache, b, 1);
        for linear in [a, b, a] {
            assert!(cache.bring_back(slot, linear, RamFrame(1)));
            assert_eq!(cache.get(slot).unwrap().linear, linear);
            assert!(!cache.bring_back(slot, linear, RamFrame(1)), "it is in its slot");
        }
        assert!(!cache.bring_back(slot, b, RamFrame(2)), "that is other code");
        put(&mut cache, a, 2);
        assert!(!cache.bring_back(slot, a, RamFrame(1)), "what it replaced is stale");
        cache.clear();
        assert!(cache.get(slot).is_none() && !cache.bring_back(slot, b, RamFrame(1)));
    }
}
