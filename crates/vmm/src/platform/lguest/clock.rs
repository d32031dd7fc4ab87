//! The clock event: one shot, in real time, by a thread that waits for it.
//!
//! The same thread makes the vCPU look again at an interrupt that cannot be delivered
//! because of something a guest may change without a word: its blocked bits are plain
//! memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lguest_abi::traps::CLOCK_IRQ;

use super::lines::InterruptLines;
use crate::platform::pc::timers::set_timer_slack;

#[derive(Debug, Default)]
struct State {
    event: Option<Instant>,
    look_again: Option<Instant>,
    stopped: bool,
}

/// The clock of one guest.
#[derive(Debug)]
pub struct Clock {
    state: Mutex<State>,
    changed: Condvar,
    lines: Arc<InterruptLines>,
}

impl Clock {
    /// A clock with nothing to wait for.
    pub(super) fn new(lines: Arc<InterruptLines>) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), lines }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock's interrupt comes in `nanoseconds`; 0: not at all.
    pub(super) fn set(&self, nanoseconds: u64) {
        let wait = Duration::from_nanos(nanoseconds);
        self.lock().event = if nanoseconds == 0 { None } else { Instant::now().checked_add(wait) };
        self.changed.notify_all();
    }

    /// The vCPU looks at its interrupts again in `wait`, unless it does so sooner.
    pub(super) fn look_again_in(&self, wait: Duration) {
        let at = Instant::now().checked_add(wait);
        let mut state = self.lock();
        if state.look_again.is_none() {
            state.look_again = at;
            self.changed.notify_all();
        }
    }

    /// The thread's body: until [`Clock::stop`].
    pub fn run(&self) {
        set_timer_slack();
        let mut state = self.lock();
        while !state.stopped {
            let now = Instant::now();
            if state.event.is_some_and(|at| at <= now) {
                state.event = None;
                self.lines.raise(CLOCK_IRQ);
            }
            if state.look_again.is_some_and(|at| at <= now) {
                state.look_again = None;
                self.lines.look_again();
            }
            let next = [state.event, state.look_again].into_iter().flatten().min();
            state = match next {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let left = at.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Ends [`Clock::run`].
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use softcpu::{Event, VcpuHandle};

    #[test]
    fn an_event_comes_once_and_not_early_and_can_be_taken_back() {
        let vcpu = VcpuHandle::new();
        let lines = Arc::new(InterruptLines::new(vcpu.clone()));
        let clock = Clock::new(Arc::clone(&lines));
        std::thread::scope(|scope| {
            scope.spawn(|| clock.run());
            let start = Instant::now();
            clock.set(10_000_000);
            clock.set(20_000_000);
            let limit = start.checked_add(Duration::from_secs(5));
            assert_eq!(vcpu.sleep(Event::INTERRUPT, limit), Event::INTERRUPT);
            assert!(start.elapsed() >= Duration::from_millis(20));
            assert_eq!(lines.pending(), 1);
            lines.acknowledge(0);
            vcpu.take(Event::INTERRUPT);
            clock.set(5_000_000);
            clock.set(0);
            clock.look_again_in(Duration::from_millis(10));
            assert_eq!(vcpu.sleep(Event::INTERRUPT, limit), Event::INTERRUPT);
            assert_eq!(lines.pending(), 0, "only to look");
            clock.stop();
        });
    }
}
