//! The network card (virtio 1.2, 5.1).
//!
//! ```text
//!   transmit queues           receive queues           control queue
//!        tx                        rx                     control
//!          \_______  worker  ______/                         |
//!                      |                     filter, steering, active pairs
//!                   backend: passt, unix (stream), tap
//! ```
//!
//! A tap interface's kernel does checksums and segmentation for guest and host. A socket
//! carries bare frames, so there both are done here (`segment`), and the checksums
//! of what comes in are verified here (`packet`) and segments put together (`merge`), which
//! spares the guest's CPU doing it.

use std::sync::{Arc, Mutex};

use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

use super::io_threads::Attached;
use super::{
    ActivateError, Activation, DeviceKind, DeviceQueue, IoThreads, VirtioDevice, read_config_bytes,
};

mod backends;
mod checksum;
mod config;
mod control;
mod error;
mod fault;
mod filter;
#[doc(hidden)]
pub mod fuzz;
mod header;
mod mac;
mod merge;
mod packet;
mod rx;
mod segment;
mod shared;
mod steering;
#[cfg(test)]
mod tests;
mod tx;
mod worker;

pub use config::{Forward, ForwardProtocol, NetBackend, NetConfig, NetConfigError};
pub use error::NetError;
pub use mac::{MacAddress, MacError};

use backends::Backend;
use backends::passt::PasstBackend;
use backends::tap::TapBackend;
use backends::unix::UnixBackend;
use control::Control;
use rx::RxQueue;
use shared::{Face, Shared, SharedBackend, lock};
use tx::TxQueue;
use worker::{Pair, Worker};

/// Feature bits (virtio 1.2, 5.1.3).
mod feature {
    /// The device fills in checksums.
    pub(super) const CSUM: u64 = 1 << 0;
    /// The driver takes frames with their checksums verified or not filled in.
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    /// The device says which MTU to use.
    pub(super) const MTU: u64 = 1 << 3;
    /// The device has an address.
    pub(super) const MAC: u64 = 1 << 5;
    /// The driver takes large TCP segments over IPv4.
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    /// And over IPv6.
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    /// And with congestion bits.
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    /// The device cuts large TCP segments over IPv4.
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    /// And over IPv6.
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    /// And with congestion bits.
    pub(super) const HOST_ECN: u64 = 1 << 13;
    /// A received frame may stretch over several buffers.
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    /// The device says whether the link is up.
    pub(super) const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    /// It takes receive modes.
    pub(super) const CTRL_RX: u64 = 1 << 18;
    /// And more of them.
    pub(super) const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// There are several queue pairs.
    pub(super) const MQ: u64 = 1 << 22;
    /// The address can be changed by command.
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;

    /// What is offered whatever the backend.
    pub(super) const ALWAYS: u64 =
        MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_MAC_ADDR;
}

/// Buffers in each queue.
const QUEUE_SIZE: u16 = 256;

/// How many queue pairs a card has at most.
pub const MAX_PAIRS: u16 = 16;

/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;

/// `struct virtio_net_config`, as far as the offered features reach.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct ConfigSpace {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// The core of one card.
#[derive(Debug)]
pub struct Net {
    /// The address it was made with, and has again after reset.
    mac: MacAddress,
    /// One, or one for each pair.
    backends: Vec<SharedBackend>,
    pairs: u16,
    features: u64,
    mtu: u16,
    /// Of every queue: receive and transmit by turns, then control.
    queue_sizes: Vec<u16>,
    face: Arc<Face>,
    io: Arc<IoThreads>,
    attached: Vec<Attached>,
    child: Option<u32>,
}

impl Net {
    /// Makes a card as asked for, its way out of the guest ready: passt runs, the
    /// interface is taken, the peer met or waited for.
    ///
    /// `pairs` is how many queue pairs the driver may use, [`MAX_PAIRS`] at most; as many
    /// as vCPUs is right. A tap interface made for one queue has one pair.
    ///
    /// # Errors
    /// [`NetError`]: what the user or the host must do.
    pub fn open(config: &NetConfig, io: Arc<IoThreads>, pairs: u16) -> Result<Self, NetError> {
        let pairs = pairs.clamp(1, MAX_PAIRS);
        let mac = match config.mac {
            Some(mac) => mac,
            None => MacAddress::random()
                .map_err(|error| NetError::Host { what: "randomness", error })?,
        };
        let backends: Vec<Box<dyn Backend>> = match &config.backend {
            NetBackend::User { forwards } => vec![Box::new(PasstBackend::open(forwards, mac)?)],
            NetBackend::Unix { path } => vec![Box::new(UnixBackend::open(path)?)],
            NetBackend::Tap { name } => TapBackend::open(name, pairs)?
                .into_iter()
                .map(|queue| Box::new(queue) as Box<dyn Backend>)
                .collect(),
        };
        let several = matches!(config.backend, NetBackend::Tap { .. });
        let pairs = if several { backends.len() as u16 } else { pairs };
        tracing::info!("net: {config}, MAC address {mac}, {pairs} queue pairs");
        Ok(Self::new(backends, mac, io, pairs))
    }

    fn new(
        backends: Vec<Box<dyn Backend>>,
        mac: MacAddress,
        io: Arc<IoThreads>,
        pairs: u16,
    ) -> Self {
        let (mut features, mut mtu, mut up, mut child) = (feature::ALWAYS, 0, false, None);
        if let Some(first) = backends.first() {
            features |= first.features();
            (mtu, up, child) = (first.mtu(), first.is_up(), first.child());
        }
        if pairs > 1 {
            features |= feature::MQ;
        }
        let queues = usize::from(pairs).saturating_mul(2).saturating_add(1);
        Self {
            mac,
            backends: backends.into_iter().map(|each| Arc::new(Mutex::new(each))).collect(),
            pairs,
            features,
            mtu,
            queue_sizes: vec![QUEUE_SIZE; queues],
            face: Arc::new(Face::new(up, mac)),
            io,
            attached: Vec::new(),
            child,
        }
    }

    /// The process that carries its frames, if that is one: the card ends it, and waits for it.
    #[must_use]
    pub const fn child(&self) -> Option<u32> {
        self.child
    }

    /// Its address, as it was made.
    #[must_use]
    pub const fn mac(&self) -> MacAddress {
        self.mac
    }

    fn start(
        &mut self,
        shared: &Arc<Shared>,
        pairs: Vec<Pair>,
        control: Option<DeviceQueue>,
    ) -> Result<(), ActivateError> {
        for (backend, n) in self.backends.iter().zip(0_usize..) {
            lock(backend).start(shared.features, n == 0);
        }
        let kicks = pairs.iter().map(|pair| Arc::clone(pair.rx.queue().kick())).collect();
        if let Some(queue) = control {
            let control = Control::new(queue, Arc::clone(shared), self.backends.clone(), kicks);
            self.attached.push(self.io.attach(Box::new(control))?);
        }
        // A worker for each backend, and the last one has what pairs are left.
        let mut pairs = pairs.into_iter().peekable();
        let mut backends = self.backends.iter().peekable();
        while let Some(backend) = backends.next()
            && pairs.peek().is_some()
        {
            let count = if backends.peek().is_some() { 1 } else { usize::MAX };
            let served = pairs.by_ref().take(count).collect();
            let worker = Worker::new(Arc::clone(backend), served, Arc::clone(shared));
            self.attached.push(self.io.attach(Box::new(worker))?);
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = ConfigSpace {
            mac: self.face.mac().0,
            status: if self.face.is_up() { LINK_UP } else { 0 }.into(),
            max_virtqueue_pairs: self.pairs.into(),
            mtu: self.mtu.into(),
        };
        read_config_bytes(config.as_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let most = if features & feature::MQ == 0 { 1 } else { self.pairs };
        let mut pairs = Vec::new();
        for n in 0..most {
            // Receive and transmit queues by turns (virtio 1.2, 5.1.2).
            let (rx, tx) = (n.saturating_mul(2), n.saturating_mul(2).saturating_add(1));
            match (activation.take_queue(rx), activation.take_queue(tx)) {
                (Some(rx), Some(tx)) => pairs
                    .push(Pair { rx: RxQueue::new(rx, features), tx: TxQueue::new(tx, features) }),
                // The first pair is needed, the others are the driver's choice.
                (None, _) if n == 0 => return Err(ActivateError::MissingQueue(rx)),
                (_, None) if n == 0 => return Err(ActivateError::MissingQueue(tx)),
                _ => break,
            }
        }
        let control = (features & feature::CTRL_VQ != 0)
            .then(|| activation.take_queue(most.saturating_mul(2)))
            .flatten();
        let face = Arc::clone(&self.face);
        let shared = Arc::new(Shared::new(features, activation.signal, face));
        self.start(&shared, pairs, control).inspect_err(|_| self.reset())
    }

    fn reset(&mut self) {
        for attached in self.attached.drain(..) {
            // If the threads have been stopped, so has the handler.
            if let Err(error) = attached.detach() {
                tracing::debug!(%error, "net: a handler is gone already");
            }
        }
        self.face.set_mac(self.mac);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // Handlers hold the backends; what these own (passt, a socket) must go with us.
        self.reset();
    }
}
