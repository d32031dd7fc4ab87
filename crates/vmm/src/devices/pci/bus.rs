//! The bus: who is in which slot, and three ways to get there.
//!
//! Configuration space is reached by the ports 0xCF8 and 0xCFC (PCI Local Bus
//! Specification 3.0, 3.2.2.3.2) and by memory (PCI Express Base Specification, 7.2.2);
//! devices' registers by whatever address the guest has given them.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::config::MAPPING_END;
use super::host_bridge::HostBridge;
use super::{BarIndex, PciFunction, SLOTS, Slot};
use crate::layout::{PCI_CONFIG_DATA, PCI_ECAM};

/// The address port: configuration accesses are on.
const ENABLE: u32 = 1 << 31;

/// A function's memory where the guest has put it.
#[derive(Clone, Debug)]
struct Mapping {
    slot: Slot,
    bar: BarIndex,
    range: Range<u64>,
    function: Arc<dyn PciFunction>,
}

/// Bus 0, the only one.
#[derive(Debug)]
pub struct PciBus {
    slots: Vec<Arc<dyn PciFunction>>,
    address: Mutex<u32>,
    mappings: RwLock<Vec<Mapping>>,
}

/// There is no slot left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a machine has room for {} devices: give fewer disks and network cards", SLOTS - 1)]
pub struct BusFull;

impl Default for PciBus {
    fn default() -> Self {
        let slots: Vec<Arc<dyn PciFunction>> = vec![Arc::new(HostBridge::default())];
        Self { slots, address: Mutex::new(0), mappings: RwLock::default() }
    }
}

impl PciBus {
    /// The slot that the next device gets.
    ///
    /// # Errors
    /// [`BusFull`].
    pub fn next_slot(&self) -> Result<Slot, BusFull> {
        let next = u8::try_from(self.slots.len()).map_err(|_| BusFull)?;
        if next < SLOTS { Ok(Slot(next)) } else { Err(BusFull) }
    }

    /// Puts a device into [`PciBus::next_slot`].
    pub fn add(&mut self, function: Arc<dyn PciFunction>) {
        self.slots.push(function);
    }

    fn function(&self, slot: Slot) -> Option<&Arc<dyn PciFunction>> {
        self.slots.get(usize::from(slot.0))
    }

    fn config_read(&self, place: Place, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(function) = place.slot.and_then(|slot| self.function(slot)) {
            function.config_read(place.offset, data);
        }
    }

    fn config_write(&self, place: Place, data: &[u8]) {
        let Some(slot) = place.slot else { return };
        let Some(function) = self.function(slot) else { return };
        function.config_write(place.offset, data);
        if place.offset < MAPPING_END {
            self.remap(slot, function);
        }
    }

    /// Asks the function in `slot` where its memory is now.
    fn remap(&self, slot: Slot, function: &Arc<dyn PciFunction>) {
        let mut mappings = self.mappings.write().unwrap_or_else(PoisonError::into_inner);
        mappings.retain(|mapping| mapping.slot != slot);
        for (bar, range) in function.mapped() {
            mappings.push(Mapping { slot, bar, range, function: Arc::clone(function) });
        }
    }

    /// A load from the ports 0xCF8 to 0xCFF.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let address = *self.address.lock().unwrap_or_else(PoisonError::into_inner);
        match port.checked_sub(PCI_CONFIG_DATA) {
            Some(byte) if address & ENABLE != 0 => {
                self.config_read(Place::by_port(address, byte), data);
            }
            None if port.is_multiple_of(4) && data.len() == 4 => {
                for (to, from) in data.iter_mut().zip(address.to_le_bytes()) {
                    *to = from;
                }
            }
            _ => data.fill(0xff),
        }
    }

    /// A store to the ports 0xCF8 to 0xCFF.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        let mut address = self.address.lock().unwrap_or_else(PoisonError::into_inner);
        match port.checked_sub(PCI_CONFIG_DATA) {
            Some(byte) if *address & ENABLE != 0 => {
                let place = Place::by_port(*address, byte);
                drop(address);
                self.config_write(place, data);
            }
            None if port.is_multiple_of(4) => {
                if let Ok(bytes) = data.try_into() {
                    *address = u32::from_le_bytes(bytes) & !3;
                }
            }
            _ => {}
        }
    }

    /// A load from memory that is not RAM; `false` if nobody on the bus answers.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) -> bool {
        if PCI_ECAM.contains(&address) {
            self.config_read(Place::by_memory(address), data);
            return true;
        }
        let found = self.find(address);
        if let Some((mapping, offset)) = &found {
            mapping.function.memory_read(mapping.bar, *offset, data);
        }
        found.is_some()
    }

    /// A store to memory that is not RAM; `false` if nobody on the bus answers.
    pub fn memory_write(&self, address: u64, data: &[u8]) -> bool {
        if PCI_ECAM.contains(&address) {
            self.config_write(Place::by_memory(address), data);
            return true;
        }
        let found = self.find(address);
        if let Some((mapping, offset)) = &found {
            mapping.function.memory_write(mapping.bar, *offset, data);
        }
        found.is_some()
    }

    /// Who is at `address`, and where in there. The lock is not held while it answers:
    /// an answer may take its time.
    fn find(&self, address: u64) -> Option<(Mapping, u64)> {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let mapping = mappings.iter().find(|mapping| mapping.range.contains(&address))?;
        Some((mapping.clone(), address.saturating_sub(mapping.range.start)))
    }
}

/// A place in configuration space.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// `None` for buses and functions that there are not.
    slot: Option<Slot>,
    offset: u16,
}

impl Place {
    /// As the address port and the byte within the data port have it.
    fn by_port(address: u32, byte: u16) -> Self {
        Self::new(address >> 8, (address as u16 & 0xfc).saturating_add(byte))
    }

    /// As the address in ECAM has it.
    fn by_memory(address: u64) -> Self {
        let address = address.saturating_sub(PCI_ECAM.start);
        Self::new((address >> 12) as u32, address as u16 & 0xfff)
    }

    /// From bus (8 bits), device (5) and function (3).
    fn new(bdf: u32, offset: u16) -> Self {
        let there = bdf & 0xff07 == 0;
        let slot = there.then_some(Slot((bdf >> 3) as u8 & (SLOTS - 1)));
        Self { slot, offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::pci::config::{ConfigSpace, Identity};

    /// A device that answers with its offset and remembers what was written.
    #[derive(Debug)]
    struct Echo {
        config: Mutex<ConfigSpace>,
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl PciFunction for Echo {
        fn config_read(&self, offset: u16, data: &mut [u8]) {
            self.config.lock().unwrap().read(offset, data);
        }
        fn config_write(&self, offset: u16, data: &[u8]) {
            self.config.lock().unwrap().write(offset, data);
        }
        fn mapped(&self) -> Vec<(BarIndex, Range<u64>)> {
            self.config.lock().unwrap().mapped()
        }
        fn memory_read(&self, _: BarIndex, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn memory_write(&self, _: BarIndex, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn bus() -> (PciBus, Arc<Echo>) {
        let identity = Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 0,
            class: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let mut config = ConfigSpace::new(&identity);
        config.add_memory(BarIndex(0), 0x1000, 0xc000_0000);
        let echo = Arc::new(Echo { config: Mutex::new(config), written: Mutex::default() });
        let mut bus = PciBus::default();
        assert_eq!(bus.next_slot(), Ok(Slot(1)));
        bus.add(echo.clone());
        (bus, echo)
    }

    fn by_port(bus: &PciBus, address: u32, port: u16) -> u16 {
        let mut data = [0; 2];
        bus.port_write(0xcf8, &address.to_le_bytes());
        bus.port_read(port, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn both_ways_lead_to_the_same_configuration() {
        let (bus, _) = bus();
        assert_eq!(by_port(&bus, 0x8000_0800, 0xcfc), 0x1234);
        assert_eq!(by_port(&bus, 0x8000_0800, 0xcfe), 0x5678);
        assert_eq!(by_port(&bus, 0x8000_0000, 0xcfe), 0x0008);
        for nobody in [0x0000_0800, 0x8000_1000, 0x8000_0900, 0x8001_0800] {
            assert_eq!(by_port(&bus, nobody, 0xcfc), 0xffff, "{nobody:#x}");
        }
        let mut data = [0; 4];
        assert!(bus.memory_read(0xe000_8000, &mut data));
        assert_eq!(u32::from_le_bytes(data), 0x5678_1234);
        assert!(bus.memory_read(0xe001_0000, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.memory_read(0xe010_8000, &mut data), "there is no bus 1");
        assert!(bus.memory_read(0xe000_8ffc, &mut data));
        assert_eq!(data, [0; 4]);
        bus.port_read(0xcf8, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8001_0800);
    }

    #[test]
    fn memory_is_where_the_guest_puts_it() {
        let (bus, echo) = bus();
        let mut data = [0; 2];
        assert!(!bus.memory_read(0xc000_0010, &mut data), "decoding is off");
        bus.memory_write(0xe000_8004, &[2, 0]);
        assert!(bus.memory_read(0xc000_0010, &mut data));
        assert_eq!(data, [0x10; 2]);
        bus.memory_write(0xe000_8010, &0xd000_0000_u32.to_le_bytes());
        assert!(!bus.memory_write(0xc000_0010, &[1]));
        assert!(bus.memory_write(0xd000_0020, &[1]));
        assert_eq!(*echo.written.lock().unwrap(), [(0x20, vec![1])]);
    }

    #[test]
    fn a_bus_gets_full() {
        let (mut bus, echo) = bus();
        while bus.next_slot().is_ok() {
            bus.add(echo.clone());
        }
        assert_eq!((bus.slots.len(), bus.next_slot()), (32, Err(BusFull)));
    }
}
