//! Invalidation by force: every now and then code is taken for changed though nobody has
//! stored to it ([`Invalidate`]).
//!
//! A guest changes its code seldom, and mostly while it starts, so what becomes of
//! translations then is hardly tried by its real work. Here it is: at random moments the page
//! that the vCPU runs in, or one that it has a translation of, gets a new version by the same
//! way as with a store, so this vCPU and all others find their translations stale, wherever
//! they are. No byte has changed, so a guest that notices has found a bug.

use super::config::Invalidate;
use crate::addr::PAGE_SIZE;
use crate::memory::ram::RamFrame;
use crate::vcpu::Vcpu;

/// When it is time again.
#[derive(Debug)]
pub(super) struct Schedule {
    every: u64,
    /// Moments until then.
    left: u64,
    random: u64,
}

impl Schedule {
    pub(super) fn new(wanted: Invalidate) -> Self {
        let mut schedule = Self {
            every: wanted.every.get().into(),
            left: 0,
            // Zero would stay zero; and seeds that people choose differ in few bits.
            random: (wanted.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1,
        };
        schedule.left = schedule.next_wait();
        schedule
    }

    /// Lets a moment pass. If it was the one, returns a random number for it.
    fn tick(&mut self) -> Option<u64> {
        self.left = self.left.saturating_sub(1);
        if self.left > 0 {
            return None;
        }
        self.left = self.next_wait();
        Some(self.draw())
    }

    /// From 1 to twice the mean.
    fn next_wait(&mut self) -> u64 {
        let most = self.every.saturating_mul(2).saturating_sub(1).max(1);
        self.draw().checked_rem(most).unwrap_or_default().saturating_add(1)
    }

    /// Marsaglia's xorshift.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 11
    }
}

impl Vcpu {
    /// To be called between instructions, where others may have changed code: a moment at
    /// which code may be taken for changed, if that is wanted. Says whether some was.
    #[inline(always)]
    pub(super) fn invalidate_if_due(&mut self) -> bool {
        if let Some(translator) = &mut self.translator
            && let Some(schedule) = &mut translator.invalidation
            && let Some(random) = schedule.tick()
        {
            self.invalidate(random)
        } else {
            false
        }
    }

    #[cold]
    fn invalidate(&mut self, random: u64) -> bool {
        let (here, choice) = (random & 1 == 0, random >> 1);
        let frame = if here { self.frame_here() } else { self.any_translated_frame(choice) };
        let hit = frame.is_some_and(|frame| self.memory.code().written(frame, 0, PAGE_SIZE));
        // The rest of a block that is being run may be what has changed.
        self.code_hit |= hit;
        hit
    }

    fn frame_here(&self) -> Option<RamFrame> {
        Some(self.mmu.code.lookup(self.mmu.is_user(), self.state.rip)?.frame)
    }

    fn any_translated_frame(&self, choice: u64) -> Option<RamFrame> {
        let regions = &self.translator.as_ref()?.code.lock().regions;
        let all = regions.blocks().map(|blocks| blocks.len() as u64).sum();
        let mut number = choice.checked_rem(all)? as usize;
        regions.blocks().find_map(|blocks| {
            let block = blocks.get(number);
            number = number.saturating_sub(blocks.len());
            block.map(|block| block.frame)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn the_wait_has_the_mean_that_was_asked_for() {
        for every in [1, 2, 1000] {
            let wanted = Invalidate { every: NonZeroU32::new(every).unwrap(), seed: 7 };
            let mut schedule = Schedule::new(wanted);
            let times = (0..100_000_u32).filter(|_| schedule.tick().is_some()).count() as f64;
            let wanted = 100_000.0 / f64::from(every);
            assert!((0.75..1.25).contains(&(times / wanted)), "{every}: {times}");
        }
    }
}
