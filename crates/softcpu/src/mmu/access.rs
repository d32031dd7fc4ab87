//! Loads, stores and fetches by linear address: what instruction handlers call.
//!
//! The fast path is a TLB hit inlined into the handler. Everything else (a miss, a
//! page crossing, a device, a page with code on it) is out of line. Nothing is
//! stored before every page of an access is known to be writable, so a fault leaves
//! memory as it was.

use super::large_pages::PageSize;
use super::tlb::Fill;
use super::walk::Translation;
use super::{Access, View};
use crate::addr::{GuestPhysAddr, GuestVirtAddr, PAGE_OFFSET, room_in_page};
use crate::exception::Exception;
use crate::memory::access::{self, Scalar};
use crate::memory::ram::RamFrame;
use crate::vcpu::{Abort, Vcpu};

/// Where a piece of an access within one page goes.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// RAM at this host address; stores must be reported to the code map when marked.
    Ram { host: *mut u8, frame: RamFrame },
    /// Not RAM.
    Device(GuestPhysAddr),
}

/// Largest single access: a 512-bit vector or FXSAVE's image.
pub const MAX_ACCESS: usize = 1024;
/// What a device sees at once of an access that is larger, bytes.
const BUS_WIDTH: usize = 64;

impl Vcpu {
    /// Loads a value with the current privilege.
    #[inline(always)]
    pub(crate) fn read<T: Scalar>(&mut self, addr: u64) -> Result<T, Abort> {
        self.read_as(self.mmu.view, addr)
    }

    /// Stores a value with the current privilege.
    #[inline(always)]
    pub(crate) fn write<T: Scalar>(&mut self, addr: u64, value: T) -> Result<(), Abort> {
        self.write_as(self.mmu.view, addr, value)
    }

    /// Loads for the CPU itself (descriptor tables, TSS): supervisor whatever the CPL.
    #[inline]
    pub(crate) fn read_system<T: Scalar>(&mut self, addr: u64) -> Result<T, Abort> {
        self.read_as(View::Kernel, addr)
    }

    /// Loads a value with the permissions of `view`.
    #[inline(always)]
    pub(crate) fn read_as<T: Scalar>(&mut self, view: View, addr: u64) -> Result<T, Abort> {
        match self.mmu.data.lookup(view, addr, u64::from(T::SIZE), Access::Read) {
            // SAFETY: a TLB hit is a host address inside guest RAM with all SIZE bytes
            // in one page, and RAM outlives the vCPU.
            Some(host) => Ok(unsafe { T::load(host) }),
            None => self.read_slow(view, addr),
        }
    }

    /// Stores a value with the permissions of `view`.
    #[inline(always)]
    pub(crate) fn write_as<T: Scalar>(
        &mut self,
        view: View,
        addr: u64,
        value: T,
    ) -> Result<(), Abort> {
        match self.mmu.data.lookup(view, addr, u64::from(T::SIZE), Access::Write) {
            Some(host) => {
                // SAFETY: as in `read_as`; a write hit also means the page is writable
                // and holds no decoded code.
                unsafe { T::store(host, value) };
                Ok(())
            }
            None => self.write_slow(view, addr, value),
        }
    }

    #[cold]
    #[inline(never)]
    fn read_slow<T: Scalar>(&mut self, view: View, addr: u64) -> Result<T, Abort> {
        let mut bytes = [0; 8];
        let Some(data) = bytes.get_mut(..T::SIZE as usize) else { return Ok(T::default()) };
        self.read_bytes_as(view, addr, data)?;
        Ok(T::truncate(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn write_slow<T: Scalar>(&mut self, view: View, addr: u64, value: T) -> Result<(), Abort> {
        let bytes = value.zero_extend().to_le_bytes();
        let data = bytes.get(..T::SIZE as usize).unwrap_or(&bytes);
        self.write_bytes_as(view, addr, data)
    }

    /// Loads `data.len()` bytes (at most [`MAX_ACCESS`]) with the current privilege.
    pub(crate) fn read_bytes(&mut self, addr: u64, data: &mut [u8]) -> Result<(), Abort> {
        self.read_bytes_as(self.mmu.view, addr, data)
    }

    /// Stores `data` (at most [`MAX_ACCESS`] bytes) with the current privilege, or
    /// faults without having stored anything.
    pub(crate) fn write_bytes(&mut self, addr: u64, data: &[u8]) -> Result<(), Abort> {
        self.write_bytes_as(self.mmu.view, addr, data)
    }

    /// Checks that `len` bytes can be stored, faulting if not, and stores nothing.
    pub(crate) fn probe_write(&mut self, addr: u64, len: u64) -> Result<(), Abort> {
        if self.mmu.data.lookup(self.mmu.view, addr, len, Access::Write).is_some() {
            return Ok(());
        }
        self.places(self.mmu.view, addr, len, Access::Write).map(|_| ())
    }

    /// The host address of `len` bytes at `addr` if an instruction may work on them in
    /// place: one page, RAM, and for stores free of code. `None` asks the caller to
    /// go through [`Vcpu::read_bytes`] and [`Vcpu::write_bytes`] instead.
    #[inline]
    pub(crate) fn in_place(
        &mut self,
        addr: u64,
        len: u64,
        access: Access,
    ) -> Result<Option<*mut u8>, Abort> {
        let view = self.mmu.view;
        if let Some(host) = self.mmu.data.lookup(view, addr, len, access) {
            return Ok(Some(host));
        }
        self.places(view, addr, len, access)?;
        Ok(self.mmu.data.lookup(view, addr, len, access))
    }

    pub(crate) fn read_bytes_as(
        &mut self,
        view: View,
        addr: u64,
        data: &mut [u8],
    ) -> Result<(), Abort> {
        let places = self.places(view, addr, data.len() as u64, Access::Read)?;
        let (head, tail) = data.split_at_mut(places.first_len.min(data.len()));
        self.load_from(places.first, head);
        if let Some(second) = places.second {
            self.load_from(second, tail);
        }
        Ok(())
    }

    pub(crate) fn write_bytes_as(
        &mut self,
        view: View,
        addr: u64,
        data: &[u8],
    ) -> Result<(), Abort> {
        let places = self.places(view, addr, data.len() as u64, Access::Write)?;
        let (head, tail) = data.split_at(places.first_len.min(data.len()));
        self.store_to(places.first, head);
        if let Some(second) = places.second {
            self.store_to(second, tail);
        }
        Ok(())
    }

    fn load_from(&mut self, place: Place, data: &mut [u8]) {
        match place {
            // SAFETY: `place` covers data.len() bytes of one mapped page of RAM.
            Place::Ram { host, .. } => unsafe { copy_out(host, data) },
            Place::Device(addr) => {
                let mut addr = addr;
                for chunk in data.chunks_mut(BUS_WIDTH) {
                    self.env.mmio_read(addr, chunk);
                    addr = addr.wrapping_add(chunk.len() as u64);
                }
            }
        }
    }

    fn store_to(&mut self, place: Place, data: &[u8]) {
        match place {
            Place::Ram { host, frame } => {
                // SAFETY: `place` covers data.len() bytes of one mapped, writable page of RAM.
                unsafe { copy_in(data, host) };
                self.stored(frame, host as u64 & PAGE_OFFSET, data.len() as u64);
            }
            Place::Device(addr) => {
                let mut addr = addr;
                for chunk in data.chunks(BUS_WIDTH) {
                    self.env.mmio_write(addr, chunk);
                    addr = addr.wrapping_add(chunk.len() as u64);
                }
            }
        }
    }

    /// A store went to RAM by the slow path: tell the code map.
    pub(crate) fn stored(&mut self, frame: RamFrame, offset: u64, len: u64) {
        if self.memory.code().written(frame, offset, len) {
            self.code_hit = true;
        }
    }

    /// Translates an access that may cross into a second page.
    fn places(&mut self, view: View, addr: u64, len: u64, access: Access) -> Result<Places, Abort> {
        self.counters.slow_accesses = self.counters.slow_accesses.wrapping_add(1);
        // With breakpoints in force nothing is cached, so every access comes by here.
        if self.debug_active() {
            self.note_data_access(addr, len, access);
        }
        let room = room_in_page(addr);
        let first_len = len.min(room);
        let mut next = addr.wrapping_add(room);
        if !self.state.long_mode() {
            next &= 0xffff_ffff;
        }
        if view == View::UserAligned {
            self.check_alignment(addr, len)?;
        }
        // Both pages are translated before memory is touched; the first one's fault wins.
        let first = self.place(view, addr, access)?;
        let second = if len > room { Some(self.place(view, next, access)?) } else { None };
        Ok(Places { first, first_len: first_len as usize, second })
    }

    /// `#AC` for an access that is not a multiple of its own size (SDM vol. 3, 6.15,
    /// interrupt 17): up to 8 bytes by their size, the ten bytes of x87 by 8, larger
    /// images by 16.
    #[cold]
    fn check_alignment(&mut self, addr: u64, len: u64) -> Result<(), Abort> {
        let required = match len {
            0 | 1 => 1,
            2..=8 => len.next_power_of_two(),
            9..=15 => 8,
            _ => 16,
        };
        if addr & required.wrapping_sub(1) == 0 {
            Ok(())
        } else {
            Err(self.raise(Exception::alignment_check()))
        }
    }

    fn place(&mut self, view: View, addr: u64, access: Access) -> Result<Place, Abort> {
        if self.mmu.data.lookup_slow(view, addr) {
            self.counters.retagged = self.counters.retagged.wrapping_add(1);
        }
        if let Some(host) = self.mmu.data.lookup(view, addr, 1, access) {
            return Ok(Place::Ram { host, frame: self.mmu.data.frame(view, addr, access) });
        }
        let addr = GuestVirtAddr(addr);
        if self.state.long_mode() && !addr.is_canonical() {
            return Err(self.raise(Exception::not_canonical()));
        }
        self.counters.walks = self.counters.walks.wrapping_add(1);
        let rights = if view == View::UserAligned { View::User } else { view };
        let found = match self.mmu.walk(&self.memory, addr, rights, access) {
            Ok(found) => found,
            Err(code) => return Err(self.page_fault(addr, code)),
        };
        match self.take_in(view, addr.0, access, &found) {
            Some((page, frame)) => {
                Ok(Place::Ram { host: page.wrapping_add(addr.offset() as usize), frame })
            }
            None => Ok(Place::Device(found.addr)),
        }
    }

    /// Keeps what the walker has `found` for `access` to `addr` in the TLB, if it is RAM.
    fn take_in(
        &mut self,
        view: View,
        addr: u64,
        access: Access,
        found: &Translation,
    ) -> Option<(*mut u8, RamFrame)> {
        let stores = access == Access::Write;
        let (page, frame, storable) = self.memory.page_for(found.addr, stores)?;
        self.memory.used(frame, page);
        let storable = self.watch_page(access, frame) && storable;
        let writable =
            found.writable && found.dirty && storable && !self.memory.code().is_marked(frame);
        if view != View::UserAligned && !self.data_breakpoints_active() {
            let global = found.global && !self.memory.is_overlay();
            let fill = Fill { host: page as u64, frame, writable, global, size: found.size };
            if writable {
                self.note_grant(view, addr);
            }
            self.mmu.fill_data(view, addr, access, &fill);
        }
        Some((page, frame))
    }

    /// What a user's `access` to `addr` reaches, if it may be made unseen; as the access itself
    /// would, this marks pages as accessed and dirty. Nothing is raised.
    pub(crate) fn reached_unseen(&mut self, addr: u64, access: Access) -> Option<Reached> {
        let found = self.mmu.walk(&self.memory, GuestVirtAddr(addr), View::User, access).ok()?;
        self.take_in(View::User, addr, access, &found)?;
        self.mmu.data.lookup(View::User, addr, 1, access)?;
        Some(Reached {
            frame: self.mmu.data.frame(View::User, addr, access),
            writable: self.mmu.data.lookup(View::User, addr, 1, Access::Write).is_some(),
            size: found.size,
        })
    }

    /// The page that code at `addr` is fetched from: its host address and frame.
    /// `None` where it is not RAM.
    pub(crate) fn fetch_page(&mut self, addr: u64) -> Result<Option<(u64, RamFrame)>, Abort> {
        let user = self.mmu.user;
        if let Some(entry) = self.mmu.code.lookup(user, addr) {
            return Ok(Some((entry.host, entry.frame)));
        }
        self.fetch_page_slow(user, addr)
    }

    #[cold]
    #[inline(never)]
    fn fetch_page_slow(&mut self, user: bool, addr: u64) -> Result<Option<(u64, RamFrame)>, Abort> {
        if self.mmu.code.lookup_slow(user, addr)
            && let Some(entry) = self.mmu.code.lookup(user, addr)
        {
            return Ok(Some((entry.host, entry.frame)));
        }
        let addr = GuestVirtAddr(addr);
        if self.state.long_mode() && !addr.is_canonical() {
            return Err(self.gp(0));
        }
        self.counters.fetch_walks = self.counters.fetch_walks.wrapping_add(1);
        let view = if user { View::User } else { View::Kernel };
        let found = match self.mmu.walk(&self.memory, addr, view, Access::Fetch) {
            Ok(found) => found,
            Err(code) => return Err(self.page_fault(addr, code)),
        };
        let Some((page, frame)) = self.memory.page(found.addr) else { return Ok(None) };
        self.memory.used(frame, page);
        let fill = Fill {
            host: page as u64,
            frame,
            writable: false,
            global: found.global && !self.memory.is_overlay(),
            size: found.size,
        };
        self.mmu.fill_code(user, addr.0, &fill);
        Ok(Some((page as u64, frame)))
    }
}

/// A page of RAM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reached {
    pub(crate) frame: RamFrame,
    /// It may be stored to unseen.
    pub(crate) writable: bool,
    /// What of the guest's it is in.
    pub(crate) size: PageSize,
}

struct Places {
    first: Place,
    first_len: usize,
    second: Option<Place>,
}

/// # Safety
/// `data.len()` bytes at `host` are mapped readable guest RAM.
unsafe fn copy_out(host: *const u8, data: &mut [u8]) {
    // SAFETY: see above. Sizes that one `mov` moves are one access, as a guest that
    // synchronises through aligned words expects even on this path.
    unsafe {
        match data.len() {
            2 => data.copy_from_slice(&u16::load(host).to_le_bytes()),
            4 => data.copy_from_slice(&u32::load(host).to_le_bytes()),
            8 => data.copy_from_slice(&u64::load(host).to_le_bytes()),
            len => access::copy(host, data.as_mut_ptr(), len),
        }
    }
}

/// # Safety
/// `data.len()` bytes at `host` are mapped writable guest RAM.
unsafe fn copy_in(data: &[u8], host: *mut u8) {
    // SAFETY: see above, and `copy_out`'s reason for the sizes.
    unsafe {
        match *data {
            [a] => u8::store(host, a),
            [a, b] => u16::store(host, u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::store(host, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                u64::store(host, u64::from_le_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => access::copy(data.as_ptr(), host, data.len()),
        }
    }
}
