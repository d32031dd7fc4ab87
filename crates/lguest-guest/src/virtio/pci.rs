//! Virtio on a PC's PCI bus, whose configuration is reached by the old ports.

use alloc::vec::Vec;

use virtio_drivers::Error;
use virtio_drivers::transport::pci::bus::{Command, ConfigurationAccess, DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};

use super::KernelHal;
use crate::pc::ports::{in32, out32};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// Configuration space by ports.
#[derive(Debug)]
struct Ports;

fn select(function: DeviceFunction, offset: u8) {
    let DeviceFunction { bus, device, function } = function;
    let place = u32::from(bus) << 16 | u32::from(device) << 11 | u32::from(function) << 8;
    out32(ADDRESS, ENABLE | place | u32::from(offset));
}

impl ConfigurationAccess for Ports {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        select(function, offset);
        in32(DATA)
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, data: u32) {
        select(function, offset);
        out32(DATA, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

/// All virtio devices on the first bus.
pub(crate) fn all() -> Result<Vec<PciTransport>, Error> {
    let mut root = PciRoot::new(Ports);
    let found: Vec<_> = root.enumerate_bus(0).collect();
    let mut transports = Vec::new();
    for (function, info) in found {
        if virtio_device_type(&info).is_none() {
            continue;
        }
        root.set_command(function, Command::MEMORY_SPACE | Command::BUS_MASTER);
        let transport = PciTransport::new::<KernelHal, _>(&mut root, function);
        transports.push(transport.map_err(|_| Error::InvalidParam)?);
    }
    Ok(transports)
}
