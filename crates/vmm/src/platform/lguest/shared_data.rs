//! The guest's `lguest_data`: the words that both sides read and write without asking.
//!
//! The guest does not run while the host is here, so these accesses race with nobody. That
//! the structure lies in memory was checked at LGUEST_INIT, and memory does not shrink;
//! still every access goes by the checked way.

use std::time::Duration;

use lguest_abi::Phys;
use lguest_abi::ring::{Cursor, SLOT_FREE, SLOTS, SlotForm};
use lguest_abi::shared_data::{IRQ_FLAG, Layout, Offsets};
use lguest_abi::{CallWords, shared_data};

use super::Death;
use super::guest_memory::GuestMemory;

/// Where the structure is, and how it is laid out.
#[derive(Clone, Debug)]
pub(super) struct SharedData {
    memory: GuestMemory,
    at: Phys,
    offsets: &'static Offsets,
    slots: SlotForm,
}

impl SharedData {
    /// The structure at `at`, once it is known to lie in memory.
    pub(super) fn new(
        memory: GuestMemory,
        at: Phys,
        layout: Layout,
        slots: SlotForm,
    ) -> Result<Self, Death> {
        let offsets = layout.offsets();
        memory.check(at, offsets.size)?;
        Ok(Self { memory, at, offsets, slots })
    }

    fn field(&self, offset: usize) -> Phys {
        // The structure is less than 2 KiB long and lies below the limit.
        Phys(self.at.0.wrapping_add(offset as u32))
    }

    fn get(&self, offset: usize) -> Result<u32, Death> {
        self.memory.word(self.field(offset))
    }

    fn set(&self, offset: usize, value: u32) -> Result<(), Death> {
        self.memory.write(self.field(offset), &value.to_le_bytes())
    }

    /// The guest's interrupt flag, with whatever else its `iret` path left there.
    pub(super) fn irq_enabled(&self) -> Result<u32, Death> {
        self.get(self.offsets.irq_enabled)
    }

    /// Whether interrupts may be delivered.
    pub(super) fn interrupts_enabled(&self) -> Result<bool, Death> {
        Ok(shared_data::interrupts_enabled(self.irq_enabled()?))
    }

    /// Sets or clears the guest's interrupt flag.
    pub(super) fn enable_interrupts(&self, on: bool) -> Result<(), Death> {
        self.set(self.offsets.irq_enabled, if on { IRQ_FLAG } else { 0 })
    }

    /// Which interrupts the guest has masked.
    pub(super) fn blocked(&self) -> Result<u32, Death> {
        self.get(self.offsets.blocked_interrupts)
    }

    /// Tells the guest whether an interrupt waits for its flag, if it has a word for that.
    pub(super) fn set_pending(&self, on: bool) -> Result<(), Death> {
        match self.offsets.irq_pending {
            Some(offset) => self.set(offset, if on { IRQ_FLAG } else { 0 }),
            None => Ok(()),
        }
    }

    /// Where the guest looks for the address of a page fault.
    pub(super) fn set_cr2(&self, addr: u32) -> Result<(), Death> {
        self.set(self.offsets.cr2, addr)
    }

    /// The time of day: seconds and nanoseconds since 1970.
    pub(super) fn set_time(&self, since_1970: Duration) -> Result<(), Death> {
        // 32 bits of seconds are what the structure has.
        self.set(self.offsets.time, since_1970.as_secs() as u32)?;
        self.set(self.offsets.time.wrapping_add(4), since_1970.subsec_nanos())
    }

    /// What the host says once: TSC frequency, and how much of the top of the address space
    /// is not the guest's.
    pub(super) fn introduce(&self, tsc_khz: u32, reserve_mem: u32) -> Result<(), Death> {
        self.set(self.offsets.tsc_khz, tsc_khz)?;
        self.set(self.offsets.reserve_mem, reserve_mem)
    }

    /// Where the page tables are that the host made.
    pub(super) fn set_pgdir(&self, top: Phys) -> Result<(), Death> {
        match self.offsets.pgdir {
            Some(offset) => self.set(offset, top.0),
            None => Ok(()),
        }
    }

    /// The ring's status bytes, all at once.
    pub(super) fn status(&self) -> Result<[u8; SLOTS], Death> {
        let mut status = [SLOT_FREE; SLOTS];
        self.memory.read(self.field(self.offsets.hcall_status), &mut status)?;
        Ok(status)
    }

    /// The call in a slot.
    pub(super) fn slot(&self, cursor: Cursor) -> Result<CallWords, Death> {
        let mut bytes = [0; 20];
        let at = self.offsets.hcalls.wrapping_add(self.slots.offset(cursor.slot()));
        let len = self.slots.bytes().min(bytes.len());
        self.memory.read(self.field(at), bytes.get_mut(..len).unwrap_or_default())?;
        // Twenty bytes are enough for every form.
        Ok(self.slots.read(&bytes).unwrap_or_default())
    }

    /// Gives a slot back to the guest.
    pub(super) fn free_slot(&self, cursor: Cursor) -> Result<(), Death> {
        let at = self.offsets.hcall_status.wrapping_add(cursor.slot());
        self.memory.write(self.field(at), &[SLOT_FREE])
    }
}
