//! The host bridge: slot 0. It has nothing but an identity, which tells the guest that
//! there is a bus.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::config::{ConfigSpace, Identity};
use super::{BarIndex, PciFunction};

/// Red Hat's generic PCI Express host, which no driver wants anything of.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// Slot 0.
#[derive(Debug)]
pub struct HostBridge(Mutex<ConfigSpace>);

impl Default for HostBridge {
    fn default() -> Self {
        Self(Mutex::new(ConfigSpace::new(&IDENTITY)))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }

    fn mapped(&self) -> Vec<(BarIndex, Range<u64>)> {
        Vec::new()
    }

    fn memory_read(&self, _: BarIndex, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn memory_write(&self, _: BarIndex, _: u64, _: &[u8]) {}
}
