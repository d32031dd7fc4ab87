//! The lguest bus, Linux 2.6.24 to 3.19: a page of descriptors above RAM, rings behind it,
//! and one hypercall to notify with ([`lguest_abi::bus`]).
//!
//! It carries the same cores as the PCI transport, for drivers from before virtio 1: the
//! ring is of the old form, in one piece, and there are no features above bit 31. A guest
//! says little, and each version says something else, so a device starts by the first sign
//! that all have: a driver that reports DRIVER_OK, or a queue that is kicked before (disks
//! are read while they are probed). What a driver breaks here stops its device, not the
//! guest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lguest_abi::bus::{Form, PAGE_BYTES, PAGES_MAX, VqConfig};
use lguest_abi::traps::{FIRST_DEVICE_IRQ, IRQS};
use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use crate::devices::InterruptLine;
use crate::memory::GuestMemory;

mod device;
mod signal;
#[cfg(test)]
mod tests;

use device::BusDevice;

/// Why devices cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// There are too many.
    #[error("more devices than the lguest bus has room for: leave some out")]
    Full,
    /// The host is out of descriptors.
    #[error("the host refuses a descriptor for a device: {0}")]
    Host(#[from] std::io::Error),
}

/// How many pages above RAM these devices take.
///
/// # Errors
/// [`BusError::Full`].
pub fn pages(cores: &[Box<dyn VirtioDevice>]) -> Result<u32, BusError> {
    let sizes = cores.iter().flat_map(|core| device::queue_sizes(core.as_ref()));
    let rings = sizes.map(|size| VqConfig::ring_pages(*size));
    let all = rings.fold(1_u32, u32::saturating_add);
    if all <= PAGES_MAX { Ok(all) } else { Err(BusError::Full) }
}

/// The bus, with its devices.
#[derive(Debug)]
pub struct LguestBus {
    page: u64,
    memory: Arc<GuestMemory>,
    devices: Mutex<Vec<BusDevice>>,
}

impl LguestBus {
    /// Puts `cores` on a bus whose page is at `page`, with their rings behind it, and
    /// describes them in `form`; `lines` the interrupt line of a number.
    ///
    /// # Errors
    /// [`BusError`].
    pub fn new(
        cores: Vec<Box<dyn VirtioDevice>>,
        memory: Arc<GuestMemory>,
        page: u32,
        form: Form,
        lines: impl Fn(u8) -> InterruptLine,
    ) -> Result<Self, BusError> {
        let mut frame = (page >> 12).saturating_add(1);
        let mut irq = FIRST_DEVICE_IRQ;
        let mut bytes = [0; PAGE_BYTES];
        let mut at = 0;
        let mut devices = Vec::new();
        for core in cores {
            let mut queues = Vec::new();
            for size in device::queue_sizes(core.as_ref()) {
                if irq >= IRQS {
                    return Err(BusError::Full);
                }
                queues.push(VqConfig { num: *size, irq: irq.into(), pfn: frame });
                frame = frame.saturating_add(VqConfig::ring_pages(*size));
                irq = irq.saturating_add(1);
            }
            let next = device::describe(core.as_ref(), form, &mut bytes, at, &queues)
                .ok_or(BusError::Full)?;
            let way = queues.iter().map(|queue| lines(queue.irq as u8)).collect();
            let entry = u64::from(page).saturating_add(at as u64);
            devices.push(BusDevice::new(core, form, entry, queues, way)?);
            at = next;
        }
        let written = memory.write_slice(&bytes, GuestAddress(page.into()));
        written.map_err(std::io::Error::other)?;
        Ok(Self { page: page.into(), memory, devices: Mutex::new(devices) })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<BusDevice>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest notifies of `address`: a ring, or a descriptor whose status has changed.
    /// False if it is neither.
    pub fn notify(&self, address: u32) -> bool {
        let address = u64::from(address);
        let mut devices = self.lock();
        if let Some(device) = devices.iter_mut().find(|device| device.entry() == address) {
            device.status_changed(&self.memory);
            return true;
        }
        if devices.iter_mut().any(|device| device.kicked(address, &self.memory)) {
            return true;
        }
        // Within the page but at no device: nobody's, and no string either.
        address.checked_sub(self.page).is_some_and(|offset| offset < PAGE_BYTES as u64)
    }

    /// Stops the devices for good: finishes what is in flight, for the machine's end.
    pub fn shut_down(&self) {
        self.lock().iter_mut().for_each(BusDevice::shut_down);
    }
}
