//! Virtio entropy: random bytes from the host's kernel (virtio 1.2, 5.4).
//!
//! One queue, no configuration. A driver puts in buffers, the device fills them with
//! `getrandom`, which does not run dry on a host that has booted; should the host's pool
//! not be ready yet, requests wait for it on a timer and the I/O thread goes on. However
//! large a buffer is, it gets [`MOST`] bytes at most: the driver asks again.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use vmm_sys_util::timerfd::TimerFd;

use super::io_threads::Attached;
use super::{
    ActivateError, Activation, Chain, ChainError, DeviceKind, DeviceQueue, DriverSignal, IoThreads,
    QueueError, VirtioDevice,
};

/// The only queue (virtio 1.2, 5.4.2).
const REQUESTS: u16 = 0;
/// The most requests in it.
const QUEUE_SIZE: u16 = 64;
/// The most bytes that one request gets.
pub const MOST: usize = 64 * 1024;
/// Bytes fetched at a time; `getrandom` is not interrupted below 256.
const SLICE: usize = 4096;
/// Requests answered before the thread's other handlers get their turn.
const TURN: usize = 16;
/// How long to wait for a host whose pool is not ready.
const RETRY: Duration = Duration::from_millis(100);

/// Where the bytes come from: fills a part of the slice, from its start, and says how much.
pub(super) type Source = fn(&mut [u8]) -> io::Result<usize>;

fn host(bytes: &mut [u8]) -> io::Result<usize> {
    Ok(getrandom(bytes, GetRandomFlags::NONBLOCK)?)
}

/// The device.
pub struct Entropy {
    io: Arc<IoThreads>,
    source: Source,
    running: Option<Attached>,
}

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entropy").field("running", &self.running).finish_non_exhaustive()
    }
}

impl Entropy {
    /// An entropy device that is served by one of `io`.
    #[must_use]
    pub const fn new(io: Arc<IoThreads>) -> Self {
        Self { io, source: host, running: None }
    }
}

impl VirtioDevice for Entropy {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let queue = activation.take_queue(REQUESTS).ok_or(ActivateError::MissingQueue(REQUESTS))?;
        let worker = Worker::new(queue, activation.signal, self.source)?;
        self.running = Some(self.io.attach(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(running) = self.running.take()
            && let Err(error) = running.detach()
        {
            tracing::debug!(%error, "the entropy device's thread was gone before it");
        }
    }
}

impl Drop for Entropy {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a request for entropy: {0}")]
    Chain(#[from] ChainError),
    #[error("a request for entropy has no room for it, or something to read")]
    Shape,
    #[error("the host gives no entropy: {0}")]
    Host(io::Error),
}

/// What became of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Nothing is left to do until the driver notifies.
    Idle,
    /// There is more to do.
    More,
    /// The host's pool is not ready: try later.
    Later,
}

/// What runs on the I/O thread.
pub(super) struct Worker {
    queue: DeviceQueue,
    signal: Arc<dyn DriverSignal>,
    source: Source,
    retry: TimerFd,
    failed: bool,
}

impl Worker {
    pub(super) fn new(
        queue: DeviceQueue,
        signal: Arc<dyn DriverSignal>,
        source: Source,
    ) -> io::Result<Self> {
        Ok(Self { queue, signal, source, retry: TimerFd::new()?, failed: false })
    }

    /// Does what there is to do, within bounds. `false`: the device needs a reset.
    pub(super) fn turn(&mut self) -> bool {
        if self.failed {
            return false;
        }
        let done = self.serve().and_then(|turn| {
            match turn {
                Turn::Idle => {}
                Turn::More => self.queue.kick().write(1).map_err(Failure::Host)?,
                Turn::Later => {
                    self.retry.reset(RETRY, None).map_err(|e| Failure::Host(e.into()))?;
                }
            }
            Ok(())
        });
        if let Err(failure) = done {
            tracing::warn!("the entropy device needs a reset: {failure}");
            self.failed = true;
            self.signal.needs_reset();
        }
        !self.failed
    }

    fn serve(&mut self) -> Result<Turn, Failure> {
        self.queue.suppress_kicks()?;
        let mut answered = 0_usize;
        let turn = loop {
            if answered >= TURN {
                break Turn::More;
            }
            let Some(chain) = self.queue.pop()? else {
                if self.queue.await_kicks()? {
                    self.queue.suppress_kicks()?;
                    // What is said to be there may not be: the driver writes that index.
                    answered = answered.saturating_add(1);
                    continue;
                }
                break Turn::Idle;
            };
            let written = fill(&chain, self.source)?;
            if written == 0 {
                self.queue.undo_pop();
                break Turn::Later;
            }
            self.queue.push(chain.head(), written)?;
            answered = answered.saturating_add(1);
        };
        if answered > 0 {
            self.queue.notify()?;
        }
        Ok(turn)
    }
}

/// Fills a request and says with how many bytes; 0: the host has none yet.
fn fill(chain: &Chain, source: Source) -> Result<u32, Failure> {
    let room = usize::try_from(chain.writable()).unwrap_or(MOST).min(MOST);
    if room == 0 || chain.readable() != 0 {
        return Err(Failure::Shape);
    }
    let mut writer = chain.writer()?;
    let mut bytes = [0; SLICE];
    let mut written = 0_usize;
    while written < room {
        let want = room.saturating_sub(written).min(SLICE);
        let got = match source(bytes.get_mut(..want).unwrap_or_default()) {
            Ok(got) => got,
            // Signals do not come to this thread, but who knows what a host does.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                break;
            }
            Err(error) => return Err(Failure::Host(error)),
        };
        if got == 0 {
            break;
        }
        // All of the chain was RAM when it was checked; it cannot shrink.
        let got = bytes.get(..got).unwrap_or_default();
        writer.write_all(got).map_err(|_| ChainError::Endless)?;
        written = written.saturating_add(got.len());
    }
    Ok(u32::try_from(written).unwrap_or(u32::MAX))
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        use std::os::fd::AsRawFd;
        // Both merely wake us; an empty one has been read already.
        if events.fd() == self.retry.as_raw_fd() {
            let _ = self.retry.wait();
        } else {
            let _ = self.queue.kick().read();
        }
        if !self.turn() {
            let _ = ops.remove(Events::empty(&**self.queue.kick()));
            let _ = ops.remove(Events::empty(&self.retry));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let added = ops
            .add(Events::new(&**self.queue.kick(), EventSet::IN))
            .and_then(|()| ops.add(Events::new(&self.retry, EventSet::IN)));
        if let Err(error) = added {
            tracing::error!(%error, "the entropy device hears no notifications");
            self.failed = true;
            self.signal.needs_reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::feature;
    use crate::devices::virtio::hostile;
    use crate::devices::virtio::testing::{Part, Ring, TestDriver};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn start(driver: &TestDriver, device: &mut dyn VirtioDevice) -> Ring {
        let (ring, queue) = driver.ring(REQUESTS, QUEUE_SIZE);
        device.activate(driver.activation(vec![queue])).unwrap();
        ring
    }

    fn device() -> Entropy {
        Entropy::new(IoThreads::start(1).unwrap())
    }

    #[test]
    fn buffers_come_back_full_of_random_bytes() {
        for features in [0, feature::EVENT_IDX] {
            let (driver, mut device) = (TestDriver::new(features), device());
            let mut ring = start(&driver, &mut device);
            let offered = ring.offer(&[Part::Write(100), Part::Write(4000)]);
            ring.notify();
            assert_eq!(ring.wait_used(), (offered.head, 4100));
            driver.signal.wait(|signals| signals.used == [REQUESTS]);
            let first = ring.answer(&offered);
            // The chance that this fails by itself is 2^-8 to the power of some hundreds.
            let zeroes = first.iter().filter(|byte| **byte == 0).count();
            assert!(zeroes < 200, "{zeroes} zeroes in {}", first.len());
            ring.set_used_event(1);
            let again = ring.offer(&[Part::Write(4100)]);
            ring.notify();
            assert_eq!(ring.wait_used(), (again.head, 4100));
            assert_ne!(ring.answer(&again), first);
        }
    }

    #[test]
    fn a_huge_buffer_gets_a_part_and_a_full_queue_gets_all() {
        let (driver, mut device) = (TestDriver::new(0), device());
        let mut ring = start(&driver, &mut device);
        let huge = ring.offer(&[Part::Write(3 << 20)]);
        ring.notify();
        assert_eq!(ring.wait_used(), (huge.head, MOST as u32));
        let tail = &ring.answer(&huge)[MOST..];
        assert!(tail.iter().all(|byte| *byte == 0));
        // More than one turn's worth, with one notification.
        let heads: Vec<u16> =
            (1..QUEUE_SIZE).map(|_| ring.offer(&[Part::Write(64)]).head).collect();
        ring.notify();
        for head in heads {
            assert_eq!(ring.wait_used(), (head, 64));
        }
    }

    #[test]
    fn requests_wait_for_a_host_that_has_nothing_yet() {
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        fn slow(bytes: &mut [u8]) -> io::Result<usize> {
            if ASKED.fetch_add(1, Ordering::SeqCst) < 2 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            bytes.fill(7);
            Ok(bytes.len().min(10))
        }
        let (driver, mut device) = (TestDriver::new(0), device());
        device.source = slow;
        let mut ring = start(&driver, &mut device);
        let offered = ring.offer(&[Part::Write(32)]);
        ring.notify();
        assert_eq!(ring.wait_used(), (offered.head, 32));
        assert_eq!(ring.answer(&offered), [7; 32]);
        assert!(!driver.signal.seen().needs_reset);
    }

    #[test]
    fn a_host_that_refuses_ends_the_device_and_a_reset_revives_it() {
        fn refuses(_: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::Unsupported.into())
        }
        let (driver, mut device) = (TestDriver::new(0), device());
        device.source = refuses;
        let mut ring = start(&driver, &mut device);
        ring.offer(&[Part::Write(32)]);
        ring.notify();
        driver.signal.wait(|signals| signals.needs_reset);
        assert_eq!(ring.take_used(), None);
        device.reset();
        device.source = host;
        alive(&mut device);
    }

    /// Serves an honest driver.
    fn alive(device: &mut dyn VirtioDevice) {
        let driver = TestDriver::new(feature::EVENT_IDX);
        let mut ring = start(&driver, device);
        let offered = ring.offer(&[Part::Write(16)]);
        ring.notify();
        assert_eq!(ring.wait_used(), (offered.head, 16));
        device.reset();
    }

    #[test]
    fn requests_of_the_wrong_shape_are_refused() {
        for parts in [&[Part::Read(b"x")][..], &[Part::Read(b"x"), Part::Write(9)]] {
            let (driver, mut device) = (TestDriver::new(0), device());
            let mut ring = start(&driver, &mut device);
            ring.offer(parts);
            ring.notify();
            driver.signal.wait(|signals| signals.needs_reset);
            device.reset();
            alive(&mut device);
        }
    }

    #[test]
    fn hostile_drivers_are_survived() {
        let mut device = device();
        hostile::all(&mut device, &[(REQUESTS, Part::Write(64))], &|| (), &alive);
    }
}
