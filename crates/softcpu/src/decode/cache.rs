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
//! Blocks that are not wanted any more are dropped when there are many.
//!
//! A third table finds a block by where its code is in RAM: many processes have the same
//! library at different addresses, and a block for another of them needs no decoding but only
//! to be moved ([`Block::at`]). Where there is a translation for it already, not even that is
//! done: the block is *hollow*, and gets its ops only when it is to be interpreted.

use std::cell::Cell;

use super::op::Op;
use crate::addr::PAGE_OFFSET;
use crate::memory::ram::RamFrame;
use crate::state::CodeSize;
use crate::translate::Entry;

/// Slots of the cache; direct-mapped.
const SLOTS: usize = 1 << 17;
/// Places to remember where the block for some code is.
const BY_CODE: usize = 1 << 17;
/// Weight at which the cache is swept: ops of 64 bytes, 16 MiB.
const WEIGHT: usize = 1 << 18;
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

/// A decoded run of instructions.
#[derive(Debug)]
pub(crate) struct Block {
    /// Linear address of its first byte.
    pub(crate) linear: u64,
    /// RIP of its first instruction.
    pub(crate) rip: u64,
    pub(crate) size: CodeSize,
    pub(crate) frame: RamFrame,
    pub(crate) version: u32,
    pub(crate) tail: Option<Tail>,
    /// The bytes it was decoded from, kept while another vCPU might still be able to
    /// write to them unseen, and the epoch that settles it.
    pub(crate) unsettled: Option<Unsettled>,
    /// None if it is hollow: there only for its translation.
    pub(crate) ops: Box<[Op]>,
    /// Runs so far, until it is translated.
    pub(crate) runs: Cell<u32>,
    /// Its translation.
    pub(crate) entry: Cell<Option<Entry>>,
    /// It was wanted again since the cache was last swept.
    pub(crate) used: Cell<bool>,
}

impl Block {
    /// Nothing but a translation of code at `linear`, in a segment of base zero, for which nothing
    /// was decoded: it is as good as if it had run `runs` times.
    pub(crate) fn hollow(
        linear: u64,
        size: CodeSize,
        frame: RamFrame,
        version: u32,
        entry: Entry,
        runs: u32,
    ) -> Box<Self> {
        Box::new(Self {
            linear,
            rip: linear,
            size,
            frame,
            version,
            tail: None,
            unsettled: None,
            ops: Box::default(),
            runs: Cell::new(runs),
            entry: Cell::new(Some(entry)),
            used: Cell::default(),
        })
    }

    /// What it costs in memory, in ops: itself is as large as a few.
    fn weight(&self) -> usize {
        self.ops.len().saturating_add(3)
    }

    /// Whether it has no ops and cannot be interpreted.
    #[inline(always)]
    pub(crate) fn is_hollow(&self) -> bool {
        self.ops.is_empty()
    }
}

/// See [`Block::unsettled`].
#[derive(Debug)]
pub(crate) struct Unsettled {
    pub(crate) epoch: u64,
    pub(crate) bytes: Box<[u8]>,
}

/// All decoded blocks of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct BlockCache {
    slots: Box<[Option<Box<Block>>]>,
    displaced: Box<[Option<Box<Block>>]>,
    /// The slot of the last block that was made of some code, by where in RAM that is.
    by_code: Box<[u32]>,
    /// The weight of all blocks, and the one at which those are dropped that nobody wants.
    held: usize,
    limit: usize,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        let empty = |places: usize| (0..places).map(|_| None).collect();
        Self {
            slots: empty(SLOTS),
            displaced: empty(DISPLACED),
            by_code: vec![0; BY_CODE].into(),
            held: 0,
            limit: WEIGHT,
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
        self.slots.get(slot).and_then(Option::as_deref)
    }

    /// Puts a block into `slot`. What was there is kept for a while, unless the new block
    /// stands for the same code.
    pub(crate) fn put(&mut self, slot: usize, block: Box<Block>) {
        if self.held > self.limit {
            self.sweep();
        }
        let Some(place) = self.slots.get_mut(slot) else { return };
        let (linear, frame) = (block.linear, block.frame);
        self.held = self.held.saturating_add(block.weight());
        if !block.is_hollow()
            && let Some(known) = self.by_code.get_mut(code_slot(linear, frame))
        {
            *known = slot as u32;
        }
        let Some(old) = place.replace(block) else { return };
        let same = old.linear == linear && old.frame == frame;
        let displaced = self.displaced.get_mut(displaced_slot(old.linear));
        let gone = match displaced.filter(|_| !same) {
            Some(place) => place.replace(old),
            None => Some(old),
        };
        self.held = self.held.saturating_sub(gone.map_or(0, |gone| gone.weight()));
    }

    /// Drops the blocks that nobody has wanted since the last time: what a kernel runs once
    /// when it starts, above all. Those that are translated come back hollow.
    #[cold]
    fn sweep(&mut self) {
        self.held = 0;
        for place in self.slots.iter_mut().chain(&mut self.displaced) {
            if let Some(block) = place.take_if(|block| block.used.replace(false)) {
                self.held = self.held.saturating_add(block.weight());
                *place = Some(block);
            } else {
                *place = None;
            }
        }
        // Whoever needs more than that gets it.
        self.limit = self.held.saturating_mul(2).max(WEIGHT);
    }

    /// A block for the same code at another address.
    pub(crate) fn twin(&self, linear: u64, frame: RamFrame) -> Option<&Block> {
        let slot = *self.by_code.get(code_slot(linear, frame))?;
        let same = |block: &&Block| {
            block.frame == frame && (block.linear ^ linear) & PAGE_OFFSET == 0 && !block.is_hollow()
        };
        self.get(slot as usize).filter(same)
    }

    /// Brings the block for this code back into `slot`, if it was displaced. Whether it is
    /// stale is for the caller to see.
    #[cold]
    pub(crate) fn bring_back(&mut self, slot: usize, linear: u64, frame: RamFrame) -> bool {
        let Some(place) = self.displaced.get_mut(displaced_slot(linear)) else { return false };
        let wanted = |block: &mut Box<Block>| block.linear == linear && block.frame == frame;
        let Some(block) = place.take_if(wanted) else { return false };
        self.held = self.held.saturating_sub(block.weight());
        self.put(slot, block);
        true
    }

    /// Forgets every block (native stubs are about to be thrown away).
    pub(crate) fn clear(&mut self) {
        self.slots.fill_with(|| None);
        self.displaced.fill_with(|| None);
        (self.held, self.limit) = (0, WEIGHT);
    }
}

/// Where it is remembered that there is a block for the code at `linear`, which is in `frame`.
fn code_slot(linear: u64, frame: RamFrame) -> usize {
    // Frames that follow one another must not share places, so they are scattered.
    let scattered = u64::from(frame.0).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    ((linear & PAGE_OFFSET) ^ scattered) as usize & (BY_CODE - 1)
}

/// Where the block at `linear` goes when it is displaced: not by the bits that decide about
/// its slot, or those who share one would share this too.
fn displaced_slot(linear: u64) -> usize {
    ((linear >> 4 ^ linear >> 17 ^ linear << 9) as usize) & (DISPLACED - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(linear: u64, version: u32) -> Box<Block> {
        Box::new(Block {
            linear,
            rip: linear,
            size: CodeSize::Bits64,
            frame: RamFrame(1),
            version,
            tail: None,
            unsettled: None,
            ops: [Op::idle(linear)].into(),
            runs: Cell::default(),
            entry: Cell::default(),
            used: Cell::default(),
        })
    }

    #[test]
    fn what_nobody_wants_is_dropped_when_there_is_much() {
        let mut cache = BlockCache::new();
        let has = |cache: &BlockCache, linear| {
            cache.get(BlockCache::slot(linear)).is_some_and(|block| block.linear == linear)
        };
        let mut next = 0;
        let mut fill = |cache: &mut BlockCache| {
            for _ in 0..WEIGHT / block(0, 1).weight() {
                cache.put(BlockCache::slot(next), block(next, 1));
                next += 1;
            }
        };
        fill(&mut cache);
        assert!(has(&cache, 5) && has(&cache, 6), "there is room for all");
        cache.get(BlockCache::slot(6)).unwrap().used.set(true);
        for more in [1 << 40, 3 << 40] {
            cache.put(BlockCache::slot(more), block(more, 1));
        }
        assert!(!has(&cache, 5) && has(&cache, 6));
        fill(&mut cache);
        fill(&mut cache);
        assert!(!has(&cache, 6), "that is long ago");
        assert!(cache.held < 2 * WEIGHT, "{}", cache.held);
        cache.clear();
        assert_eq!(cache.held, 0);
    }

    #[test]
    fn the_same_code_is_found_by_where_it_is_in_memory() {
        let mut cache = BlockCache::new();
        cache.put(BlockCache::slot(0x1234), block(0x1234, 1));
        assert_eq!(cache.twin(0x55_5234, RamFrame(1)).unwrap().linear, 0x1234);
        assert!(cache.twin(0x55_5235, RamFrame(1)).is_none());
        assert!(cache.twin(0x55_5234, RamFrame(2)).is_none());
    }

    #[test]
    fn a_block_without_ops_is_no_twin() {
        let mut cache = BlockCache::new();
        cache.put(BlockCache::slot(0x1234), block(0x1234, 1));
        let entry = Entry::default();
        let hollow = |linear| Block::hollow(linear, CodeSize::Bits64, RamFrame(1), 1, entry, 9);
        cache.put(BlockCache::slot(0x7_1234), hollow(0x7_1234));
        assert_eq!(cache.twin(0x55_5234, RamFrame(1)).unwrap().linear, 0x1234);
        cache.put(BlockCache::slot(0x1234), hollow(0x1234));
        assert!(cache.twin(0x55_5234, RamFrame(1)).is_none());
    }

    #[test]
    fn blocks_that_share_a_slot_take_turns_in_it() {
        let mut cache = BlockCache::new();
        let (a, b) = (0x1234, 0x1234 ^ 0x4_0002_0001);
        let slot = BlockCache::slot(a);
        assert_eq!(slot, BlockCache::slot(b));
        assert_ne!(displaced_slot(a), displaced_slot(b));
        cache.put(slot, block(a, 1));
        cache.put(slot, block(b, 1));
        for linear in [a, b, a] {
            assert!(cache.bring_back(slot, linear, RamFrame(1)));
            assert_eq!(cache.get(slot).unwrap().linear, linear);
            assert!(!cache.bring_back(slot, linear, RamFrame(1)), "it is in its slot");
        }
        assert!(!cache.bring_back(slot, b, RamFrame(2)), "that is other code");
        cache.put(slot, block(a, 2));
        assert!(!cache.bring_back(slot, a, RamFrame(1)), "what it replaced is stale");
        cache.clear();
        assert!(cache.get(slot).is_none() && !cache.bring_back(slot, b, RamFrame(1)));
    }
}
