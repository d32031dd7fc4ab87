//! Where translations are made beside the vCPUs, by a thread that has nothing else to do.
//!
//! A vCPU *orders* what has turned out hot, goes on in the interpreter, and finds what was made
//! on its *desk* when it comes by its run loop next. What it cannot wait for any longer it takes
//! back and makes itself, if nobody has begun with it: so a host that has no processor for the
//! thread costs next to nothing ([`super::orders`]).
//!
//! Waking a thread costs a vCPU nearly what it saves, and orders come in bursts. So the thread
//! looks for work every now and then for a while after it had some, before it sleeps for good.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::making::Job;
use super::wishes::Wanted;
use super::workbench::Workbench;
use crate::sync::lock;

#[cfg(test)]
mod tests;

/// Orders that may wait. Whoever has more makes them itself.
const MOST: usize = 64;
/// How long the thread looks for work, and how often.
const AWAKE: Duration = Duration::from_millis(5);
const NAP: Duration = Duration::from_micros(20);

/// Where a vCPU finds what was made for it.
#[derive(Debug, Default)]
pub(super) struct Desk {
    /// Something is there.
    full: AtomicBool,
    made: Mutex<Vec<Job>>,
}

impl Desk {
    /// Whether something has been made.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.full.load(Acquire)
    }

    /// Takes what has been made, in the order in which it was, in exchange for `empty`.
    pub(super) fn clear(&self, empty: Vec<Job>) -> Vec<Job> {
        let mut made = lock(&self.made);
        self.full.store(false, Release);
        std::mem::replace(&mut made, empty)
    }

    fn put(&self, job: Job) {
        let mut made = lock(&self.made);
        made.push(job);
        self.full.store(true, Release);
    }
}

/// See the module's words. One serves all vCPUs of a machine, whose stubs are the same.
#[derive(Debug, Default)]
pub struct Workshop {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What waits, and for whom.
    orders: VecDeque<(Job, Arc<Desk>)>,
    /// What is being made.
    making: Option<(Wanted, Arc<Desk>)>,
    /// Whoever works here must be woken.
    asleep: bool,
    closed: bool,
    /// Does what is ordered at once.
    prompt: Option<Box<Workbench>>,
}

impl State {
    /// What is to be made next.
    fn next(&mut self) -> Option<(Job, Arc<Desk>)> {
        let next = self.orders.pop_front();
        self.making = next.as_ref().map(|(job, desk)| (job.wanted(), Arc::clone(desk)));
        next
    }
}

/// What comes of taking an order back.
#[derive(Debug)]
pub(super) enum TakenBack {
    /// Nobody has begun with it.
    Order(Box<Job>),
    /// It is being made.
    Begun,
    /// It is not there any more.
    Nothing,
}

/// Closes a workshop when it is dropped.
struct Closing<'a>(&'a Workshop);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Workshop {
    /// One that needs no thread, as whoever orders has the work: for tests, which want the same
    /// to happen each time.
    #[doc(hidden)]
    #[must_use]
    pub fn prompt(self) -> Arc<Self> {
        lock(&self.state).prompt = Some(Box::new(Workbench::new()));
        Arc::new(self)
    }

    /// Works until the workshop is [closed](Workshop::close): what its thread does.
    pub fn work(&self) {
        // Whoever orders must not wait for a thread that has panicked.
        let _closing = Closing(self);
        let mut bench = Workbench::new();
        let mut last = Instant::now();
        loop {
            let mut state = lock(&self.state);
            let mut next = state.next();
            while next.is_none() && !state.closed && last.elapsed() >= AWAKE {
                state.asleep = true;
                state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.asleep = false;
                last = Instant::now();
                next = state.next();
            }
            if state.closed {
                return;
            }
            drop(state);
            if let Some((job, desk)) = next {
                Self::make(job, &desk, &mut bench);
                last = Instant::now();
            } else {
                sleep(NAP);
            }
        }
    }

    /// Does `job`, for `desk`.
    fn make(mut job: Job, desk: &Desk, bench: &mut Workbench) {
        bench.make(&mut job);
        desk.put(job);
    }

    /// Nobody works here any more, and nothing is ordered.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.making = None;
        state.orders.clear();
        drop(state);
        self.arrived.notify_all();
    }

    /// Does all that was ordered, on the calling thread.
    #[cfg(test)]
    fn work_off(&self) {
        let mut bench = Workbench::new();
        loop {
            let next = lock(&self.state).next();
            let Some((job, desk)) = next else { return };
            Self::make(job, &desk, &mut bench);
        }
    }

    /// Orders what `job` says, for `desk`. Gives it back when there is too much to do, or nobody
    /// works here.
    pub(super) fn order(&self, job: Job, desk: &Arc<Desk>) -> Option<Job> {
        let mut state = lock(&self.state);
        if state.closed || state.orders.len() >= MOST {
            return Some(job);
        }
        if let Some(bench) = &mut state.prompt {
            Self::make(job, desk, bench);
            return None;
        }
        state.orders.push_back((job, Arc::clone(desk)));
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        if asleep {
            self.arrived.notify_one();
        }
        None
    }

    /// Takes back what was ordered of `wanted` for `desk`.
    pub(super) fn take_back(&self, wanted: Wanted, desk: &Arc<Desk>) -> TakenBack {
        let mut state = lock(&self.state);
        let place = state
            .orders
            .iter()
            .position(|(job, whose)| Arc::ptr_eq(whose, desk) && job.wanted() == wanted);
        if let Some((job, _)) = place.and_then(|place| state.orders.remove(place)) {
            return TakenBack::Order(Box::new(job));
        }
        let making = state.making.as_ref();
        if making.is_some_and(|(what, whose)| *what == wanted && Arc::ptr_eq(whose, desk)) {
            TakenBack::Begun
        } else {
            TakenBack::Nothing
        }
    }
}
