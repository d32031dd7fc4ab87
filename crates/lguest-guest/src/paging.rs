//! Address spaces: four levels of tables, whose upper half is the kernel's and the same in all.
//!
//! Entries are written through pvops: on a PC that is a store; on lguest also a hypercall, if
//! there was an entry before, and within [`batch`] one of many that are carried out together.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use pvops::families::mmu;
use pvops::families::types::{Pgd, Pmd, Pte, Pud};

use crate::boot::direct;
use crate::frames::{self, PAGE};
use crate::{irq, pc};

/// Bits of an entry: present, writable, for users.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Entries of a table, and of a top level's lower half.
const ENTRIES: usize = 512;
const LOWER: usize = 256;
/// Where the lower half ends.
pub const USER_END: u64 = 1 << 47;

/// The top level that the kernel was started on.
static FIRST: AtomicU64 = AtomicU64::new(0);

pub(crate) fn started_on(top: u64) {
    FIRST.store(top, Ordering::Relaxed);
}

/// What may be done with a page, beside reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Read,
    /// Writing.
    Write,
    /// Execution.
    Execute,
}

/// There is no memory for tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("out of memory")
    }
}

/// An address space. Its lower half is a user's.
#[derive(Debug)]
pub struct AddressSpace {
    top: u64,
}

impl AddressSpace {
    /// One with an empty lower half.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new() -> Result<Self, OutOfMemory> {
        let top = frames::take().ok_or(OutOfMemory)?;
        let (from, to) = (direct(FIRST.load(Ordering::Relaxed)), direct(top));
        // SAFETY: two top levels; the new one is nobody's yet.
        unsafe { from.add(PAGE / 2).copy_to_nonoverlapping(to.add(PAGE / 2), PAGE / 2) };
        Ok(Self { top })
    }

    /// Makes it the current one.
    pub fn activate(&self) {
        // SAFETY: its upper half is the kernel's, so the code that runs stays where it is.
        unsafe { mmu::write_cr3(self.top) };
    }

    /// The table below an entry, made if there is none.
    fn below(entry: *mut u64, level: usize) -> Result<*mut u64, OutOfMemory> {
        // SAFETY: an entry of a table of ours.
        let old = unsafe { entry.read_volatile() };
        if old & PRESENT != 0 {
            return Ok(direct(old & ADDRESS).cast());
        }
        let table = frames::take().ok_or(OutOfMemory)?;
        let new = table | PRESENT | WRITABLE | USER;
        // SAFETY: as above.
        unsafe {
            match level {
                3 => mmu::set_pgd(entry.cast(), Pgd(new)),
                2 => mmu::set_pud(entry.cast(), Pud(new)),
                _ => mmu::set_pmd(entry.cast(), Pmd(new)),
            }
        }
        Ok(direct(table).cast())
    }

    /// The lowest table's entry for a user's address.
    fn entry(&self, at: u64) -> Result<*mut Pte, OutOfMemory> {
        debug_assert!(at < USER_END);
        let mut table: *mut u64 = direct(self.top).cast();
        for level in [3, 2, 1] {
            let index = (at >> (12 + 9 * level)) as usize % ENTRIES;
            // SAFETY: within a table.
            table = Self::below(unsafe { table.add(index) }, level)?;
        }
        // SAFETY: within a table.
        Ok(unsafe { table.add((at >> 12) as usize % ENTRIES) }.cast())
    }

    /// Maps a page of memory for users at `at`; what was there is not any more.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn map(&self, at: u64, phys: u64, access: Access) -> Result<(), OutOfMemory> {
        let flags = match access {
            Access::Read => NO_EXECUTE,
            Access::Write => WRITABLE | NO_EXECUTE,
            Access::Execute => 0,
        };
        let entry = self.entry(at)?;
        self.set(at, entry, Pte(phys | flags | USER | PRESENT));
        Ok(())
    }

    fn set(&self, at: u64, entry: *mut Pte, value: Pte) {
        let mm = core::ptr::without_provenance_mut(self.top as usize);
        // SAFETY: an entry of our own tables, for that address. The op on lguest takes the
        // top level for the address space's name, and tells the host.
        unsafe { mmu::set_pte_at(mm, at as usize, entry, value) };
        if crate::platform() == crate::Platform::Pc {
            // SAFETY: it only forgets.
            unsafe { mmu::flush_tlb_single(at as usize) };
        }
    }

    /// The physical address of what is mapped at `at`, and whether a user may write there.
    pub fn translate(&self, at: u64) -> Option<(u64, bool)> {
        let mut table: *const u64 = direct(self.top).cast();
        for level in [3, 2, 1, 0] {
            let index = (at >> (12 + 9 * level)) as usize % ENTRIES;
            // SAFETY: within a table of ours.
            let entry = unsafe { table.add(index).read_volatile() };
            if entry & PRESENT == 0 || at >= USER_END {
                return None;
            }
            if level == 0 {
                let offset = at % PAGE as u64;
                return Some(((entry & ADDRESS) | offset, entry & WRITABLE != 0));
            }
            table = direct(entry & ADDRESS).cast();
        }
        None
    }

    /// Takes a page away from users, and returns it.
    pub fn unmap(&self, at: u64) -> Option<u64> {
        let (phys, _) = self.translate(at)?;
        let entry = self.entry(at).ok()?;
        self.set(at, entry, Pte(0));
        Some(phys & ADDRESS)
    }
}

impl Drop for AddressSpace {
    /// Gives all of its pages back, those of the user included.
    fn drop(&mut self) {
        fn clear(table: u64, level: usize, count: usize) {
            for index in 0..count {
                // SAFETY: within a table of ours.
                let entry = unsafe { direct(table).cast::<u64>().add(index).read_volatile() };
                if entry & PRESENT == 0 {
                    continue;
                }
                if level > 0 {
                    clear(entry & ADDRESS, level - 1, ENTRIES);
                }
                // SAFETY: nobody has this address space any more.
                unsafe { frames::give(entry & ADDRESS) };
            }
        }
        kernel_only();
        clear(self.top, 3, LOWER);
        // SAFETY: as above; it is not the current one any more.
        unsafe { frames::give(self.top) };
    }
}

/// Goes to the tables that the kernel was started on.
pub fn kernel_only() {
    // SAFETY: as for `activate`.
    unsafe { mmu::write_cr3(FIRST.load(Ordering::Relaxed)) };
}

/// Changes of address spaces that are carried out together.
pub fn batch<R>(work: impl FnOnce() -> R) -> R {
    // SAFETY: bound; the pair belongs together.
    unsafe { mmu::lazy_enter() };
    let result = work();
    // SAFETY: as above.
    unsafe { mmu::lazy_leave() };
    result
}

/// The address of the last page fault.
pub fn fault_address() -> u64 {
    // SAFETY: it only reads.
    unsafe { mmu::read_cr2() }
}

/// Where the next entry from user mode has its stack.
pub fn set_kernel_stack(top: u64) {
    // SAFETY: the task state is there, and the stack the caller's task's.
    irq::without(|| unsafe { pvops::families::cpu::load_sp0(pc::segments::task_state(), top) });
}
