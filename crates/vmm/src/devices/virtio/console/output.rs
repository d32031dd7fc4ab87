//! What the guest has printed, on its way out.
//!
//! Whoever takes it (a terminal, a pipe) may be slow, and I/O threads must not wait for
//! it. So bytes go into a bounded buffer that a thread of its own writes out. When the
//! buffer is full the queue is left alone, which is how the guest gets to wait.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

/// How much may wait: a few screens full.
pub(super) const BUFFER: usize = 64 * 1024;

/// The buffer. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Output {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Written to when there is room again for one who was told there is none.
    room: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// The writing thread has bytes in its hands.
    writing: bool,
    /// Somebody was told that there is no room.
    wanted: bool,
    /// Nobody takes our output any more: it is dropped from now on.
    broken: bool,
    /// The device is gone: the writing thread ends when it has written all.
    closed: bool,
}

impl Output {
    /// A buffer that nobody empties yet, and that says by `room` when it has been.
    pub(super) fn new(room: Arc<EventFd>) -> Self {
        let state = Mutex::default();
        Self { shared: Arc::new(Shared { state, changed: Condvar::new(), room }) }
    }

    /// Starts the thread that writes to `target`.
    ///
    /// # Errors
    /// The host refuses it.
    pub(super) fn write_to(&self, mut target: Box<dyn Write + Send>) -> io::Result<()> {
        let output = self.clone();
        thread::Builder::new().name("console-out".into()).spawn(move || {
            while let Some(bytes) = output.take() {
                let written = target.write_all(&bytes).and_then(|()| target.flush());
                output.written(written);
            }
        })?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many bytes it takes now. If none, `room` is written to when that changes.
    pub(super) fn room(&self) -> usize {
        let mut state = self.lock();
        if state.broken {
            return BUFFER;
        }
        let room = BUFFER.saturating_sub(state.waiting.len());
        state.wanted = room == 0;
        room
    }

    /// Takes `bytes`, no more than [`Output::room`] said. Two who ask at the same time may
    /// both be told of the same room; what that adds is bounded by it.
    pub(super) fn append(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if !state.broken {
            state.waiting.extend_from_slice(bytes);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Everything that waits; sleeps until there is something. `None`: that was all.
    pub(super) fn take(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            if state.closed {
                return None;
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.writing = true;
        let bytes = std::mem::take(&mut state.waiting);
        if std::mem::take(&mut state.wanted) {
            // Cannot fail but by a full counter, which wakes as well.
            let _ = self.shared.room.write(1);
        }
        Some(bytes)
    }

    fn written(&self, result: io::Result<()>) {
        let mut state = self.lock();
        state.writing = false;
        if let Err(error) = result {
            tracing::warn!("the virtio console's output is lost from here on: {error}");
            state.broken = true;
            state.waiting.clear();
            if std::mem::take(&mut state.wanted) {
                let _ = self.shared.room.write(1);
            }
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Waits until everything is written, or `limit` has passed.
    pub(super) fn drain(&self, limit: Duration) {
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.lock();
        while !state.broken && (state.writing || !state.waiting.is_empty()) {
            let left = deadline.and_then(|end| end.checked_duration_since(Instant::now()));
            let Some(left) = left else { return };
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Nothing more will come.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.shared.changed.notify_all();
    }
}
