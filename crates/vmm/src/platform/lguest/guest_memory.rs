//! Guest memory as hypercalls name it: by physical address, up to the guest's limit.

use std::sync::Arc;

use lguest_abi::Phys;
use softcpu::{GuestPhysAddr, PhysMemory};

use super::Death;

/// RAM, and where it ends for the guest.
#[derive(Clone, Debug)]
pub(super) struct GuestMemory {
    ram: Arc<PhysMemory>,
    limit: u64,
}

impl GuestMemory {
    /// All of `ram` below `limit`, which is no more than there is.
    pub(super) fn new(ram: Arc<PhysMemory>, limit: u64) -> Self {
        Self { ram, limit }
    }

    /// Whether `len` bytes at `at` are the guest's.
    pub(super) fn check(&self, at: Phys, len: usize) -> Result<(), Death> {
        let end = u64::from(at.0).saturating_add(len as u64);
        if end <= self.limit {
            Ok(())
        } else {
            Err(Death::OutsideMemory { at, len, limit: self.limit })
        }
    }

    /// Where memory ends.
    pub(super) const fn limit(&self) -> u64 {
        self.limit
    }

    /// Copies out.
    pub(super) fn read(&self, at: Phys, data: &mut [u8]) -> Result<(), Death> {
        self.check(at, data.len())?;
        self.outcome(self.ram.read(GuestPhysAddr(at.0.into()), data), at, data.len())
    }

    /// Copies in.
    pub(super) fn write(&self, at: Phys, data: &[u8]) -> Result<(), Death> {
        self.check(at, data.len())?;
        self.outcome(self.ram.write(GuestPhysAddr(at.0.into()), data), at, data.len())
    }

    /// Loads a word, which may lie anywhere.
    pub(super) fn word(&self, at: Phys) -> Result<u32, Death> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Reads as many of `len` bytes as there are.
    pub(super) fn up_to(&self, at: Phys, len: usize) -> Vec<u8> {
        let room = self.limit.saturating_sub(at.0.into());
        let len = usize::try_from(room).map_or(len, |room| room.min(len));
        let mut data = vec![0; len];
        match self.read(at, &mut data) {
            Ok(()) => data,
            Err(_) => Vec::new(),
        }
    }

    fn outcome(&self, done: bool, at: Phys, len: usize) -> Result<(), Death> {
        if done { Ok(()) } else { Err(Death::OutsideMemory { at, len, limit: self.limit }) }
    }
}
