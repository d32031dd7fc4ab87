//! Virtio devices (virtio 1.2): the cores, and what carries them to a driver.
//!
//! A core is one device: it serves its queues and has a configuration space. How the
//! driver reaches it is a transport's business ([`pci`]): the transport negotiates
//! features, learns where the queues are, and then *activates* the core with them; on
//! reset it takes everything back. A core sees guest memory, its queues and a way to
//! signal its driver; it knows neither buses nor vCPUs.
//!
//! ```text
//!   driver in the guest
//!      |  registers              | rings in guest memory
//!   transport (pci)              |
//!      |  activate, reset        |
//!   core (block, net, ...) ---- DeviceQueue
//!      |  runs on IoThreads
//!   host file, socket, terminal
//! ```
//!
//! Device work runs on [`IoThreads`], not on vCPUs: a vCPU's store to a notification
//! register writes an eventfd and goes on.

use std::fmt;
use std::sync::Arc;

use crate::memory::GuestMemory;

pub mod block;
pub mod chain;
pub mod console;
pub mod entropy;
#[doc(hidden)]
pub mod fuzz;
#[cfg(test)]
mod hostile;
pub mod io_threads;
pub mod lguest_bus;
pub mod long_bus;
pub mod net;
pub mod pci;
pub mod queue;
#[doc(hidden)]
pub mod testing;

pub use chain::{Chain, ChainError};
pub use console::{Console, ConsoleHandle, ConsoleInput};
pub use entropy::Entropy;
pub use io_threads::IoThreads;
pub use queue::{DeviceQueue, QueueError};

/// What a device is (virtio 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Entropy = 4,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Entropy => "entropy",
        })
    }
}

/// Feature bits that belong to no kind of device (virtio 1.2, section 6).
pub mod feature {
    /// Descriptors may point to tables of descriptors (`VIRTIO_F_INDIRECT_DESC`).
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are wanted from an index on (`VIRTIO_F_EVENT_IDX`).
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device follows virtio 1.0 or later (`VIRTIO_F_VERSION_1`).
    pub const VERSION_1: u64 = 1 << 32;
    /// No feature of virtio's, and never on offer: the driver is of Linux 2.6.24, whose block
    /// requests and frames have headers of other lengths, and which agrees on nothing.
    pub const FIRST_HEADERS: u64 = 1 << 63;

    /// What every device here offers, by what its queues can do.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// How a core reaches its driver. Implemented by transports, called on any thread.
pub trait DriverSignal: fmt::Debug + Send + Sync {
    /// Buffers of queue number `queue` have been used (virtio 1.2, 2.3).
    fn queue_used(&self, queue: u16);

    /// The configuration space has changed (virtio 1.2, 2.4).
    fn config_changed(&self);

    /// The driver has broken the rules, or the device cannot go on: DEVICE_NEEDS_RESET
    /// is set, and the driver told (virtio 1.2, 2.1.2). The core stops until it is reset.
    fn needs_reset(&self);
}

/// What a core gets when its driver is ready (DRIVER_OK).
#[derive(Debug)]
pub struct Activation {
    /// The features both sides agreed on.
    pub features: u64,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// The queues that the driver enabled, by ascending number; there may be gaps.
    pub queues: Vec<DeviceQueue>,
    /// The way to the driver.
    pub signal: Arc<dyn DriverSignal>,
}

impl Activation {
    /// Takes queue number `index` out, if the driver enabled it.
    pub fn take_queue(&mut self, index: u16) -> Option<DeviceQueue> {
        let at = self.queues.iter().position(|queue| queue.index() == index)?;
        Some(self.queues.remove(at))
    }
}

/// Why a core could not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver did not enable a queue that the device cannot do without.
    #[error("the driver did not set up queue {0}")]
    MissingQueue(u16),
    /// The host refused a thread or a descriptor.
    #[error("the host refuses what the device needs: {0}")]
    Host(#[from] std::io::Error),
    /// The thread that should serve it is gone.
    #[error("no I/O thread serves the device: {0}")]
    IoThread(#[from] event_manager::Error),
}

/// A device core.
///
/// The transport calls these one at a time.
pub trait VirtioDevice: fmt::Debug + Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// The feature bits it offers, beside [`feature::COMMON`].
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two; as many as there are queues.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space at `offset`; what lies beyond it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the configuration space. Most devices have nothing to write there.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: serve the queues.
    ///
    /// # Errors
    /// [`ActivateError`]; the transport then reports that the device needs a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stop. When this returns, nothing of the device touches guest memory or signals
    /// the driver any more, and requests in flight are finished or given up. The device
    /// can be activated again.
    fn reset(&mut self);

    /// Stop for good: the machine ends. What the guest has handed over is not lost.
    fn shut_down(&mut self) {
        self.reset();
    }
}

/// Copies the part of a configuration space that `offset` and `data`'s length name;
/// the rest of `data` becomes zero. For [`VirtioDevice::read_config`].
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
    for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_reads_end_in_zeroes() {
        let mut data = [0xff; 4];
        read_config_bytes(&[1, 2, 3], 1, &mut data);
        assert_eq!(data, [2, 3, 0, 0]);
        read_config_bytes(&[1, 2, 3], u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
