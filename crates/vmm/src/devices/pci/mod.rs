//! The PCI bus: one host bridge, one bus, up to 31 devices of one function each.
//!
//! [`bus`] answers at the configuration ports, in the memory-mapped configuration space
//! (ECAM) and wherever the guest has put devices' registers. A device is a
//! [`PciFunction`]; what its configuration space looks like is [`config`]'s business, and
//! how it interrupts that of [`msix`] and [`intx`]. The platform makes the bus and fills it;
//! the ACPI tables tell the guest of it. There is no firmware to hand out addresses, so
//! they are handed out when devices are put on the bus; the guest may move them.

use std::fmt;
use std::ops::Range;

pub mod bus;
pub mod config;
#[doc(hidden)]
pub mod fuzz;
pub mod host_bridge;
pub mod intx;
pub mod msix;

pub use bus::PciBus;

/// A device's number on the bus: 0 (the host bridge) to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(pub u8);

/// How many slots a bus has.
pub const SLOTS: u8 = 32;

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.0", self.0)
    }
}

/// A base address register's number: 0 to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarIndex(pub u8);

/// A device on the bus. Called on vCPU threads, several at a time.
pub trait PciFunction: fmt::Debug + Send + Sync {
    /// Reads its configuration space; what is not there reads as zero.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes to its configuration space; what is read-only stays.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// Where its memory is at the moment, by base address register; empty while the
    /// guest has memory decoding switched off.
    fn mapped(&self) -> Vec<(BarIndex, Range<u64>)>;

    /// Reads its memory, at an offset from a base address register.
    fn memory_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]);

    /// Writes to its memory.
    fn memory_write(&self, bar: BarIndex, offset: u64, data: &[u8]);
}
