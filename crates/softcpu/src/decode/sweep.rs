//! Room for decoded blocks: those that nobody has wanted for a while are dropped, and the others
//! close up.
//!
//! A few are looked at whenever a block is made, so that the guest never waits for all of it.

use super::cache::{BlockCache, Number, WEIGHT, code_slot, displaced_slot};

/// Blocks that are swept for each that is made. The more, the sooner it is over.
const AT_A_TIME: usize = 16;

/// How far a sweep has come.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    /// The next block to look at.
    next: usize,
    /// How many blocks there were when it began.
    end: usize,
    /// How many of those looked at have stayed, and how many ops they have: they have closed up.
    blocks: usize,
    ops: usize,
}

impl BlockCache {
    /// Makes room for more blocks if there are many, a little each time. Says whether there was
    /// something to do.
    #[inline]
    pub(crate) fn make_room(&mut self) -> bool {
        if self.sweep.is_none() && self.held() > self.limit {
            self.sweep = Some(Sweep { end: self.blocks.len(), ..Sweep::default() });
        }
        let sweeps = self.sweep.is_some();
        if sweeps {
            self.sweep_on();
        }
        sweeps
    }

    /// Sweeps on.
    #[cold]
    fn sweep_on(&mut self) {
        let Some(mut sweep) = self.sweep.take() else { return };
        for _ in 0..AT_A_TIME {
            if sweep.next >= self.blocks.len() {
                self.blocks.truncate(sweep.blocks);
                self.ops.truncate(sweep.ops);
                // Whoever needs more gets it.
                self.limit = self.held().saturating_add(WEIGHT);
                return;
            }
            self.sweep_next(&mut sweep);
        }
        self.sweep = Some(sweep);
    }

    /// Drops the next block if nobody has wanted it since the last time: what a kernel runs once
    /// when it starts, above all. Those that are translated come back hollow.
    fn sweep_next(&mut self, sweep: &mut Sweep) {
        let (at, number) = (sweep.next, Number::new(sweep.next));
        sweep.next = at.saturating_add(1);
        let Some(block) = self.blocks.get_mut(at) else { return };
        let range = block.range();
        let places = [
            self.slots.get_mut(Self::slot(block.linear)),
            self.displaced.get_mut(displaced_slot(block.linear)),
            self.by_code.get_mut(code_slot(block.linear, block.frame)),
        ];
        let mut places = places.map(|place| place.filter(|place| **place == number));
        let reached = places.iter().take(2).any(Option::is_some);
        // What was made meanwhile had no time to be wanted again.
        let stays =
            reached && (at >= sweep.end || block.used.take()) && range.end <= self.ops.len();
        let to = if stays { Number::new(sweep.blocks) } else { Number::NONE };
        for place in places.iter_mut().flatten() {
            **place = to;
        }
        if stays {
            block.first = sweep.ops as u32;
            let len = range.len();
            self.ops.copy_within(range, sweep.ops);
            self.blocks.swap(at, sweep.blocks);
            sweep.blocks = sweep.blocks.saturating_add(1);
            sweep.ops = sweep.ops.saturating_add(len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_OFFSET;
    use crate::decode::cache::Block;
    use crate::decode::cache::tests::put;
    use crate::decode::op::Op;
    use crate::memory::ram::RamFrame;
    use crate::state::CodeSize;

    /// Sweeps all of it.
    fn sweep(cache: &mut BlockCache) {
        cache.limit = 0;
        while cache.make_room() && cache.sweep.is_some() {}
    }

    #[test]
    fn blocks_are_found_and_made_while_others_are_swept() {
        let mut cache = BlockCache::new();
        let mut random = 1_u64;
        let (mut swept, mut found, mut moved) = (0, 0, 0);
        let len = |linear: u64| 1 + (linear & PAGE_OFFSET) as usize % 3;
        for _ in 0..200_000 {
            cache.limit = cache.limit.min(1000);
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Few enough to be wanted again, some of which share slots.
            let linear = (random >> 40) & 0x3ff | (random >> 60) << 34;
            let slot = BlockCache::slot(linear);
            let good = |block: &Block| block.linear == linear;
            if !cache.get(slot).is_some_and(good) {
                cache.bring_back(slot, linear, RamFrame(1));
            }
            if let Some(block) = cache.get(slot).filter(|block| good(block)) {
                block.used.set(true);
                let ops: Vec<_> = cache.ops(block).iter().map(|op| op.rip).collect();
                assert_eq!(ops, vec![linear; len(linear)]);
                found += 1;
                continue;
            }
            swept += usize::from(cache.make_room() && cache.sweep.is_none());
            if let Some(block) = cache.moved(linear, RamFrame(1)) {
                moved += 1;
                cache.put(slot, block);
                continue;
            }
            cache.fresh.extend(vec![Op::idle(linear); len(linear)]);
            cache.put(slot, Block::new(linear, linear, CodeSize::Bits64, RamFrame(1), 1));
        }
        assert!(swept > 50 && found > 1000 && moved > 100, "{swept} {found} {moved}");
        assert!(cache.held() < 2 * WEIGHT);
    }

    #[test]
    fn what_nobody_wants_is_dropped_when_there_is_much() {
        let mut cache = BlockCache::new();
        let has = |cache: &BlockCache, linear| {
            cache.get(BlockCache::slot(linear)).is_some_and(|block| block.linear == linear)
        };
        let mut next = 0;
        let mut fill = |cache: &mut BlockCache| {
            // Each is a block and an op.
            for _ in 0..WEIGHT / 2 {
                put(cache, next, 1);
                next += 1;
            }
        };
        fill(&mut cache);
        assert!(has(&cache, 5) && has(&cache, 6), "there is room for all");
        cache.get(BlockCache::slot(6)).unwrap().used.set(true);
        sweep(&mut cache);
        assert!(!has(&cache, 5) && has(&cache, 6));
        fill(&mut cache);
        fill(&mut cache);
        assert!(!has(&cache, 6), "that is long ago");
        assert!(cache.held() < 2 * WEIGHT, "{}", cache.held());
        cache.clear();
        assert_eq!(cache.held(), 0);
    }

    #[test]
    fn those_that_stay_close_up_and_keep_their_ops() {
        let mut cache = BlockCache::new();
        let ops = |cache: &BlockCache, linear| {
            let block = cache.get(BlockCache::slot(linear)).unwrap();
            cache.ops(block).iter().map(|op| op.rip).collect::<Vec<u64>>()
        };
        for linear in [0x10, 0x20, 0x30, 0x40] {
            cache.fresh.push(Op::idle(linear + 1));
            put(&mut cache, linear, 1);
        }
        for linear in [0x20, 0x40] {
            cache.get(BlockCache::slot(linear)).unwrap().used.set(true);
        }
        sweep(&mut cache);
        assert_eq!((cache.blocks.len(), cache.ops.len()), (2, 4));
        assert_eq!([ops(&cache, 0x20), ops(&cache, 0x40)], [[0x21, 0x20], [0x41, 0x40]]);
        assert!(cache.get(BlockCache::slot(0x30)).is_none());
        let moved = cache.moved(0x7_0040, RamFrame(1)).unwrap();
        assert_eq!((moved.linear, cache.fresh.len()), (0x7_0040, 2));
        assert!(cache.twin(0x7_0030, RamFrame(1)).is_none());
    }
}
