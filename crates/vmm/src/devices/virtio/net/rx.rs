//! Received frames into the driver's buffers (virtio 1.2, 5.1.6.3 and 5.1.6.4).

use std::collections::VecDeque;
use std::io::{self, Write};

use zerocopy::IntoBytes;

use super::super::{Chain, ChainError, DeviceQueue};
use super::QUEUE_SIZE;
use super::fault::Fault;
use super::feature;
use super::header::{Header, len_in_queues};

/// How often an empty queue is looked at again before other work has its turn.
const LOOKS: u32 = 16;

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// The driver has it.
    Done,
    /// It fits into no buffer the driver has.
    Dropped,
    /// It must wait: there are no buffers. A notification will come.
    NoBuffers,
}

/// A receive queue.
#[derive(Debug)]
pub(super) struct RxQueue {
    queue: DeviceQueue,
    /// Buffers taken from the queue and not used yet.
    held: VecDeque<Chain>,
    /// A frame may stretch over several buffers.
    mergeable: bool,
    header_len: usize,
    /// The driver has been asked to notify.
    waiting: bool,
    used: Vec<(u16, u32)>,
}

impl RxQueue {
    pub(super) fn new(queue: DeviceQueue, features: u64) -> Self {
        Self {
            queue,
            held: VecDeque::new(),
            mergeable: features & feature::MRG_RXBUF != 0,
            header_len: len_in_queues(features),
            waiting: true,
            used: Vec::new(),
        }
    }

    pub(super) const fn queue(&self) -> &DeviceQueue {
        &self.queue
    }

    /// Signals the driver, if it wants to hear of what was delivered.
    pub(super) fn notify(&mut self) -> Result<(), Fault> {
        Ok(self.queue.notify()?)
    }

    /// Gives a frame to the driver.
    ///
    /// # Errors
    /// [`Fault`]: a buffer makes no sense.
    pub(super) fn deliver(&mut self, header: &Header, frame: &[u8]) -> Result<Delivery, Fault> {
        let needed = self.header_len.saturating_add(frame.len()) as u64;
        let most = if self.mergeable { usize::from(QUEUE_SIZE) } else { 1 };
        let (mut room, mut count) = (0_u64, 0_usize);
        while room < needed {
            if count >= most {
                return Ok(Delivery::Dropped);
            }
            if count >= self.held.len() && !self.hold()? {
                return Ok(Delivery::NoBuffers);
            }
            room = room.saturating_add(self.held.get(count).map_or(0, Chain::writable));
            count = count.saturating_add(1);
        }
        let header = Header { num_buffers: (count as u16).into(), ..*header };
        let header = header.as_bytes();
        let mut bytes = [header.get(..self.header_len).unwrap_or(header), frame];
        let mut left = needed;
        self.used.clear();
        for chain in self.held.drain(..count) {
            let here = chain.writable().min(left);
            left = left.saturating_sub(here);
            let mut writer = chain.writer()?;
            fill(&mut writer, &mut bytes, here).map_err(|_| ChainError::Endless)?;
            self.used.push((chain.head(), here as u32));
        }
        self.queue.push_together(&self.used)?;
        Ok(Delivery::Done)
    }

    /// Takes one more buffer; `false`: there is none.
    fn hold(&mut self) -> Result<bool, Fault> {
        let mut looks = LOOKS;
        let chain = loop {
            if let Some(chain) = self.queue.pop()? {
                break chain;
            }
            self.waiting = true;
            if !self.queue.await_kicks()? {
                return Ok(false);
            }
            // What is said to be there may not be: the driver writes that index.
            let Some(less) = looks.checked_sub(1) else {
                let _ = self.queue.kick().write(1);
                return Ok(false);
            };
            looks = less;
        };
        if std::mem::take(&mut self.waiting) {
            self.queue.suppress_kicks()?;
        }
        // Every buffer must hold a header at least (virtio 1.2, 5.1.6.3.1).
        if chain.readable() != 0 || chain.writable() < self.header_len as u64 {
            return Err(Fault::Buffer);
        }
        self.held.push_back(chain);
        Ok(true)
    }
}

/// Copies `len` bytes off the front of `from`.
fn fill(to: &mut impl Write, from: &mut [&[u8]; 2], len: u64) -> io::Result<()> {
    let mut left = len as usize;
    for part in from {
        let (now, later) = part.split_at_checked(left).unwrap_or((*part, &[]));
        to.write_all(now)?;
        left = left.saturating_sub(now.len());
        *part = later;
    }
    Ok(())
}
