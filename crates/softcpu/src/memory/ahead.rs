//! Large pages of RAM, asked for before the guest gets at them.
//!
//! The host clears what it makes a large page of, and where it is a virtual machine itself it may
//! have to be given that memory first: a few tenths of a millisecond or eight, while a vCPU
//! waits. Guests take memory in order, up from what they have and down from their end. So once
//! two stretches next to one another are in use, somebody beside the vCPUs has the two behind
//! them made large pages.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::sync::lock;

/// Stretches whose neighbours may wait to be looked at: as many as a large kernel has.
const MOST: usize = 128;
/// How far ahead of the guest they are asked for.
const AHEAD: u32 = 2;

/// Stretches that have been got at for the first time, the latest last.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    reached: VecDeque<u32>,
    closed: bool,
}

impl Ahead {
    /// `stretch` is in use from now on.
    pub(super) fn reached(&self, stretch: u32) {
        let mut state = lock(&self.state);
        if state.closed {
            return;
        }
        if state.reached.len() >= MOST {
            state.reached.pop_front();
        }
        state.reached.push_back(stretch);
        drop(state);
        self.arrived.notify_one();
    }

    /// The stretch that was reached last, of those that nobody has looked at. Waits for one; `None`
    /// once nobody is to wait any more.
    pub(super) fn next(&self) -> Option<u32> {
        let mut state = lock(&self.state);
        loop {
            if state.closed {
                return None;
            }
            if let Some(stretch) = state.reached.pop_back() {
                return Some(stretch);
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nobody is to wait any more.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.arrived.notify_all();
    }
}

/// The stretches that are likely reached soon, now that `stretch` has been, where `has` says which
/// are in use or made for that.
pub(super) fn likely(stretch: u32, has: impl Fn(u32) -> bool) -> impl Iterator<Item = u32> {
    let (below, above) = (stretch.checked_sub(1), stretch.checked_add(1));
    let rises = below.is_some_and(&has);
    let falls = above.is_some_and(&has);
    let up = (1..=AHEAD).filter_map(move |by| stretch.checked_add(by).filter(|_| rises));
    let down = (1..=AHEAD).filter_map(move |by| stretch.checked_sub(by).filter(|_| falls));
    up.chain(down)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_behind_two_in_a_row_is_likely_next() {
        let after =
            |stretch, used: &[u32]| likely(stretch, |n| used.contains(&n)).collect::<Vec<_>>();
        assert_eq!(after(7, &[7]), []);
        assert_eq!(after(7, &[6, 7]), [8, 9]);
        assert_eq!(after(7, &[7, 8]), [6, 5]);
        assert_eq!(after(7, &[6, 7, 8]), [8, 9, 6, 5]);
        assert_eq!(after(1, &[1, 2]), [0]);
        assert_eq!(after(u32::MAX, &[u32::MAX, u32::MAX - 1]), []);
    }

    #[test]
    fn the_latest_is_looked_at_first_and_the_end_wakes_who_waits() {
        let ahead = Ahead::default();
        (0..200).for_each(|stretch| ahead.reached(stretch));
        assert_eq!((ahead.next(), ahead.next()), (Some(199), Some(198)));
        for _ in 2..MOST {
            assert!(ahead.next().is_some());
        }
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| (ahead.next(), ahead.next()));
            ahead.reached(7);
            while !lock(&ahead.state).reached.is_empty() {
                std::thread::yield_now();
            }
            ahead.close();
            assert_eq!(waiting.join().unwrap(), (Some(7), None));
        });
    }
}
