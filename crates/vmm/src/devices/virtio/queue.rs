//! A live queue, as a device core sees it.
//!
//! The ring itself is `virtio-queue`'s. What is added: requests come out checked, the
//! driver is signalled only when it wants to be, and an eventfd says when it has put
//! something in. One thread at a time uses a queue; those that complete requests on
//! several put it behind a lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::DriverSignal;
use super::chain::{Chain, ChainError};
use crate::memory::GuestMemory;

/// Flag in the available ring: no interrupts, please (virtio 1.2, 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// What is wrong with a queue: the driver broke the rules, and the device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring makes no sense.
    #[error("queue {queue}: {error}")]
    Ring {
        /// Which queue.
        queue: u16,
        /// What `virtio-queue` found.
        error: virtio_queue::Error,
    },
    /// A request makes no sense.
    #[error("queue {queue}: {error}")]
    Chain {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        error: ChainError,
    },
}

/// One queue of an active device.
#[derive(Debug)]
pub struct DeviceQueue {
    index: u16,
    queue: Queue,
    memory: Arc<GuestMemory>,
    signal: Arc<dyn DriverSignal>,
    kick: Arc<EventFd>,
    event_idx: bool,
    /// Used entries published since the driver was last considered for a signal.
    unsignalled: u16,
}

impl DeviceQueue {
    /// Takes over `queue`, which its driver has set up, as number `index`.
    ///
    /// # Errors
    /// The ring does not lie in RAM, or makes no sense.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: Arc<GuestMemory>,
        signal: Arc<dyn DriverSignal>,
        kick: Arc<EventFd>,
    ) -> Result<Self, QueueError> {
        if !queue.is_valid(memory.as_ref()) {
            let error = virtio_queue::Error::FindMemoryRegion;
            return Err(QueueError::Ring { queue: index, error });
        }
        let event_idx = queue.event_idx_enabled();
        Ok(Self { index, queue, memory, signal, kick, event_idx, unsignalled: 0 })
    }

    /// An eventfd for a queue's notifications.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new_kick() -> io::Result<Arc<EventFd>> {
        EventFd::new(EFD_NONBLOCK).map(Arc::new)
    }

    /// Its number.
    #[must_use]
    pub const fn index(&self) -> u16 {
        self.index
    }

    /// Becomes readable when the driver has put something in. Read it before
    /// [`DeviceQueue::pop`]ping, or it stays readable.
    #[must_use]
    pub const fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Takes the next request.
    ///
    /// # Errors
    /// The driver broke the rules.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let queue = self.index;
        let next = {
            let mut available = self
                .queue
                .iter(Arc::clone(&self.memory))
                .map_err(|error| QueueError::Ring { queue, error })?;
            available.next()
        };
        next.map(|chain| Chain::new(chain, Arc::clone(&self.memory)))
            .transpose()
            .map_err(|error| QueueError::Chain { queue, error })
    }

    /// Puts back the request popped last: [`DeviceQueue::pop`] gives it again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a request back to the driver, with so many bytes written to it. Follow with
    /// [`DeviceQueue::notify`], once for several.
    ///
    /// # Errors
    /// The used ring is not there any more.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_together(&[(head, written)])
    }

    /// Gives several requests back at once: the driver sees either none of them or all,
    /// as it must for buffers that hold one packet between them (virtio 1.2, 5.1.6.4).
    ///
    /// # Errors
    /// The used ring is not there any more.
    pub fn push_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((head, written), earlier)) = used.split_last() else { return Ok(()) };
        let first = self.queue.next_used();
        let mut at = first;
        for (head, written) in earlier {
            self.write_used(at, *head, *written).map_err(|error| self.error(error))?;
            at = at.wrapping_add(1);
        }
        // The ring's index moves past all of them when the last is added.
        self.queue.set_next_used(at);
        self.queue
            .add_used(self.memory.as_ref(), *head, *written)
            .map_err(|error| self.error(error))?;
        let added = self.queue.next_used().wrapping_sub(first);
        self.unsignalled = self.unsignalled.saturating_add(added);
        Ok(())
    }

    /// Writes the used ring's entry number `at` without publishing it (virtio 1.2, 2.7.8).
    fn write_used(&self, at: u16, head: u16, written: u32) -> Result<(), virtio_queue::Error> {
        let slot = at.checked_rem(self.queue.size()).unwrap_or(0);
        let offset = u64::from(slot).saturating_mul(8).saturating_add(4);
        let entry = GuestAddress(self.queue.used_ring())
            .checked_add(offset)
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let value = u64::from(written) << 32 | u64::from(head);
        self.memory.write_obj(value.to_le(), entry).map_err(virtio_queue::Error::GuestMemory)
    }

    /// Signals the driver, if it wants to hear of what was pushed.
    ///
    /// # Errors
    /// The ring is not there any more.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        // What was published must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let added = std::mem::take(&mut self.unsignalled);
        let wanted = if self.event_idx {
            let event = self.used_event().map_err(|error| self.error(error))?;
            self.queue.next_used().wrapping_sub(event).wrapping_sub(1) < added
        } else {
            added != 0 && self.interrupts_on()
        };
        if wanted {
            self.signal.queue_used(self.index);
        }
        Ok(())
    }

    /// Behind which used entry the driver wants to be signalled (virtio 1.2, 2.7.7.2).
    fn used_event(&self) -> Result<u16, virtio_queue::Error> {
        let offset = u64::from(self.queue.size()).saturating_mul(2).saturating_add(4);
        let at = GuestAddress(self.queue.avail_ring())
            .checked_add(offset)
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let event = self.memory.load::<u16>(at, Ordering::Relaxed);
        event.map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)
    }

    /// Without event indices the driver has one flag, which `virtio-queue` leaves to us.
    fn interrupts_on(&self) -> bool {
        let flags = GuestAddress(self.queue.avail_ring());
        let flags = self.memory.load::<u16>(flags, Ordering::Relaxed);
        flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// Asks the driver not to notify while the device is at work anyway.
    ///
    /// # Errors
    /// The ring is not there any more.
    pub fn suppress_kicks(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(self.memory.as_ref()).map_err(|error| self.error(error))
    }

    /// Asks the driver to notify again. `true`: there is something already, for which
    /// no notification may come.
    ///
    /// Call it before waiting, whether notifications were suppressed or not: with event
    /// indices a driver notifies once, for the index it was told, and not again until it
    /// is told another (virtio 1.2, 2.7.10).
    ///
    /// # Errors
    /// The ring is not there any more.
    pub fn await_kicks(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(self.memory.as_ref()).map_err(|error| self.error(error))
    }

    const fn error(&self, error: virtio_queue::Error) -> QueueError {
        QueueError::Ring { queue: self.index, error }
    }
}
