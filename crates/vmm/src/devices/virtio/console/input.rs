//! What has been typed, on its way to the guest.
//!
//! As with the serial port, whoever feeds the console may hand over any amount and waits
//! while the guest does not read; and what comes before a driver is there waits for it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// Bytes that may wait before a sender has to.
pub(super) const QUEUE: usize = 4096;

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<u8>,
    /// No more will be taken: the machine has ended.
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    /// There is room in the queue again, or it is closed.
    room: Condvar,
    /// Wakes the device.
    typed: Arc<EventFd>,
}

/// Where input comes in. Clones are the same one.
#[derive(Clone)]
pub struct ConsoleInput {
    shared: Arc<Shared>,
}

impl fmt::Debug for ConsoleInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleInput").finish_non_exhaustive()
    }
}

impl ConsoleInput {
    /// A queue that says by `typed` when something has come in.
    pub(super) fn new(typed: Arc<EventFd>) -> Self {
        let state = Mutex::default();
        Self { shared: Arc::new(Shared { state, room: Condvar::new(), typed }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands `bytes` to the guest, waiting while the queue is full. Returns how many were
    /// taken: all, unless the machine ended meanwhile.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        let mut state = self.lock();
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
            if state.closed {
                break;
            }
            let room = QUEUE.saturating_sub(state.queue.len()).min(rest.len());
            if room == 0 {
                state = self.shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.queue.extend(rest.iter().take(room));
            taken = taken.saturating_add(room);
            // A full counter wakes as well.
            let _ = self.shared.typed.write(1);
        }
        taken
    }

    /// Ends all waiting: the machine is gone.
    pub fn close(&self) {
        self.lock().closed = true;
        self.shared.room.notify_all();
    }

    /// Up to `most` of the bytes that come next. They stay until [`ConsoleInput::taken`].
    pub(super) fn peek(&self, most: u64) -> Vec<u8> {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        self.lock().queue.iter().take(most).copied().collect()
    }

    /// The guest has got the first `count` bytes.
    pub(super) fn taken(&self, count: usize) {
        let mut state = self.lock();
        let count = count.min(state.queue.len());
        state.queue.drain(..count);
        drop(state);
        self.shared.room.notify_all();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lock().queue.is_empty()
    }
}
