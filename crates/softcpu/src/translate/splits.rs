//! Where traces are left because accesses that share a check lie in two pages, and when that is too
//! often. Who walks through memory comes by the end of each page once, which sharing is worth; who
//! has something at the end of one page is better off with a check for each access.

use crate::addr::PAGE_SHIFT;

/// So often within [`SPLIT_WINDOW`], and a trace is better off with a check for each access.
const MANY_SPLITS: u32 = 64;
/// Ticks of the TSC: a millisecond or so.
const SPLIT_WINDOW: u64 = 1 << 22;

/// A trace that was left because what it checks at once lies in two pages, or is not all of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct SplitAt {
    /// The trace.
    pub(super) rip: u64,
    /// Where the guest goes on. The rest of what was to be checked is likely still before it.
    pub(super) next: u64,
    /// Where what was to be checked begins; the last address if it is as long as pages, or longer.
    pub(super) begins: u64,
}

/// How often lately one trace was left so at pages where it had been before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Splits {
    since: u64,
    times: u32,
    /// The last pages, in the order in which they came to be here.
    pages: [u64; 4],
}

impl Splits {
    pub(super) fn new(now: u64) -> Self {
        Self { since: now, times: 0, pages: [u64::MAX; 4] }
    }

    /// Once more, at `addr`. Says whether that is too often.
    pub(super) fn note(&mut self, addr: u64, now: u64) -> bool {
        let page = addr >> PAGE_SHIFT;
        if !self.pages.contains(&page) {
            self.pages.rotate_right(1);
            self.pages[0] = page;
            return false;
        }
        if now.wrapping_sub(self.since) > SPLIT_WINDOW {
            (self.since, self.times) = (now, 0);
        }
        self.times = self.times.saturating_add(1);
        self.times >= MANY_SPLITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_count_where_they_have_happened_before() {
        let mut splits = Splits::new(0);
        for page in 0..1000 {
            assert!(!splits.note(page << PAGE_SHIFT | 0xff0, page));
        }
        let mut often = |pages: u64, since| {
            (1..=200).find(|n| splits.note((n % pages) << PAGE_SHIFT, since + n))
        };
        // It takes a turn to get to know them.
        assert_eq!(often(1, 2000), Some(u64::from(MANY_SPLITS) + 1));
        assert_eq!(often(1, 2000 + 2 * SPLIT_WINDOW), Some(u64::from(MANY_SPLITS)));
        assert_eq!(often(4, 2000 + 4 * SPLIT_WINDOW), Some(u64::from(MANY_SPLITS) + 3));
        assert_eq!(often(5, 2000 + 6 * SPLIT_WINDOW), None);
    }
}
