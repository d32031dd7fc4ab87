//! Serves the console's queues on an I/O thread, from activation to reset.
//!
//! Nothing here waits. Output that finds no room stays in the queue until the writing
//! thread says that there is some; input that finds no buffer stays where it was typed.
//!
//! *Settling*: a driver with one port cannot say when it has opened it, and Linux drops
//! input, and does not hear of a size, between setting up its queues and having the
//! console registered, a time during which it prints the log so far. So input is held
//! back, and the size is told, once the driver has been quiet for [`QUIET`], or [`SETTLED`]
//! after it came if it never is. With several ports a driver would say so (`PORT_OPEN`,
//! virtio 1.2, 5.3.6.2), but then it learns the size by a message whose two fields Linux
//! had in the wrong order for years and has in the right one since: half of the kernels
//! would get it wrong for good, where waiting costs all of them a moment once.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::bytes::Bytes;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::{Port, RECEIVE, SIZE, TRANSMIT};
use crate::devices::virtio::{
    ActivateError, Activation, Chain, ChainError, DeviceQueue, DriverSignal, QueueError,
};

/// So long without output, and a driver is taken to be ready.
pub(super) const QUIET: Duration = Duration::from_millis(200);
/// So long, and it is taken to be ready however much it prints.
const SETTLED: Duration = Duration::from_secs(5);
/// Bytes printed before the thread's other handlers get their turn.
const TURN: usize = 64 * 1024;
/// Requests handled before they do.
const TURN_REQUESTS: usize = 128;

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a request: {0}")]
    Chain(#[from] ChainError),
    #[error("a buffer for input has no room, or something to read")]
    ReceiveShape,
    #[error("output is in a buffer to write to")]
    TransmitShape,
    #[error("the host refuses an event: {0}")]
    Host(#[from] io::Error),
}

/// Whether the driver is taken to be ready for input.
#[derive(Debug)]
enum Readiness {
    /// Not yet; ready at that time, whatever happens.
    Settling(Instant),
    Ready,
}

/// What runs on the I/O thread.
pub(crate) struct Worker {
    port: Port,
    receive: DeviceQueue,
    transmit: DeviceQueue,
    signal: Arc<dyn DriverSignal>,
    /// Output of which a part has been taken: how much.
    begun: Option<(Chain, u64)>,
    readiness: Readiness,
    settle: TimerFd,
    /// The driver wants to know the window's size.
    tells_size: bool,
    failed: bool,
}

impl Worker {
    pub(crate) fn new(port: Port, mut activation: Activation) -> Result<Self, ActivateError> {
        let mut take =
            |index| activation.take_queue(index).ok_or(ActivateError::MissingQueue(index));
        let (receive, transmit) = (take(RECEIVE)?, take(TRANSMIT)?);
        let now = Instant::now();
        let mut settle = TimerFd::new().map_err(io::Error::from)?;
        settle.reset(QUIET, None).map_err(io::Error::from)?;
        Ok(Self {
            port,
            receive,
            transmit,
            signal: activation.signal,
            begun: None,
            readiness: Readiness::Settling(now.checked_add(SETTLED).unwrap_or(now)),
            settle,
            tells_size: activation.features & SIZE != 0,
            failed: false,
        })
    }

    /// Does what there is to do, within bounds. `false`: the device needs a reset.
    pub(crate) fn turn(&mut self) -> bool {
        if self.failed {
            return false;
        }
        let done = self.print().and_then(|()| self.type_in());
        if done.is_ok() {
            self.tell_size();
        }
        if let Err(failure) = done {
            tracing::warn!("the virtio console needs a reset: {failure}");
            self.failed = true;
            // A request half done is not the device's any more.
            self.begun = None;
            self.signal.needs_reset();
        }
        !self.failed
    }

    /// The driver is taken to be ready from now on.
    pub(crate) fn settled(&mut self) {
        if matches!(self.readiness, Readiness::Settling(_)) {
            self.readiness = Readiness::Ready;
            let _ = self.port.resized.write(1);
        }
    }

    fn tell_size(&self) {
        // An empty counter: nothing has changed.
        if matches!(self.readiness, Readiness::Ready)
            && self.port.resized.read().is_ok()
            && self.tells_size
        {
            self.signal.config_changed();
        }
    }

    /// Something was printed: a driver that is still settling goes on doing so.
    fn heard(&mut self) -> io::Result<()> {
        if let Readiness::Settling(end) = self.readiness {
            match end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                Some(left) => self.settle.reset(QUIET.min(left), None)?,
                None => self.settled(),
            }
        }
        Ok(())
    }

    /// Takes output from the transmit queue, as far as there is room for it.
    fn print(&mut self) -> Result<(), Failure> {
        self.transmit.suppress_kicks()?;
        let (mut bytes, mut requests) = (0_usize, 0_usize);
        let again = loop {
            if bytes >= TURN || requests >= TURN_REQUESTS {
                break true;
            }
            let Some((chain, done)) = self.next_output()? else {
                if self.transmit.await_kicks()? {
                    self.transmit.suppress_kicks()?;
                    // What is said to be there may not be: the driver writes that index.
                    requests = requests.saturating_add(1);
                    continue;
                }
                break false;
            };
            let left = chain.readable().saturating_sub(done);
            let room = self.port.output.room();
            let take = left.min(room as u64);
            if left != 0 && take == 0 {
                // Wakes us when there is room.
                self.begun = Some((chain, done));
                break false;
            }
            bytes = bytes.saturating_add(copy_out(&chain, done, take, &self.port)?);
            if take == left {
                self.transmit.push(chain.head(), 0)?;
                requests = requests.saturating_add(1);
            } else {
                self.begun = Some((chain, done.saturating_add(take)));
            }
        };
        if requests > 0 {
            self.transmit.notify()?;
        }
        if requests > 0 || bytes > 0 {
            self.heard()?;
        }
        if again {
            self.transmit.kick().write(1)?;
        }
        Ok(())
    }

    /// The output to go on with, and how much of it has been taken already.
    fn next_output(&mut self) -> Result<Option<(Chain, u64)>, Failure> {
        if let Some(begun) = self.begun.take() {
            return Ok(Some(begun));
        }
        let Some(chain) = self.transmit.pop()? else { return Ok(None) };
        if chain.writable() != 0 {
            return Err(Failure::TransmitShape);
        }
        Ok(Some((chain, 0)))
    }

    /// Puts what was typed into the buffers of the receive queue.
    fn type_in(&mut self) -> Result<(), Failure> {
        let mut filled = 0_usize;
        let again = loop {
            if matches!(self.readiness, Readiness::Settling(_)) || self.port.input.is_empty() {
                // Buffers that come in now are found when there is something for them.
                self.receive.suppress_kicks()?;
                break false;
            }
            if filled >= TURN_REQUESTS {
                break true;
            }
            filled = filled.saturating_add(1);
            let Some(chain) = self.receive.pop()? else {
                if self.receive.await_kicks()? {
                    continue;
                }
                filled = filled.saturating_sub(1);
                break false;
            };
            if chain.writable() == 0 || chain.readable() != 0 {
                return Err(Failure::ReceiveShape);
            }
            let bytes = self.port.input.peek(chain.writable());
            // All of the chain was RAM when it was checked; it cannot shrink.
            io::Write::write_all(&mut chain.writer()?, &bytes).map_err(|_| ChainError::Endless)?;
            self.receive.push(chain.head(), u32::try_from(bytes.len()).unwrap_or(u32::MAX))?;
            self.port.input.taken(bytes.len());
        };
        if filled > 0 {
            self.receive.notify()?;
        }
        if again {
            self.receive.kick().write(1)?;
        }
        Ok(())
    }

    /// What wakes us.
    fn events(&self) -> [&EventFd; 3] {
        [self.receive.kick(), self.transmit.kick(), &self.port.wake]
    }
}

/// Copies `len` bytes of a request's, from number `from` on, to the output.
fn copy_out(chain: &Chain, from: u64, len: u64, port: &Port) -> Result<usize, Failure> {
    let mut copied = 0_usize;
    for slice in chain.slices(false, from, len)? {
        let mut bytes = vec![0; slice.len()];
        // All of the chain was RAM when it was checked; it cannot shrink.
        slice.read_slice(&mut bytes, 0).map_err(|_| ChainError::Endless)?;
        port.output.append(&bytes);
        copied = copied.saturating_add(bytes.len());
    }
    Ok(copied)
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        // All of them merely wake us; an empty one has been read already.
        if events.fd() == self.settle.as_raw_fd() {
            let _ = self.settle.wait();
            self.settled();
        } else if let Some(event) =
            self.events().into_iter().find(|event| event.as_raw_fd() == events.fd())
        {
            let _ = event.read();
        }
        if !self.turn() {
            for event in self.events() {
                let _ = ops.remove(Events::empty(event));
            }
            let _ = ops.remove(Events::empty(&self.settle));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let added = self
            .events()
            .into_iter()
            .try_for_each(|event| ops.add(Events::new(event, EventSet::IN)))
            .and_then(|()| ops.add(Events::new(&self.settle, EventSet::IN)));
        if let Err(error) = added {
            tracing::error!(%error, "the virtio console hears no notifications");
            self.failed = true;
            self.signal.needs_reset();
        }
    }
}
