//! A function's configuration space: a type 0 header and a list of capabilities
//! (PCI Local Bus Specification 3.0, section 6).
//!
//! It is bytes, and a mask of those the guest may change. That is enough for the base
//! address registers too: the bits below a register's size cannot be changed, which is
//! how the guest learns the size.

use std::ops::Range;

use super::BarIndex;

/// The header and the capabilities that fit behind it. What PCI Express added beyond is
/// empty here.
pub const CONFIG_SIZE: usize = 256;

/// Offsets in the header.
mod offset {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CLASS: usize = 0x09;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BARS: usize = 0x10;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const INTERRUPT_PIN: usize = 0x3d;
    pub(super) const FIRST_CAPABILITY: usize = 0x40;
}

/// Where the registers that decide about mappings end: command and base addresses.
pub const MAPPING_END: u16 = 0x28;

/// Command: answer to memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: may write to memory (and so send MSIs).
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: INTx is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status: INTx is asserted.
const STATUS_INTERRUPT: u8 = 1 << 3;
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// Base address register: 64 bits wide, in memory, not prefetchable.
const BAR_MEMORY_64: u8 = 0b100;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Who made it.
    pub vendor: u16,
    /// What it is, by its maker.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, from the highest byte down.
    pub class: u32,
    /// Who put it on a card.
    pub subsystem_vendor: u16,
    /// Which card.
    pub subsystem: u16,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    index: BarIndex,
    size: u64,
}

/// The configuration space of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bars: Vec<Bar>,
    /// Where the last capability's link to the next is.
    link: usize,
    /// Where the next capability can be.
    free: usize,
}

impl ConfigSpace {
    /// For a function of that identity, without memory or capabilities.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            bars: Vec::new(),
            link: offset::CAPABILITIES,
            free: offset::FIRST_CAPABILITY,
        };
        config.set(offset::VENDOR, &identity.vendor.to_le_bytes());
        config.set(offset::DEVICE, &identity.device.to_le_bytes());
        config.set(offset::REVISION, &[identity.revision]);
        let [interface, subclass, class, _] = identity.class.to_le_bytes();
        config.set(offset::CLASS, &[interface, subclass, class]);
        config.set(offset::SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        config.set(offset::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        config.allow(offset::COMMAND, &command.to_le_bytes());
        config.allow(offset::CACHE_LINE, &[0xff]);
        config.allow(offset::INTERRUPT_LINE, &[0xff]);
        config
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(mask) {
            *to = *from;
        }
    }

    /// Adds memory of `size` bytes, a power of two, at `address` for a start. It takes
    /// this base address register and the next, being 64 bits wide.
    pub fn add_memory(&mut self, index: BarIndex, size: u64, address: u64) {
        let at = bar_offset(index);
        let mask = !size.saturating_sub(1);
        self.set(at, &(address & mask).to_le_bytes());
        if let Some(low) = self.bytes.get_mut(at) {
            *low |= BAR_MEMORY_64;
        }
        self.allow(at, &mask.to_le_bytes());
        self.bars.push(Bar { index, size });
    }

    /// Adds a capability: its identifier, what follows the link, and a mask of what the
    /// guest may change there. Returns where it is.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.free;
        self.set(self.link, &[at as u8]);
        self.set(offset::STATUS, &[STATUS_CAPABILITIES]);
        self.set(at, &[id, 0]);
        self.set(at.saturating_add(2), body);
        self.allow(at.saturating_add(2), writable);
        self.link = at.saturating_add(1);
        self.free = at.saturating_add(2).saturating_add(body.len()).next_multiple_of(4);
        at as u16
    }

    /// Wires INTA, and writes down the line it arrives at, as firmware would.
    pub fn wire_interrupt(&mut self, line: u8) {
        self.set(offset::INTERRUPT_LINE, &[line]);
        self.set(offset::INTERRUPT_PIN, &[1]);
    }

    /// Shows in the status register whether INTx is asserted.
    pub fn show_interrupt(&mut self, asserted: bool) {
        if let Some(status) = self.bytes.get_mut(offset::STATUS) {
            *status &= !STATUS_INTERRUPT;
            if asserted {
                *status |= STATUS_INTERRUPT;
            }
        }
    }

    /// The guest reads.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset.into())) {
            *to = *from;
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, mask), new) in bytes.zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset::COMMAND as u16, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Where the guest has put the memory behind the base address registers.
    #[must_use]
    pub fn mapped(&self) -> Vec<(BarIndex, Range<u64>)> {
        if self.command() & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let range = |bar: &Bar| {
            let mut bytes = [0; 8];
            self.read(bar_offset(bar.index) as u16, &mut bytes);
            let start = u64::from_le_bytes(bytes) & !bar.size.saturating_sub(1);
            Some((bar.index, start..start.checked_add(bar.size)?))
        };
        self.bars.iter().filter_map(range).collect()
    }
}

fn bar_offset(index: BarIndex) -> usize {
    usize::from(index.0).saturating_mul(4).saturating_add(offset::BARS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_00,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    fn word(config: &ConfigSpace, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        config.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn the_header_is_where_the_specification_has_it() {
        let config = ConfigSpace::new(&IDENTITY);
        assert_eq!(word(&config, 0), 0x1042_1af4);
        assert_eq!(word(&config, 8), 0x0180_0001);
        assert_eq!(word(&config, 0x2c), 0x1100_1af4);
        assert_eq!(word(&config, 0x100), 0);
    }

    #[test]
    fn a_base_address_register_tells_its_size_and_moves() {
        let mut config = ConfigSpace::new(&IDENTITY);
        config.add_memory(BarIndex(0), 0x8000, 0xc000_8000);
        assert!(config.mapped().is_empty());
        config.write(4, &[0xff, 0xff]);
        assert_eq!(config.command(), 0x406);
        assert_eq!(config.mapped(), [(BarIndex(0), 0xc000_8000..0xc001_0000)]);
        config.write(0x10, &[0xff; 4]);
        assert_eq!(word(&config, 0x10), 0xffff_8004);
        config.write(0x10, &[0xff; 8]);
        assert_eq!(word(&config, 0x14), 0xffff_ffff);
        assert!(config.mapped().is_empty(), "it would end beyond the last address");
        config.write(0x10, &0x12_3456_7890_u64.to_le_bytes());
        assert_eq!(config.mapped(), [(BarIndex(0), 0x12_3456_0000..0x12_3456_8000)]);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut config = ConfigSpace::new(&IDENTITY);
        assert_eq!(word(&config, 4), 0);
        assert_eq!(config.add_capability(9, &[16, 1, 2], &[0, 0xf0]), 0x40);
        assert_eq!(config.add_capability(0x11, &[0; 10], &[]), 0x48);
        assert_eq!((word(&config, 4), word(&config, 0x34)), (0x10_0000, 0x40));
        assert_eq!((word(&config, 0x40), word(&config, 0x48)), (0x0110_4809, 0x11));
        config.write(0x40, &[0xff; 5]);
        assert_eq!((word(&config, 0x40), word(&config, 0x44)), (0xf110_4809, 2));
        config.show_interrupt(true);
        assert_eq!(word(&config, 4), 0x18_0000);
    }
}
