//! The PCI form of V6's devices, which took the place of the lguest bus.
//!
//! Configuration mechanism #1, bus 0, function 0. An empty host bridge first, because Linux
//! looks for one; then the console; then the others. All are virtio 1.0 with one BAR and an
//! interrupt line, neither moved nor masked. Structures within the capabilities are
//! virtio's own (virtio 1.2, 4.1.4).

/// The address port. The data ports are the four from [`CONFIG_DATA`] on.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// The first data port.
pub const CONFIG_DATA: u16 = 0xcfc;
/// Registers from here on do not exist: they read as ones.
pub const CONFIG_BYTES: u8 = 152;
/// Slot of the host bridge.
pub const BRIDGE_SLOT: u8 = 0;
/// Slot of the console.
pub const CONSOLE_SLOT: u8 = 1;
/// Slots there are.
pub const SLOTS: u8 = 32;
/// The BARs begin so many bytes above RAM.
pub const MMIO_GAP: u32 = 256 * 4096;
/// Vendor of all devices but the bridge, which has 0.
pub const VENDOR: u16 = 0x1af4;
/// Add a device's virtio id.
pub const DEVICE_BASE: u16 = 0x1040;
/// Class, subclass and interface 0 of the bridge.
pub const BRIDGE_CLASS: u16 = 0x0600;
/// The revision.
pub const REVISION: u8 = 1;
/// Status: there is a list of capabilities.
pub const STATUS: u16 = 0x0010;
/// The subsystem.
pub const SUBSYSTEM: u16 = 0x40;
/// A vendor's capability.
pub const CAPABILITY_VENDOR: u8 = 0x09;
/// The port of the keyboard controller: the one port that reads as something else than ones.
pub const KEYBOARD_STATUS: u16 = 0x64;
/// What it reads as.
pub const KEYBOARD_STATUS_VALUE: u8 = 1;

/// Class and subclass of a device.
pub const fn class(virtio_id: u8) -> u16 {
    match virtio_id {
        crate::bus::device::NET => 0x0200,
        crate::bus::device::BLOCK => 0x0180,
        crate::bus::device::CONSOLE => 0x0700,
        _ => 0xff00,
    }
}

/// A capability: which structure, where it is described, and where it lies in BAR 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// virtio's number for the structure.
    pub kind: u8,
    /// In configuration space.
    pub at: u8,
    /// Bytes there.
    pub len: u8,
    /// In the BAR.
    pub offset: u32,
    /// Bytes there; 0: it depends on the device, or the guest sets it.
    pub length: u32,
    /// Where the next one is described; 0: nowhere. That of [`WINDOW`] is 0 too for a
    /// device without configuration.
    pub next: u8,
}

/// The common configuration, first in the list.
pub const COMMON: Capability =
    Capability { kind: 1, at: 0x40, len: 16, offset: 0, length: 56, next: 0x50 };
/// Where queues are kicked: one word for all, with a multiplier of 0 behind the capability.
pub const NOTIFY: Capability =
    Capability { kind: 2, at: 0x50, len: 20, offset: 56, length: 2, next: 0x64 };
/// The interrupt status.
pub const ISR: Capability =
    Capability { kind: 3, at: 0x64, len: 16, offset: 58, length: 1, next: 0x84 };
/// A window into the BAR, with its data word behind the capability: the early console.
pub const WINDOW: Capability =
    Capability { kind: 5, at: 0x84, len: 20, offset: 0, length: 0, next: 0x74 };
/// The device's configuration, last.
pub const DEVICE: Capability =
    Capability { kind: 4, at: 0x74, len: 16, offset: 60, length: 0, next: 0 };

/// All, in the order of the list.
pub const CAPABILITIES: [Capability; 5] = [COMMON, NOTIFY, ISR, WINDOW, DEVICE];

/// Where in the console's configuration a character is printed that is written there.
pub const CONSOLE_EMERG_WRITE: u32 = 8;

/// What the address port selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConfigAddress {
    /// Slot.
    pub slot: u8,
    /// Register, a multiple of four.
    pub register: u8,
}

impl ConfigAddress {
    /// From the word in the address port. `None`: disabled, or nothing that exists.
    pub const fn from_word(word: u32) -> Option<ConfigAddress> {
        let [register, function, bus, enable] = word.to_le_bytes();
        let (slot, register) = (function >> 3, register & !3);
        if enable & 0x80 == 0 || bus != 0 || function & 7 != 0 || register >= CONFIG_BYTES {
            return None;
        }
        Some(ConfigAddress { slot, register })
    }
}

/// Size of a device's BAR, with so many bytes of configuration: the next power of two.
/// `None`: there is none in 32 bits.
pub const fn bar_bytes(config_len: u32) -> Option<u32> {
    match DEVICE.offset.checked_add(config_len) {
        Some(bytes) => bytes.checked_next_power_of_two(),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_list_leads_from_each_capability_to_the_next() {
        for pair in CAPABILITIES.windows(2) {
            assert_eq!(pair[0].next, pair[1].at);
        }
        assert_eq!(DEVICE.next, 0);
    }

    #[test]
    fn capabilities_fill_configuration_space_to_its_end() {
        let mut sorted = CAPABILITIES;
        sorted.sort_by_key(|c| c.at);
        let end = sorted.iter().fold(0x40, |end, c| {
            assert_eq!(c.at, end);
            end + c.len
        });
        assert_eq!(end, CONFIG_BYTES);
    }

    #[test]
    fn bars_have_the_sizes_of_the_reference() {
        // entropy, console, network, block
        assert_eq!([0, 12, 10, 36].map(bar_bytes), [64, 128, 128, 128].map(Some));
        assert_eq!(bar_bytes(u32::MAX), None);
    }

    #[test]
    fn the_consoles_identity_is_that_of_the_reference() {
        let device = DEVICE_BASE + u16::from(crate::bus::device::CONSOLE);
        assert_eq!(u32::from(device) << 16 | u32::from(VENDOR), 0x1043_1af4);
        assert_eq!(class(crate::bus::device::CONSOLE), 0x0700);
    }

    proptest! {
        #[test]
        fn any_address_is_judged(word: u32) {
            match ConfigAddress::from_word(word) {
                Some(a) => {
                    prop_assert!(a.slot < SLOTS && a.register < CONFIG_BYTES);
                    let again = 1 << 31 | u32::from(a.slot) << 11 | u32::from(a.register);
                    prop_assert_eq!(word & 0x80ff_fffc, again);
                }
                None => prop_assert!(
                    word >> 31 == 0 || word & 0xff_0700 != 0 || word & 0xfc >= 152
                ),
            }
        }
    }
}
