//! Remembering that a large page was cut into small TLB entries.
//!
//! The TLB holds 4 KiB translations only, so a 2 MiB or 1 GiB page of the guest's is
//! there in as many pieces as were touched. INVLPG of any address in it must find them
//! all: `LargePages` says how far to look.

use crate::addr::PAGE_SHIFT;

/// The size of the guest page a translation came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB or 4 MiB.
    Large,
    /// 1 GiB.
    Giant,
}

/// Which linear addresses had large pages cut into small entries, so that one INVLPG
/// finds all of them. A filter: false hits only cost time.
#[derive(Debug)]
pub(crate) struct LargePages {
    bits: Box<[u64; 64]>,
    giant: bool,
}

impl LargePages {
    pub(crate) fn new() -> Self {
        Self { bits: Box::new([0; 64]), giant: false }
    }

    /// Large pages are looked for in units of 4 MiB, the largest size but one.
    fn position(addr: u64) -> (usize, u64) {
        let hash = (addr >> 22) ^ (addr >> 34);
        ((hash >> 6) as usize & 63, 1 << (hash & 63))
    }

    pub(super) fn note(&mut self, addr: u64, size: PageSize) {
        match size {
            PageSize::Small => {}
            PageSize::Large => {
                let (word, bit) = Self::position(addr);
                if let Some(word) = self.bits.get_mut(word) {
                    *word |= bit;
                }
            }
            PageSize::Giant => self.giant = true,
        }
    }

    /// log2 of the span around `addr` that one page may cover.
    pub(super) fn span(&self, addr: u64) -> u32 {
        let (word, bit) = Self::position(addr);
        if self.giant {
            30
        } else if self.bits.get(word).is_some_and(|word| word & bit != 0) {
            22
        } else {
            PAGE_SHIFT
        }
    }

    pub(super) fn clear(&mut self) {
        self.bits.fill(0);
        self.giant = false;
    }
}
