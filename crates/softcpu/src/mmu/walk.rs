//! The page walk: from a linear address to a physical one, by the guest's tables.
//!
//! Three formats (SDM vol. 3, 4.3 to 4.5), one loop: each level reads an entry,
//! checks it, sets its accessed bit, and goes on or stops at a page. Accessed and
//! dirty bits are set with a locked compare-exchange, because other vCPUs (and the
//! guest's own code) change the same entries.

use super::large_pages::PageSize;
use super::{Access, Mmu, PHYS_BITS, PagingMode, View};
use crate::addr::{GuestPhysAddr, GuestVirtAddr, PAGE_SHIFT};
use crate::exception::PageFaultCode;
use crate::memory::PhysMemory;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE_BIT: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Physical address bits of a 64-bit entry.
const ADDRESS: u64 = ((1 << PHYS_BITS) - 1) & !0xfff;
/// Bits between the physical address and bit 52, which must be zero.
const RESERVED_HIGH: u64 = ((1 << 52) - 1) & !((1 << PHYS_BITS) - 1);

/// log2 of what one entry of a table at `level` (0 is the lowest) covers.
fn page_shift(level: u32, index_bits: u32) -> u32 {
    level.wrapping_mul(index_bits).wrapping_add(PAGE_SHIFT)
}

/// A mask of the low `n` bits, `n` below 64.
fn low_bits(n: u32) -> u64 {
    !(u64::MAX << (n & 63))
}

/// A finished translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The physical address.
    pub addr: GuestPhysAddr,
    /// A store through the same view would be allowed.
    pub writable: bool,
    /// The dirty bit is set (or the mode has none): stores need not set it.
    pub dirty: bool,
    /// Holds in every address space.
    pub global: bool,
    /// The guest page's size.
    pub size: PageSize,
}

/// One table entry, wherever it came from.
#[derive(Clone, Copy)]
struct Entry {
    addr: GuestPhysAddr,
    value: u64,
    wide: bool,
}

impl Entry {
    fn read(memory: &PhysMemory, addr: u64, wide: bool) -> Self {
        let addr = GuestPhysAddr(addr);
        // Tables outside RAM read as all ones, like any address nobody answers; the
        // reserved bits in that make it a fault where they exist.
        let value = if wide {
            memory.load::<u64>(addr).unwrap_or(u64::MAX)
        } else {
            memory.load::<u32>(addr).map_or(u64::from(u32::MAX), u64::from)
        };
        Self { addr, value, wide }
    }

    /// Sets `bits` in memory; false if the entry changed since it was read.
    fn set(self, memory: &PhysMemory, bits: u64) -> bool {
        if self.value & bits == bits {
            return true;
        }
        let new = self.value | bits;
        if self.wide {
            memory.compare_exchange::<u64>(self.addr, self.value, new)
        } else {
            memory.compare_exchange::<u32>(self.addr, self.value as u32, new as u32)
        }
    }
}

/// What the levels above a page allow together.
#[derive(Clone, Copy)]
struct Rights {
    writable: bool,
    user: bool,
    executable: bool,
}

impl Mmu {
    /// Translates `addr` for `access` with the permissions of `view`.
    ///
    /// # Errors
    /// The error code of the page fault.
    pub fn walk(
        &self,
        memory: &PhysMemory,
        addr: GuestVirtAddr,
        view: View,
        access: Access,
    ) -> Result<Translation, PageFaultCode> {
        loop {
            if let Some(done) = self.walk_once(memory, addr, view, access)? {
                return Ok(done);
            }
            // An entry changed between reading it and marking it: walk again, as the CPU does.
        }
    }

    fn walk_once(
        &self,
        memory: &PhysMemory,
        addr: GuestVirtAddr,
        view: View,
        access: Access,
    ) -> Result<Option<Translation>, PageFaultCode> {
        let (levels, wide) = match self.mode {
            PagingMode::Off => {
                return Ok(Some(Translation {
                    addr: GuestPhysAddr(addr.0),
                    writable: true,
                    dirty: true,
                    global: false,
                    size: PageSize::Small,
                }));
            }
            PagingMode::TwoLevel => (2, false),
            PagingMode::Pae => (2, true),
            PagingMode::FourLevel => (4, true),
        };
        let fault = self.fault_code(view, access);
        let (index_bits, entry_shift) = if wide { (9, 3) } else { (10, 2) };
        let mut rights = Rights { writable: true, user: true, executable: true };
        let mut table = self.root;
        if self.mode == PagingMode::Pae {
            let pdpte = self.pdpte.get((addr.0 >> 30) as usize & 3).copied().unwrap_or(0);
            if pdpte & PRESENT == 0 {
                return Err(fault);
            }
            table = pdpte & ADDRESS;
        }
        for level in (0..levels).rev() {
            let shift = page_shift(level, index_bits);
            let index = addr.0 >> shift & low_bits(index_bits);
            // The table is aligned to its own size, so its entries' addresses are an `or` away.
            let entry = Entry::read(memory, table | index << entry_shift, wide);
            if entry.value & PRESENT == 0 {
                return Err(fault);
            }
            let is_page = level == 0 || entry.value & PAGE_SIZE_BIT != 0 && self.may_be_page(level);
            let refused = if level == 0 { self.refused.lowest } else { self.refused.upper };
            if (self.reserved_bits(level, wide, is_page) | refused) & entry.value != 0 {
                return Err(fault | PageFaultCode::PRESENT | PageFaultCode::RESERVED);
            }
            rights.writable &= entry.value & WRITABLE != 0;
            rights.user &= entry.value & USER != 0;
            rights.executable &= !wide || entry.value & NO_EXECUTE == 0 || !self.rules.no_execute;
            if !is_page {
                if !entry.set(memory, ACCESSED) {
                    return Ok(None);
                }
                table = if wide { entry.value & ADDRESS } else { entry.value & 0xffff_f000 };
                continue;
            }
            if !self.allowed(rights, view, access) {
                return Err(fault | PageFaultCode::PRESENT);
            }
            let marks = if access == Access::Write { ACCESSED | DIRTY } else { ACCESSED };
            if !entry.set(memory, marks) {
                return Ok(None);
            }
            let offset = addr.0 & low_bits(shift);
            let base = if wide {
                entry.value & ADDRESS & !low_bits(shift)
            } else if level == 0 {
                entry.value & 0xffff_f000
            } else {
                // PSE-36: bits 20..13 are physical address bits 39..32.
                entry.value & 0xffc0_0000 | (entry.value & 0x1f_e000) << 19
            };
            return Ok(Some(Translation {
                addr: GuestPhysAddr(base | offset),
                writable: self.allowed(rights, view, Access::Write),
                dirty: (entry.value | marks) & DIRTY != 0,
                global: self.rules.global && entry.value & GLOBAL != 0,
                size: match level {
                    0 => PageSize::Small,
                    1 => PageSize::Large,
                    _ => PageSize::Giant,
                },
            }));
        }
        Err(fault)
    }

    /// The part of the error code that the access itself decides.
    fn fault_code(&self, view: View, access: Access) -> PageFaultCode {
        let mut code = PageFaultCode::empty();
        code.set(PageFaultCode::WRITE, access == Access::Write);
        code.set(PageFaultCode::USER, view == View::User);
        let reported =
            self.rules.no_execute && self.mode != PagingMode::TwoLevel || self.rules.smep;
        code.set(PageFaultCode::FETCH, access == Access::Fetch && reported);
        code
    }

    fn may_be_page(&self, level: u32) -> bool {
        match self.mode {
            PagingMode::TwoLevel => self.rules.pse,
            PagingMode::Pae => level == 1,
            _ => level == 1 || level == 2,
        }
    }

    fn reserved_bits(&self, level: u32, wide: bool, is_page: bool) -> u64 {
        if !wide {
            // Bit 21 of a 4 MiB page; with 40 physical bits the others are address.
            return if is_page && level == 1 { 1 << 21 } else { 0 };
        }
        let mut reserved = RESERVED_HIGH;
        if self.mode == PagingMode::Pae {
            reserved |= 0x7ff << 52;
        }
        if !self.rules.no_execute {
            reserved |= NO_EXECUTE;
        }
        if level == 3 {
            reserved |= PAGE_SIZE_BIT;
        }
        if is_page && level > 0 {
            // Address bits below the page's own size, but for PAT in bit 12.
            reserved |= low_bits(page_shift(level, 9)) & !0x1fff;
        }
        reserved
    }

    /// SDM vol. 3, 4.6.1.
    fn allowed(&self, rights: Rights, view: View, access: Access) -> bool {
        let rules = &self.rules;
        match (view, access) {
            (View::User, Access::Read) => rights.user,
            (View::User, Access::Write) => rights.user && rights.writable,
            (View::User, Access::Fetch) => rights.user && rights.executable,
            (_, Access::Fetch) => rights.executable && !(rules.smep && rights.user),
            (_, Access::Read | Access::Write) => {
                let reachable = view == View::KernelOverUser || !rules.smap || !rights.user;
                let storable = access == Access::Read || rights.writable || !rules.write_protect;
                reachable && storable
            }
        }
    }
}
