//! Guest memory as hypercalls name it: by physical address, within RAM.

use std::sync::Arc;

use lguest_abi::long::Phys;
use softcpu::{GuestPhysAddr, PhysMemory};

use super::LongDeath;

/// RAM, and where it ends for the guest.
#[derive(Clone, Debug)]
pub(super) struct Ram {
    memory: Arc<PhysMemory>,
    end: u64,
}

impl Ram {
    /// All of `memory` below `end`, which is no more than there is.
    pub(super) fn new(memory: Arc<PhysMemory>, end: u64) -> Self {
        Self { memory, end }
    }

    /// Where it ends.
    pub(super) const fn end(&self) -> u64 {
        self.end
    }

    /// Whether `len` bytes at `at` are RAM.
    pub(super) fn holds(&self, at: Phys, len: u64) -> bool {
        at.0.checked_add(len).is_some_and(|end| end <= self.end)
    }

    fn place(&self, call: &'static str, at: Phys, len: usize) -> Result<GuestPhysAddr, LongDeath> {
        let len = len as u64;
        if self.holds(at, len) {
            Ok(GuestPhysAddr(at.0))
        } else {
            Err(LongDeath::OutsideMemory { call, at: at.0, len, end: self.end })
        }
    }

    /// Copies out, for `call`.
    pub(super) fn read(
        &self,
        call: &'static str,
        at: Phys,
        data: &mut [u8],
    ) -> Result<(), LongDeath> {
        let place = self.place(call, at, data.len())?;
        // What is below the end is there.
        let _ = self.memory.read(place, data);
        Ok(())
    }

    /// Copies in, for `call`.
    pub(super) fn write(&self, call: &'static str, at: Phys, data: &[u8]) -> Result<(), LongDeath> {
        let place = self.place(call, at, data.len())?;
        let _ = self.memory.write(place, data);
        Ok(())
    }

    /// Loads a word of the shared data, whose place LGUEST_INIT has checked: in one step, if
    /// it is aligned. Elsewhere it is 0.
    pub(super) fn word32(&self, at: u64) -> u32 {
        self.memory.load(GuestPhysAddr(at)).unwrap_or(0)
    }

    /// The same, of 64 bits.
    pub(super) fn word64(&self, at: u64) -> u64 {
        self.memory.load(GuestPhysAddr(at)).unwrap_or(0)
    }

    /// Stores such a word.
    pub(super) fn set_word32(&self, at: u64, value: u32) {
        let _ = self.memory.store(GuestPhysAddr(at), value);
    }

    /// The same, of 64 bits.
    pub(super) fn set_word64(&self, at: u64, value: u64) {
        let _ = self.memory.store(GuestPhysAddr(at), value);
    }

    /// As much of a page as there is at `at`.
    pub(super) fn page(&self, at: Phys) -> Vec<u8> {
        let mut page = vec![0; softcpu::addr::PAGE_SIZE as usize];
        if self.holds(at, page.len() as u64) && self.memory.read(GuestPhysAddr(at.0), &mut page) {
            page
        } else {
            Vec::new()
        }
    }
}
