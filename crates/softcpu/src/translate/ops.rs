//! The ops that translated code may have interpreted: it has their addresses.
//!
//! They stay where they are until the code is gone. Most of a trace's ops are never asked
//! for (nothing of a register's arithmetic can fail), so only those are here that its code
//! names.

use crate::decode::op::Op;

/// Ops that get memory together.
const TOGETHER: usize = 1024;

/// Those of one region of the code memory.
#[derive(Debug, Default)]
pub(super) struct Ops {
    /// None grows beyond what it was made for, which would move its ops.
    chunks: Vec<Vec<Op>>,
}

impl Ops {
    /// Keeps `op`, and says at what address.
    pub(super) fn keep(&mut self, op: &Op) -> u64 {
        if self.chunks.last().is_none_or(|chunk| chunk.len() == TOGETHER) {
            self.chunks.push(Vec::with_capacity(TOGETHER));
        }
        let Some(chunk) = self.chunks.last_mut() else { return 0 };
        chunk.push(*op);
        chunk.last().map_or(0, |kept| std::ptr::from_ref(kept) as u64)
    }

    /// How many there are, which is the next one's number.
    pub(super) fn count(&self) -> usize {
        let full = self.chunks.len().saturating_sub(1).saturating_mul(TOGETHER);
        full.saturating_add(self.chunks.last().map_or(0, Vec::len))
    }

    /// The op of that number.
    pub(super) fn get(&self, number: usize) -> Option<&Op> {
        self.chunks.get(number / TOGETHER)?.get(number % TOGETHER)
    }

    /// The number of the op at `address`, which is among the [`TOGETHER`] from `first` on.
    pub(super) fn number(&self, address: u64, first: usize) -> Option<usize> {
        let chunk = first / TOGETHER;
        [chunk, chunk.saturating_add(1)].into_iter().find_map(|chunk| {
            let start = self.chunks.get(chunk)?.as_ptr() as u64;
            let within = address.checked_sub(start)?.checked_div(size_of::<Op>() as u64)?;
            let number = usize::try_from(within).ok().filter(|within| *within < TOGETHER)?;
            chunk.checked_mul(TOGETHER)?.checked_add(number)
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
