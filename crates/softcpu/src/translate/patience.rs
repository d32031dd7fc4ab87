//! How hot code must be before it is translated.
//!
//! A few runs are enough as long as there is room for what is hot. Where there is not, the code
//! memory is filled again and again, and most of the time goes into translating what will hardly
//! run before it is evicted. So each time the memory has been filled from one end to the other
//! somebody looks how much did: much, and code must run twice as often from then on; little, and
//! half as often will do.

/// The most that the runs are multiplied by.
const MOST: u32 = 64;
/// Translating more than one part in so many of all time is much, and less than one in so many
/// little.
const MUCH: u64 = 8;
const LITTLE: u64 = 64;

/// What the runs are multiplied by, and what it was decided on last.
#[derive(Debug)]
pub(super) struct Patience {
    times: u32,
    /// Ticks of the clock, and those that went into translating, when the memory was full last.
    since: u64,
    translating: u64,
}

impl Patience {
    pub(super) fn new(now: u64) -> Self {
        Self { times: 1, since: now, translating: 0 }
    }

    /// Runs after which code is translated, for which `runs` are enough if there is room.
    pub(super) fn runs(&self, runs: u32) -> u32 {
        runs.saturating_mul(self.times)
    }

    /// The code memory has been filled to its end at time `now`; of all time so much went into translating.
    pub(super) fn filled(&mut self, now: u64, translating: u64) {
        let all = now.saturating_sub(self.since);
        let part = translating.saturating_sub(self.translating);
        if part.saturating_mul(MUCH) > all {
            self.times = self.times.saturating_mul(2).min(MOST);
        } else if part.saturating_mul(LITTLE) < all {
            self.times = (self.times / 2).max(1);
        }
        (self.since, self.translating) = (now, translating);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_translates_too_much_waits_longer() {
        let mut patience = Patience::new(1000);
        let (mut now, mut translating) = (1000, 0);
        let mut fill = |part: u64| {
            (now, translating) = (now + 1000, translating + part);
            patience.filled(now, translating);
            patience.runs(10)
        };
        assert_eq!([fill(500), fill(500), fill(50), fill(5)], [20, 40, 40, 20]);
        assert_eq!([fill(0), fill(0)], [10, 10]);
        assert_eq!((0..10).map(|_| fill(900)).last(), Some(10 * MOST));
    }
}
