//! The ops that translated code may have interpreted: it has their addresses.
//!
//! They stay where they are until the code is gone. Most of a trace's ops are never asked
//! for (nothing of a register's arithmetic can fail), so only those are here that its code
//! names.

use crate::decode::op::Op;

/// Ops that get memory together.
const TOGETHER: usize = 1024;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Ops {
    /// None grows beyond what it was made for, which would move its ops.
    chunks: Vec<Vec<Op>>,
}

impl Ops {
    /// Keeps `op`, and says at what address.
    pub(super) fn keep(&mut self, op: &Op) -> u64 {
        if self.chunks.last().is_none_or(|chunk| chunk.len() == chunk.capacity()) {
            self.chunks.push(Vec::with_capacity(TOGETHER));
        }
        let Some(chunk) = self.chunks.last_mut() else { return 0 };
        chunk.push(*op);
        chunk.last().map_or(0, |kept| std::ptr::from_ref(kept) as u64)
    }

    /// Forgets them all. Nobody may have the address of one any more.
    pub(super) fn clear(&mut self) {
        self.chunks.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::transfer;
    use crate::state::{GPR_ZERO, SEG_FLAT};

    #[test]
    fn kept_ops_stay_where_they_are() {
        let op = |rip| Op {
            run: transfer::undefined,
            rip,
            imm: 0,
            disp: 0,
            addr_mask: u64::MAX,
            base: GPR_ZERO,
            index: GPR_ZERO,
            scale: 0,
            seg: SEG_FLAT,
            dst: 0,
            src: 0,
            aux: 0,
            len: 1,
            code: 0,
            flags: crate::decode::op::OpFlags::LONG,
            size: 0,
        };
        let mut ops = Ops::default();
        let count = 3 * TOGETHER as u64 + 1;
        let places: Vec<u64> = (0..count).map(|rip| ops.keep(&op(rip))).collect();
        let all: Vec<&Op> = ops.chunks.iter().flatten().collect();
        assert_eq!(all.len() as u64, count);
        for ((kept, place), rip) in all.iter().zip(places).zip(0..) {
            assert_eq!((std::ptr::from_ref(*kept) as u64, kept.rip), (place, rip));
        }
    }
}
