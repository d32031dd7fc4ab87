//! One queue of the disk: filled by its handler on an I/O thread, emptied by workers.
//!
//! The handler takes requests as long as there are any and asks the driver not to notify
//! meanwhile. What can be served without waiting it serves itself; workers give the rest
//! back in whatever order they end.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::QUEUE_SIZE;
use super::pool::{Job, Jobs};
use super::service::Service;
use crate::devices::virtio::chain::{Chain, ChainError};
use crate::devices::virtio::{DeviceQueue, DriverSignal, QueueError};

/// How many requests are taken before other devices on the thread have their turn.
const TURN: usize = QUEUE_SIZE as usize;

/// How often a queue that has run empty is looked at again before they do. What is said
/// to be there may not be: the driver writes that index, and so do we if it has laid the
/// used ring over it.
const LOOKS: usize = 16;

/// A request that was served: how many bytes were written to it, or that there turned out
/// to be no place for its answer.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) chain: Chain,
    pub(super) written: Result<u32, ChainError>,
}

/// A queue that several threads use.
pub(super) struct ServedQueue {
    state: Mutex<State>,
    signal: Arc<dyn DriverSignal>,
}

struct State {
    queue: DeviceQueue,
    /// Taken, and not given back yet.
    in_flight: u16,
    /// The driver broke the rules: nothing more until the device is reset.
    broken: bool,
}

impl fmt::Debug for ServedQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServedQueue").finish_non_exhaustive()
    }
}

impl ServedQueue {
    pub(super) fn new(queue: DeviceQueue, signal: Arc<dyn DriverSignal>) -> Arc<Self> {
        let state = State { queue, in_flight: 0, broken: false };
        Arc::new(Self { state: Mutex::new(state), signal })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes requests into `taken`, [`TURN`] at most. `true`: there may be more, for which
    /// no notification comes.
    pub(super) fn take(&self, taken: &mut Vec<Chain>) -> bool {
        let mut state = self.state();
        if state.broken {
            return false;
        }
        state.fill(taken).unwrap_or_else(|error| {
            self.give_up(&mut state, &error);
            false
        })
    }

    /// Gives requests back to the driver, and signals it once.
    pub(super) fn complete(&self, served: impl IntoIterator<Item = Served>) {
        let mut state = self.state();
        let mut any = false;
        for Served { chain, written } in served {
            any = true;
            state.in_flight = state.in_flight.saturating_sub(1);
            if state.broken {
                continue;
            }
            match written {
                Ok(written) => {
                    if let Err(error) = state.queue.push(chain.head(), written) {
                        self.give_up(&mut state, &error);
                    }
                }
                Err(error) => self.give_up(&mut state, &error),
            }
        }
        if any
            && !state.broken
            && let Err(error) = state.queue.notify()
        {
            self.give_up(&mut state, &error);
        }
    }

    fn give_up(&self, state: &mut State, error: &dyn fmt::Display) {
        tracing::debug!("the disk needs a reset by its driver: {error}");
        state.broken = true;
        self.signal.needs_reset();
    }
}

impl State {
    fn fill(&mut self, taken: &mut Vec<Chain>) -> Result<bool, QueueError> {
        for _ in 0..LOOKS {
            self.queue.suppress_kicks()?;
            while taken.len() < TURN {
                let Some(chain) = self.queue.pop()? else { break };
                if self.in_flight >= QUEUE_SIZE {
                    // More than there are descriptors: some are in flight twice.
                    let (queue, error) = (self.queue.index(), virtio_queue::Error::InvalidChain);
                    return Err(QueueError::Ring { queue, error });
                }
                self.in_flight = self.in_flight.saturating_add(1);
                taken.push(chain);
            }
            if taken.len() >= TURN {
                return Ok(true);
            }
            if !self.queue.await_kicks()? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What runs on the I/O thread: takes requests when the driver says so.
#[derive(Debug)]
pub(super) struct Handler {
    queue: Arc<ServedQueue>,
    kick: Arc<EventFd>,
    jobs: Arc<Jobs>,
    service: Arc<Service>,
    taken: Vec<Chain>,
    served: Vec<Served>,
}

impl Handler {
    pub(super) fn new(queue: Arc<ServedQueue>, jobs: Arc<Jobs>, service: Arc<Service>) -> Self {
        let kick = Arc::clone(queue.state().queue.kick());
        Self { queue, kick, jobs, service, taken: Vec::new(), served: Vec::new() }
    }

    fn kick_myself(&self) {
        if let Err(error) = self.kick.write(1) {
            // It is full, and so the handler will run anyway.
            tracing::trace!(%error, "a disk's queue notifies itself");
        }
    }
}

impl MutEventSubscriber for Handler {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // An error means that another wakeup has read it already.
        let _ = self.kick.read();
        let more = self.queue.take(&mut self.taken);
        let (queue, service, served) = (&self.queue, &self.service, &mut self.served);
        self.jobs.add(self.taken.drain(..).filter_map(
            |chain| match service.serve_at_once(&chain) {
                Some(written) => {
                    served.push(Served { chain, written });
                    None
                }
                None => {
                    let (service, queue) = (Arc::clone(service), Arc::clone(queue));
                    Some(Job { chain, service, queue })
                }
            },
        ));
        self.queue.complete(self.served.drain(..));
        if more {
            self.kick_myself();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&*self.kick, EventSet::IN)) {
            tracing::error!(%error, "a disk's queue cannot be watched");
        }
        // What the driver put in before we watched.
        self.kick_myself();
    }
}
