//! The ops that translated code may have interpreted: it has their addresses.
//!
//! They stay where they are until the code is gone. Most of a trace's ops are never asked
//! for (nothing of a register's arithmetic can fail), so only those are here that its code
//! names.

use std::num::NonZeroUsize;

use crate::decode::op::Op;

/// Ops of a region that get memory together.
const TOGETHER: usize = 1024;

/// Those of one region of the code memory, or of one translation that has no place there yet.
#[derive(Debug)]
pub(super) struct Ops {
    /// None grows beyond what it was made for, which would move its ops.
    chunks: Vec<Vec<Op>>,
    /// Ops in each.
    together: NonZeroUsize,
}

impl Default for Ops {
    fn default() -> Self {
        Self::in_chunks_of(TOGETHER)
    }
}

impl Ops {
    /// For ops that get memory for so many at a time.
    pub(super) fn in_chunks_of(together: usize) -> Self {
        let together = NonZeroUsize::new(together).unwrap_or(NonZeroUsize::MIN);
        Self { chunks: Vec::new(), together }
    }

    /// Keeps `op`, and says at what address.
    pub(super) fn keep(&mut self, op: &Op) -> u64 {
        if self.chunks.last().is_none_or(|chunk| chunk.len() == self.together.get()) {
            self.chunks.push(Vec::with_capacity(self.together.get()));
        }
        let Some(chunk) = self.chunks.last_mut() else { return 0 };
        chunk.push(*op);
        chunk.last().map_or(0, |kept| std::ptr::from_ref(kept) as u64)
    }

    /// Forgets all of them, and keeps the memory of the first ones.
    pub(super) fn clear(&mut self) {
        self.chunks.truncate(1);
        self.chunks.iter_mut().for_each(Vec::clear);
    }

    /// All of them, if they have got memory together.
    pub(super) fn together(&self) -> Option<&[Op]> {
        match self.chunks.as_slice() {
            [] => Some(&[]),
            [all] => Some(all),
            _ => None,
        }
    }

    /// How many there are, which is the next one's number.
    pub(super) fn count(&self) -> usize {
        let full = self.chunks.len().saturating_sub(1).saturating_mul(self.together.get());
        full.saturating_add(self.chunks.last().map_or(0, Vec::len))
    }

    /// The op of that number.
    pub(super) fn get(&self, number: usize) -> Option<&Op> {
        self.chunks.get(number / self.together)?.get(number % self.together)
    }

    /// The number of the op at `address`, which is among those that have got memory together with
    /// number `first`, or with the ones behind.
    pub(super) fn number(&self, address: u64, first: usize) -> Option<usize> {
        let chunk = first / self.together;
        [chunk, chunk.saturating_add(1)].into_iter().find_map(|chunk| {
            let start = self.chunks.get(chunk)?.as_ptr() as u64;
            let within = address.checked_sub(start)?.checked_div(size_of::<Op>() as u64)?;
            let number =
                usize::try_from(within).ok().filter(|within| *within < self.together.get())?;
            chunk.checked_mul(self.together.get())?.checked_add(number)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_ops_stay_where_they_are() {
        let mut ops = Ops::default();
        let count = 3 * TOGETHER as u64 + 1;
        let places: Vec<u64> = (0..count).map(|rip| ops.keep(&Op::idle(rip))).collect();
        let all: Vec<&Op> = ops.chunks.iter().flatten().collect();
        assert_eq!((all.len() as u64, ops.count() as u64), (count, count));
        for ((kept, place), rip) in all.iter().zip(places).zip(0..) {
            assert_eq!((std::ptr::from_ref(*kept) as u64, kept.rip), (place, rip));
            let first = (rip as usize).saturating_sub(100);
            assert_eq!(ops.number(place, first), Some(rip as usize));
            assert_eq!(ops.get(rip as usize).map(|op| op.rip), Some(rip));
        }
        assert_eq!(ops.number(0, 0), None);
    }
}
