//! Decoded blocks, and finding the one for an address.
//!
//! A block is a straight run of instructions from one page, ending at a branch, at
//! something that changes the CPU's mode, or at the page's end. It is found by RIP and
//! checked against everything it was decoded under: the RAM frame and that frame's
//! version, the code size, CS base. So neither address-space switches nor TLB flushes
//! need to touch the cache, and stale blocks are never run; they are just overwritten.

use super::op::Op;
use crate::memory::ram::RamFrame;
use crate::state::CodeSize;

/// Slots of the cache; direct-mapped.
const SLOTS: usize = 1 << 15;

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
    pub(crate) ops: Box<[Op]>,
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
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        Self { slots: (0..SLOTS).map(|_| None).collect() }
    }

    /// The slot of the block at `linear`.
    #[inline(always)]
    pub(crate) fn slot(linear: u64) -> usize {
        ((linear ^ linear >> 15) as usize) & (SLOTS - 1)
    }

    /// Whatever block is in `slot`.
    #[inline(always)]
    pub(crate) fn get(&self, slot: usize) -> Option<&Block> {
        self.slots.get(slot).and_then(Option::as_deref)
    }

    /// Puts a block into `slot`.
    pub(crate) fn put(&mut self, slot: usize, block: Box<Block>) {
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(block);
        }
    }

    /// Forgets every block (native stubs are about to be thrown away).
    pub(crate) fn clear(&mut self) {
        self.slots.fill_with(|| None);
    }
}
