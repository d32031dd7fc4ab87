//! The PCI transport, "modern" only (virtio 1.2, section 4.1): one function, whose base
//! address register 0 leads to all its registers.
//!
//! ```text
//!   0x0000  common configuration      0x3000  notifications, 4 bytes a queue
//!   0x1000  interrupt status          0x4000  MSI-X table
//!   0x2000  device configuration      0x6000  MSI-X pending bits
//! ```
//!
//! Each is on a page of its own, so that nothing but a notification is ever near one.
//! A notification goes straight to its queue's eventfd, past all locks. Everything else
//! is behind one lock, except what a device's threads need to signal the driver
//! (`signal`): a reset waits for those threads.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{DeviceKind, DeviceQueue, VirtioDevice};
use crate::devices::pci::config::{COMMAND_INTX_DISABLE, ConfigSpace, Identity};
use crate::devices::pci::intx::IntxPin;
use crate::devices::pci::msix::{self, MsiSink, Msix};
use crate::devices::pci::{BarIndex, PciFunction, Slot};
use crate::layout::PCI_MMIO32;
use crate::memory::GuestMemory;

mod capability;
mod common;
mod signal;
#[cfg(test)]
mod tests;

use capability::{Capabilities, Window};
use common::Common;
use signal::PciSignal;

/// How much memory a function has.
const MEMORY_SIZE: u64 = 0x8000;
/// The one base address register.
const BAR: BarIndex = BarIndex(0);

/// Where the parts are, and how long they are.
const COMMON: Range<u64> = 0..common::SIZE;
const ISR: Range<u64> = 0x1000..0x1001;
const DEVICE: Range<u64> = 0x2000..0x3000;
const NOTIFY: Range<u64> = 0x3000..0x4000;
const MSIX_TABLE: Range<u64> = 0x4000..0x6000;
const MSIX_PENDING: Range<u64> = 0x6000..0x7000;
/// Bytes between two queues' notifications.
const NOTIFY_STEP: u64 = 4;

/// Who sells virtio devices.
const VENDOR: u16 = 0x1af4;
/// Identifiers of modern devices begin here (virtio 1.2, 4.1.2.1).
const FIRST_DEVICE: u16 = 0x1040;

/// What a function needs from its machine.
#[derive(Debug)]
pub struct PciPlace {
    /// The slot it is in.
    pub slot: Slot,
    /// Its interrupt line.
    pub pin: IntxPin,
    /// Who takes its messages; without anybody it has no MSI-X.
    pub messages: Option<Arc<dyn MsiSink>>,
    /// Features of its own that are not offered, because this machine's guests have drivers
    /// that do not survive them.
    pub kept_back: u64,
    /// Guest memory, for its queues.
    pub memory: Arc<GuestMemory>,
}

/// A virtio device on the bus.
#[derive(Debug)]
pub struct VirtioPci {
    inner: Mutex<Inner>,
    signal: Arc<PciSignal>,
    kicks: Vec<Arc<EventFd>>,
}

#[derive(Debug)]
struct Inner {
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    capabilities: Capabilities,
    common: Common,
}

impl VirtioPci {
    /// Puts `device` behind a function.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(device: Box<dyn VirtioDevice>, place: PciPlace) -> std::io::Result<Arc<Self>> {
        let sizes = device.queue_sizes();
        let queues = sizes.len();
        let kicks: Vec<_> =
            sizes.iter().map(|_| DeviceQueue::new_kick()).collect::<Result<_, _>>()?;
        // A vector for each queue and one for the configuration.
        let vectors = u16::try_from(queues).unwrap_or(u16::MAX).saturating_add(1);
        let msix = Msix::new(vectors.min(MAX_VECTORS));

        let mut config = ConfigSpace::new(&identity(device.kind()));
        let slots = u64::from(place.slot.0).saturating_mul(MEMORY_SIZE);
        config.add_memory(BAR, MEMORY_SIZE, PCI_MMIO32.start.saturating_add(slots));
        config.wire_interrupt(place.pin.number());
        let capabilities = Capabilities::add(&mut config, &msix, place.messages.is_some());

        let common = Common::new(device.as_ref(), place.kept_back, place.memory);
        let signal = PciSignal::new(msix, queues, place.pin, place.messages);
        let inner = Inner { device, config, capabilities, common };
        Ok(Arc::new(Self { inner: Mutex::new(inner), signal, kicks }))
    }

    /// Stops the device for good: finishes what is in flight, for the machine's end.
    pub fn shut_down(&self) {
        self.lock().device.shut_down();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, offset: u64) {
        let queue = usize::try_from(offset / NOTIFY_STEP).ok();
        if let Some(kick) = queue.and_then(|queue| self.kicks.get(queue))
            // Its counter is full: it has been told often enough.
            && let Err(error) = kick.write(1)
        {
            tracing::debug!(%error, "a notification is lost");
        }
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = within(&COMMON, offset) {
            self.lock().common.read(at, data, &self.signal);
        } else if let Some(at) = within(&DEVICE, offset) {
            self.lock().device.read_config(at, data);
        } else if let Some(at) = within(&MSIX_TABLE, offset) {
            self.signal.table_read(at, data);
        } else if let Some(at) = within(&MSIX_PENDING, offset) {
            self.signal.pending_read(at, data);
        } else if ISR.contains(&offset)
            && let Some(first) = data.first_mut()
        {
            *first = self.signal.take_isr();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = within(&NOTIFY, offset) {
            self.notify(at);
        } else if let Some(at) = within(&COMMON, offset) {
            let Inner { device, common, .. } = &mut *self.lock();
            common.write(at, data, device.as_mut(), &self.signal, &self.kicks);
        } else if let Some(at) = within(&DEVICE, offset) {
            self.lock().device.write_config(at, data);
        } else if let Some(at) = within(&MSIX_TABLE, offset) {
            self.signal.table_write(at, data);
        }
    }
}

/// The most vectors that the table has room for.
const MAX_VECTORS: u16 = ((MSIX_TABLE.end - MSIX_TABLE.start) / msix::ENTRY_SIZE) as u16;

fn within(part: &Range<u64>, offset: u64) -> Option<u64> {
    part.contains(&offset).then(|| offset.saturating_sub(part.start))
}

fn identity(kind: DeviceKind) -> Identity {
    let device = FIRST_DEVICE.saturating_add(kind as u16);
    // PCI Code and ID Assignment Specification 1.11, section 1.
    let class = match kind {
        DeviceKind::Net => 0x02_00_00,
        DeviceKind::Block => 0x01_80_00,
        DeviceKind::Console => 0x07_80_00,
        DeviceKind::Entropy => 0x00_ff_00,
    };
    // Revision 1 or higher: not a transitional device.
    Identity {
        vendor: VENDOR,
        device,
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        subsystem: device,
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut inner = self.lock();
        inner.config.show_interrupt(self.signal.line_asserted());
        inner.config.read(offset, data);
        let window = inner.capabilities.window(offset, &inner.config);
        drop(inner);
        if let Some(Window { offset, len }) = window {
            self.read(offset, data.get_mut(..len).unwrap_or_default());
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.lock();
        inner.config.write(offset, data);
        let control = inner.capabilities.msix_control(&inner.config);
        let intx_off = inner.config.command() & COMMAND_INTX_DISABLE != 0;
        let window = inner.capabilities.window(offset, &inner.config);
        drop(inner);
        self.signal.configure(control, intx_off);
        if let Some(Window { offset, len }) = window {
            self.write(offset, data.get(..len).unwrap_or_default());
        }
    }

    fn mapped(&self) -> Vec<(BarIndex, Range<u64>)> {
        self.lock().config.mapped()
    }

    fn memory_read(&self, _: BarIndex, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }

    fn memory_write(&self, _: BarIndex, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
}
