//! The bus of 64-bit lguest guests ([`lguest_abi::long::bus`]): pages of device blocks above
//! RAM, virtio 1.x with split rings, two hypercalls.
//!
//! The blocks are ordinary memory to the CPU: what a guest writes there counts when it calls
//! SET_STATUS or NOTIFY. So the host never believes what a block says of the host's own
//! fields; it keeps those itself and writes copies. A driver that breaks virtio's rules finds
//! its device in need of a reset; the guest dies only of naming a device that is not there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lguest_abi::long::Wire;
use lguest_abi::long::bus::{
    BLOCK_BYTES, DEVICES_MAX, Header, MAGIC, QUEUES_MAX, bus_bytes, device_at,
};
use lguest_abi::long::traps::IRQS;
use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::lguest_bus::BusError;
use crate::devices::InterruptLine;
use crate::memory::GuestMemory;

mod device;
mod signal;
#[cfg(test)]
mod tests;

use device::LongDevice;

/// The guest names a device or queue that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSuch {
    /// There is no such device.
    #[error("there is no device {0} on the bus")]
    Device(u16),
    /// The device has no such queue.
    #[error("device {device} has no queue {queue}")]
    Queue {
        /// The device.
        device: u16,
        /// The queue.
        queue: u16,
    },
}

/// How many bytes above RAM these devices take, in whole pages.
///
/// # Errors
/// [`BusError::Full`].
pub fn bytes(cores: &[Box<dyn VirtioDevice>]) -> Result<u64, BusError> {
    let count = u16::try_from(cores.len()).ok().filter(|count| *count <= DEVICES_MAX);
    let fits = cores.iter().all(|core| core.queue_sizes().len() <= QUEUES_MAX);
    match count {
        Some(count) if fits => Ok(bus_bytes(count) as u64),
        _ => Err(BusError::Full),
    }
}

/// The bus, with its devices.
#[derive(Debug)]
pub struct LongBus {
    memory: Arc<GuestMemory>,
    devices: Mutex<Vec<LongDevice>>,
}

/// Hands out interrupt numbers: 1 to 63, then from 1 again.
struct Numbers(u8);

impl Numbers {
    fn next(&mut self) -> u8 {
        let number = self.0;
        self.0 = number.saturating_add(1);
        if self.0 >= IRQS {
            self.0 = 1;
        }
        number
    }
}

impl LongBus {
    /// Puts `cores` on a bus at physical `start`, where RAM ends for the guest; `lines` makes
    /// the interrupt line of a number.
    ///
    /// # Errors
    /// [`BusError`].
    pub fn new(
        cores: Vec<Box<dyn VirtioDevice>>,
        memory: Arc<GuestMemory>,
        start: u64,
        lines: impl Fn(u8) -> InterruptLine,
    ) -> Result<Self, BusError> {
        let mut numbers = Numbers(1);
        let mut devices = Vec::new();
        for (core, number) in cores.into_iter().zip(0..) {
            let at = device_at(number).ok_or(BusError::Full)?;
            let at = start.saturating_add(at as u64);
            let config = numbers.next();
            let queues: Vec<u8> = core.queue_sizes().iter().map(|_| numbers.next()).collect();
            let irqs = device::Irqs { config, queues };
            devices.push(LongDevice::new(core, at, start, &memory, &irqs, &lines)?);
        }
        let header = Header {
            magic: MAGIC,
            devices: devices.len() as u32,
            block: BLOCK_BYTES as u32,
            ..Header::ZERO
        };
        let mut bytes = [0; BLOCK_BYTES];
        // A block has just this size.
        header.write(&mut bytes);
        memory.write_slice(&bytes, GuestAddress(start)).map_err(std::io::Error::other)?;
        Ok(Self { memory, devices: Mutex::new(devices) })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<LongDevice>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue has work.
    ///
    /// # Errors
    /// [`NoSuch`]: the guest is to be killed.
    pub fn notify(&self, device: u16, queue: u16) -> Result<(), NoSuch> {
        let devices = self.lock();
        let it = devices.get(usize::from(device)).ok_or(NoSuch::Device(device))?;
        if it.kick(queue) { Ok(()) } else { Err(NoSuch::Queue { device, queue }) }
    }

    /// The driver has set a device's status.
    ///
    /// # Errors
    /// [`NoSuch`]: the guest is to be killed.
    pub fn set_status(&self, device: u16, status: u8) -> Result<(), NoSuch> {
        let mut devices = self.lock();
        let it = devices.get_mut(usize::from(device)).ok_or(NoSuch::Device(device))?;
        it.set_status(status, &self.memory);
        Ok(())
    }

    /// Shows the guest what has changed of configurations. Called before interrupts are
    /// delivered, so that a handler finds what it was called for.
    pub fn refresh(&self) {
        for device in self.lock().iter_mut() {
            device.refresh(&self.memory);
        }
    }

    /// Stops the devices for good: finishes what is in flight, for the machine's end.
    pub fn shut_down(&self) {
        self.lock().iter_mut().for_each(LongDevice::shut_down);
    }
}
