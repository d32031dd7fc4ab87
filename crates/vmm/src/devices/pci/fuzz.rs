//! Body of the fuzz target for the bus: configuration space, base address registers, and
//! a virtio function's registers behind them.

use std::sync::{Arc, Mutex, OnceLock};

use super::intx::IntxLines;
use super::{PciBus, PciFunction};
use crate::devices::InterruptLine;
use crate::devices::fuzz::{Bytes, Unwired, controllers};
use crate::devices::virtio::DeviceQueue;
use crate::devices::virtio::pci::{PciPlace, VirtioPci};
use crate::devices::virtio::testing::IdleDevice;
use crate::layout::{PCI_ECAM, PCI_MMIO32};
use crate::memory::{GuestRam, MIN_RAM};

/// Mapped once: making it takes longer than using it, and what stands in it is hostile
/// anyway.
static RAM: OnceLock<Option<GuestRam>> = OnceLock::new();

/// Accesses to the bus: where (one of four ways), an address, a width, a value.
pub fn fuzz_pci(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let Some(ram) = RAM.get_or_init(|| GuestRam::new(MIN_RAM).ok()) else { return };
    let mut bus = PciBus::default();
    let lines = IntxLines::new((16, InterruptLine::new(Arc::new(Unwired), 16)), []);
    let mut served = Vec::new();
    let controller = controllers();
    for _ in 0..2 {
        let device = IdleDevice::default();
        served.push(Arc::clone(&device.queues));
        let Ok(slot) = bus.next_slot() else { return };
        let pin = lines.pin(slot);
        let messages = Some(Arc::clone(&controller) as _);
        let memory = Arc::clone(ram.mmap());
        let place = PciPlace { slot, pin, messages, kept_back: 0, memory };
        let Ok(function) = VirtioPci::new(Box::new(device), place) else { return };
        bus.add(function as Arc<dyn PciFunction>);
    }
    while let (Some(operation), Some(address)) = (bytes.byte(), bytes.word()) {
        let mut data = bytes.take::<8>().unwrap_or_default();
        let width = 1_usize << (operation & 3);
        let data = data.get_mut(..width).unwrap_or_default();
        let write = operation & 4 != 0;
        let address = u64::from(address);
        let target = match operation >> 3 & 3 {
            0 => {
                let port = 0xcf8_u16 | (address as u16 & 7);
                let data = data.get_mut(..width.min(4)).unwrap_or_default();
                if write {
                    bus.port_write(port, data)
                } else {
                    bus.port_read(port, data)
                }
                continue;
            }
            1 => PCI_ECAM.start.wrapping_add(address & 0x1_ffff),
            2 => PCI_MMIO32.start.wrapping_add(address & 0x1_ffff),
            _ => {
                serve(&served);
                address
            }
        };
        if write {
            bus.memory_write(target, data);
        } else {
            bus.memory_read(target, data);
        }
    }
    serve(&served);
}

fn serve(served: &[Arc<Mutex<Vec<DeviceQueue>>>]) {
    for queues in served {
        // A ring that makes no sense is the point of the exercise.
        let _: Result<(), _> = IdleDevice::serve(queues);
    }
}
