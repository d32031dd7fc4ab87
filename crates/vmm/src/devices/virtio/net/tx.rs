//! The driver's frames to the backend (virtio 1.2, 5.1.6.2).

use std::io::Read;

use zerocopy::FromBytes;

use super::super::{Chain, ChainError, DeviceQueue};
use super::backends::{Backend, MAX_FRAME};
use super::fault::Fault;
use super::header::{HEADER_LEN, Header, len_in_queues};
use super::packet::ETHERNET_HEADER;

/// Frames sent before other work has its turn.
const BUDGET: u32 = 256;

/// A transmit queue.
#[derive(Debug)]
pub(super) struct TxQueue {
    queue: DeviceQueue,
    features: u64,
}

impl TxQueue {
    pub(super) const fn new(queue: DeviceQueue, features: u64) -> Self {
        Self { queue, features }
    }

    pub(super) const fn queue(&self) -> &DeviceQueue {
        &self.queue
    }

    /// Sends what there is, as far as the backend takes it, and shows each frame as it
    /// left to `sent`.
    ///
    /// # Errors
    /// [`Fault`]: a request makes no sense.
    pub(super) fn transmit(
        &mut self,
        backend: &mut dyn Backend,
        mut sent: impl FnMut(&[u8]),
    ) -> Result<(), Fault> {
        let mut budget = BUDGET;
        loop {
            // While we look anyway, a notification is a waste of the guest's time.
            self.queue.suppress_kicks()?;
            let emptied = loop {
                // When the backend can take more it says so.
                if !backend.can_send() {
                    break false;
                }
                let Some(less) = budget.checked_sub(1) else {
                    // Come back for the rest. The eventfd is full or takes it.
                    let _ = self.queue.kick().write(1);
                    break false;
                };
                budget = less;
                let Some(chain) = self.queue.pop()? else { break true };
                self.send(backend, &chain, &mut sent)?;
                self.queue.push(chain.head(), 0)?;
            };
            backend.flush();
            self.queue.notify()?;
            if !emptied || !self.queue.await_kicks()? {
                return Ok(());
            }
        }
    }

    fn send(
        &self,
        backend: &mut dyn Backend,
        chain: &Chain,
        sent: &mut impl FnMut(&[u8]),
    ) -> Result<(), Fault> {
        if chain.writable() != 0 {
            return Err(Fault::WritableFrame);
        }
        let header_len = len_in_queues(self.features);
        let len = usize::try_from(chain.readable())
            .ok()
            .and_then(|all| all.checked_sub(header_len))
            .filter(|len| *len <= MAX_FRAME)
            .ok_or(Fault::FrameLength(chain.readable()))?;
        let mut reader = chain.reader()?;
        let mut header = [0; HEADER_LEN];
        let part = header.get_mut(..header_len).unwrap_or_default();
        reader.read_exact(part).map_err(|_| ChainError::Endless)?;
        let header = Header::read_from_bytes(&header).map_err(|_| ChainError::Endless)?;
        if !header.may_be_sent(self.features) {
            return Err(Fault::Offload);
        }
        // Less than Ethernet's header goes nowhere on any network.
        if len >= ETHERNET_HEADER {
            sent(backend.send(&header, &mut reader, len));
        }
        Ok(())
    }
}
