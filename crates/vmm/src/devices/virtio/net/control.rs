//! The control queue: what the driver wants to receive, the card's address, how many
//! queue pairs it uses (virtio 1.2, 5.1.6.5).

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::super::{Chain, ChainError, DeviceQueue};
use super::fault::Fault;
use super::feature;
use super::filter::RxMode;
use super::mac::MacAddress;
use super::shared::{Shared, SharedBackend, lock};

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// The longest command, in bytes: some ten thousand addresses.
const LONGEST: u64 = 64 << 10;

/// Commands answered before other work has its turn.
const BUDGET: u32 = 64;

/// The handler.
#[derive(Debug)]
pub(super) struct Control {
    queue: DeviceQueue,
    shared: Arc<Shared>,
    /// One, or one for each pair.
    backends: Vec<SharedBackend>,
    /// Wakes each pair's worker.
    kicks: Vec<Arc<EventFd>>,
}

impl Control {
    pub(super) const fn new(
        queue: DeviceQueue,
        shared: Arc<Shared>,
        backends: Vec<SharedBackend>,
        kicks: Vec<Arc<EventFd>>,
    ) -> Self {
        Self { queue, shared, backends, kicks }
    }

    /// Answers commands.
    ///
    /// # Errors
    /// [`Fault`]: one makes no sense.
    pub(super) fn serve(&mut self) -> Result<(), Fault> {
        for _ in 0..BUDGET {
            let Some(chain) = self.queue.pop()? else {
                self.queue.notify()?;
                // The driver waits for its answer and does nothing else: a command that
                // came meanwhile must not be left lying.
                if self.queue.await_kicks()? {
                    continue;
                }
                return Ok(());
            };
            let command = read(&chain)?;
            let answer = if self.command(&command).is_some() { OK } else { ERROR };
            let written = chain.writer()?.write_all(&[answer]);
            written.map_err(|_| ChainError::Endless)?;
            self.queue.push(chain.head(), 1)?;
        }
        let _ = self.queue.kick().write(1);
        self.queue.notify()?;
        Ok(())
    }

    /// Does as told; `None`: no such command.
    fn command(&self, command: &[u8]) -> Option<()> {
        let features = self.shared.features;
        match command {
            [CLASS_RX, mode, on @ (0 | 1)] => {
                let extra = if *mode < 2 { feature::CTRL_RX } else { feature::CTRL_RX_EXTRA };
                let mode = RxMode::ALL.iter().find(|known| **known as u8 == *mode)?;
                (features & extra != 0).then(|| lock(&self.shared.filter).set_mode(*mode, *on != 0))
            }
            [CLASS_MAC, MAC_TABLE_SET, tables @ ..] if features & feature::CTRL_RX != 0 => {
                let (unicast, rest) = table(tables)?;
                let (multicast, rest) = table(rest)?;
                rest.is_empty().then(|| lock(&self.shared.filter).set_tables(&unicast, &multicast))
            }
            [CLASS_MAC, MAC_ADDR_SET, address @ ..] if features & feature::CTRL_MAC_ADDR != 0 => {
                let address = MacAddress(address.try_into().ok()?);
                if !address.is_unicast() {
                    return None;
                }
                self.shared.face.set_mac(address);
                lock(&self.shared.filter).set_own(address);
                Some(())
            }
            [CLASS_MQ, MQ_PAIRS_SET, low, high] if features & feature::MQ != 0 => {
                self.use_pairs(u16::from_le_bytes([*low, *high]))
            }
            _ => None,
        }
    }

    fn use_pairs(&self, pairs: u16) -> Option<()> {
        if pairs == 0 || usize::from(pairs) > self.kicks.len() {
            return None;
        }
        self.shared.active_pairs.store(pairs, Ordering::SeqCst);
        if self.backends.len() > 1 {
            for (backend, n) in self.backends.iter().zip(0_u16..) {
                lock(backend).set_active(n < pairs);
            }
        }
        // Frames may wait for a queue that is in use only now.
        for kick in &self.kicks {
            let _ = kick.write(1);
        }
        Some(())
    }

    fn run(&mut self) {
        if !self.shared.is_broken()
            && let Err(fault) = self.serve()
        {
            self.shared.break_down(&fault);
        }
    }
}

fn read(chain: &Chain) -> Result<Vec<u8>, Fault> {
    if chain.readable() < 2 || chain.writable() == 0 {
        return Err(Fault::Command);
    }
    let mut command = Vec::new();
    // What is longer is cut, and so is no command that is known.
    let read = chain.reader()?.take(LONGEST).read_to_end(&mut command);
    read.map_err(|_| ChainError::Endless)?;
    Ok(command)
}

/// A count, 32 bits, and so many addresses; and what follows.
fn table(bytes: &[u8]) -> Option<(Vec<MacAddress>, &[u8])> {
    let (count, rest) = bytes.split_first_chunk()?;
    let len = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (addresses, rest) = rest.split_at_checked(len)?;
    let (addresses, _) = addresses.as_chunks();
    Some((addresses.iter().copied().map(MacAddress).collect(), rest))
}

impl MutEventSubscriber for Control {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        let _ = self.queue.kick().read();
        self.run();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(self.queue.kick().as_ref(), EventSet::IN)) {
            tracing::error!(%error, "net: the host will not watch a queue");
        }
        self.run();
    }
}
