//! Stores to guest RAM that no vCPU did, byte by byte, noted while somebody wants to know:
//! two runs of the same guest code may differ by them ([`crate::lockstep`]).

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::copies::PAGE;
use super::ram::RamFrame;
use crate::sync::lock;

/// Which bytes of a page.
type Bytes = [bool; PAGE];

/// What was stored since it was last forgotten.
#[derive(Debug, Default)]
pub(crate) struct Outside {
    watched: AtomicBool,
    stores: Mutex<HashMap<RamFrame, Box<Bytes>>>,
}

impl Outside {
    /// Forgets what was stored, and notes what is from now on.
    pub(crate) fn watch(&self) {
        self.watched.store(true, Relaxed);
        lock(&self.stores).clear();
    }

    /// `len` bytes at `offset` of `frame` have been stored.
    #[inline]
    pub(super) fn stored(&self, frame: RamFrame, offset: u64, len: u64) {
        if self.watched.load(Relaxed) {
            let mut stores = lock(&self.stores);
            let page = stores.entry(frame).or_insert_with(|| Box::new([false; PAGE]));
            let rest = page.iter_mut().skip(offset as usize);
            rest.take(len as usize).for_each(|byte| *byte = true);
        }
    }

    /// Whether all bytes in which these two contents of `frame` differ have been stored.
    pub(crate) fn explains(&self, frame: RamFrame, a: &[u8; PAGE], b: &[u8; PAGE]) -> bool {
        let stores = lock(&self.stores);
        let Some(page) = stores.get(&frame) else { return false };
        a.iter().zip(b).zip(page.iter()).all(|((a, b), stored)| a == b || *stored)
    }
}
