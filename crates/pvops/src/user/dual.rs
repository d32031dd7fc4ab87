//! W^X text writing through a second mapping.

use core::sync::atomic::{Ordering, compiler_fence};

use super::stop::World;
use super::{PAGE, sys};
use crate::error::TextError;
use crate::site::Sites;
use crate::text::{Spans, Text};

/// What becomes of the program's other threads while text changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads(Policy);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    Alone,
    Stop(i32),
}

impl Threads {
    /// They are stopped by this signal, outside the sites, and go on afterwards. The
    /// signal must be one that the program does not use and that no thread blocks: a
    /// real-time signal (34 to 64).
    #[must_use]
    pub const fn stop(signal: i32) -> Self {
        Self(Policy::Stop(signal))
    }

    /// They are left alone.
    ///
    /// # Safety
    /// No other thread may run, or be in the middle of, any site that is patched, from
    /// before a change until after it: at the start of a program, usually.
    #[must_use]
    pub const unsafe fn assume_alone() -> Self {
        Self(Policy::Alone)
    }
}

/// A window of the program's text with a second, writable mapping.
///
/// The text stays shared with the second mapping until the end of the program; dropping
/// this only takes the writable mapping away.
#[derive(Debug)]
pub struct DualMapping {
    start: u64,
    len: usize,
    writable: *mut u8,
    world: Option<World>,
}

// SAFETY: the writable mapping belongs to this value alone.
unsafe impl Send for DualMapping {}

impl DualMapping {
    /// A window around all of these sites.
    ///
    /// # Errors
    /// When there are no sites, a record is malformed, or the system refuses.
    pub fn around(sites: Sites<'_>, threads: Threads) -> Result<Self, TextError> {
        let (mut start, mut end) = (u64::MAX, 0);
        for site in sites.iter().flatten() {
            start = start.min(site.address);
            end = end.max(site.address + u64::from(site.len));
        }
        if start >= end {
            return Err(TextError::OutsideWindow);
        }
        let (start, end) = (start & !(PAGE - 1), end.next_multiple_of(PAGE));
        // SAFETY: the program's own text: the sites were recorded by it, and between the
        // first and the last lie pages of the same segment.
        unsafe { Self::new(start, end, threads) }
    }

    /// The window from `start` to `end`.
    ///
    /// # Errors
    /// [`TextError::Unaligned`] when these are not page boundaries, or what the system
    /// refuses.
    ///
    /// # Safety
    /// The window must be mapped, readable and executable text that nobody writes but
    /// through this value.
    pub unsafe fn new(start: u64, end: u64, threads: Threads) -> Result<Self, TextError> {
        for address in [start, end] {
            if !address.is_multiple_of(PAGE) {
                return Err(TextError::Unaligned { address });
            }
        }
        let len = end.checked_sub(start).and_then(|len| usize::try_from(len).ok());
        let len = len.filter(|len| *len > 0).ok_or(TextError::OutsideWindow)?;
        let world = match threads.0 {
            Policy::Alone => None,
            Policy::Stop(signal) => Some(World::new(signal)?),
        };
        // Another window's writes between the copy and the change would be lost in part.
        let _turn = super::stop::exclusive();
        // SAFETY: plain calls on memory of their own, except the last in `map`: it replaces
        // the text by pages with the same content in one step, so that threads running
        // there notice nothing. Nobody writes the text between the copy and that: other
        // windows wait, or their users have promised that nobody else runs.
        unsafe {
            // Without registration, the barrier of `resume` would be refused.
            let register = sys::MEMBARRIER_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE;
            sys::ask("membarrier", sys::MEMBARRIER, [register, 0, 0, 0, 0, 0])?;
            let fd = sys::ask(
                "memfd_create",
                sys::MEMFD_CREATE,
                [c"pvops-text".as_ptr().addr(), 0, 0, 0, 0, 0],
            )?;
            let mapped = Self::map(fd, start, len);
            let _ = sys::call(sys::CLOSE, [fd, 0, 0, 0, 0, 0]);
            Ok(Self { start, len, writable: mapped?, world })
        }
    }

    /// # Safety
    /// As [`DualMapping::new`].
    unsafe fn map(fd: usize, start: u64, len: usize) -> Result<*mut u8, TextError> {
        let rw = sys::PROT_READ | sys::PROT_WRITE;
        let rx = sys::PROT_READ | sys::PROT_EXEC;
        let text = start as usize;
        // SAFETY: see `new`.
        unsafe {
            sys::ask("ftruncate", sys::FTRUNCATE, [fd, len, 0, 0, 0, 0])?;
            let alias = sys::ask("mmap", sys::MMAP, [0, len, rw, sys::MAP_SHARED, fd, 0])?;
            let writable: *mut u8 = core::ptr::with_exposed_provenance_mut(alias);
            core::ptr::copy_nonoverlapping(core::ptr::with_exposed_provenance(text), writable, len);
            let fixed = sys::MAP_SHARED | sys::MAP_FIXED;
            match sys::ask("mmap", sys::MMAP, [text, len, rx, fixed, fd, 0]) {
                Ok(_) => Ok(writable),
                Err(error) => {
                    let _ = sys::call(sys::MUNMAP, [alias, len, 0, 0, 0, 0]);
                    Err(error)
                }
            }
        }
    }

    /// Offset of a range in the window, if it lies inside whole.
    fn offset(&self, address: u64, len: usize) -> Result<usize, TextError> {
        let offset = address.checked_sub(self.start).and_then(|o| usize::try_from(o).ok());
        let end = offset.and_then(|o| o.checked_add(len));
        match (offset, end) {
            (Some(offset), Some(end)) if end <= self.len => Ok(offset),
            _ => Err(TextError::OutsideWindow),
        }
    }
}

// SAFETY: `stop` halts every other thread outside the sites, or the user has promised that
// none runs them; `resume` serializes every CPU that runs this program.
unsafe impl Text for DualMapping {
    fn covers(&self, address: u64, len: usize) -> Result<(), TextError> {
        self.offset(address, len).map(|_| ())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), TextError> {
        self.offset(address, bytes.len())?;
        let text = core::ptr::with_exposed_provenance::<u8>(address as usize);
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: inside the window, checked above, which is readable text; volatile,
            // because it changes by its other address. What executes is what counts.
            *byte = unsafe { text.add(i).read_volatile() };
        }
        Ok(())
    }

    unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), TextError> {
        let offset = self.offset(address, bytes.len())?;
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, checked above.
            unsafe { self.writable.add(offset + i).write_volatile(*byte) };
        }
        // A second window over the same pages cuts this one off from the text.
        let mut arrived = [0; crate::site::SITE_MAX as usize];
        for (i, bytes) in bytes.chunks(arrived.len()).enumerate() {
            let arrived = arrived.get_mut(..bytes.len()).ok_or(TextError::Replaced)?;
            self.read(address + (i * crate::site::SITE_MAX as usize) as u64, arrived)?;
            if arrived != bytes {
                return Err(TextError::Replaced);
            }
        }
        Ok(())
    }

    fn stop(&mut self, spans: Spans<'_>) -> Result<(), TextError> {
        match &mut self.world {
            Some(world) => world.stop(spans),
            None => Ok(()),
        }
    }

    fn resume(&mut self) {
        compiler_fence(Ordering::SeqCst);
        let sync = sys::MEMBARRIER_PRIVATE_EXPEDITED_SYNC_CORE;
        // SAFETY: a barrier. Registered for at the start, so it cannot be refused.
        let _ = unsafe { sys::call(sys::MEMBARRIER, [sync, 0, 0, 0, 0, 0]) };
        // This thread has a pipeline too: CPUID serializes it.
        let _ = core::arch::x86_64::__cpuid(0);
        if let Some(world) = &mut self.world {
            world.resume();
        }
    }
}

impl Drop for DualMapping {
    fn drop(&mut self) {
        // SAFETY: its own mapping; nobody else has the address.
        let _ = unsafe { sys::call(sys::MUNMAP, [self.writable.addr(), self.len, 0, 0, 0, 0]) };
    }
}
