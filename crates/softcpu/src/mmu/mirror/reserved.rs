//! Windows as the host has them: address space that is reserved, and RAM mapped into it.

use std::os::fd::AsRawFd;
use std::ptr;

use crate::memory::SharedRam;

/// Maps `len` bytes of `ram` from `offset` at `at`, in place of what is there.
///
/// # Safety
/// The range belongs to a window.
pub(super) unsafe fn map(
    at: u64,
    len: usize,
    writable: bool,
    ram: &SharedRam,
    offset: u64,
) -> bool {
    let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
    let Ok(offset) = libc::off_t::try_from(offset) else { return false };
    let file = ram.file().as_raw_fd();
    // SAFETY: takes the place of what is the caller's.
    let mapped = unsafe { libc::mmap(at as *mut _, len, protection, flags, file, offset) };
    let done = mapped != libc::MAP_FAILED;
    if done {
        // SAFETY: the mapping just made. What a guest has in memory is not for core dumps.
        unsafe { libc::madvise(mapped, len, libc::MADV_DONTDUMP) };
    }
    done
}

/// Makes `len` bytes at `at` inaccessible, whatever was there. Says whether the host did.
///
/// # Safety
/// The range belongs to a window.
pub(super) unsafe fn reserve(at: *mut u8, len: usize) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: takes the place of what is the caller's.
    unsafe { libc::mmap(at.cast(), len, libc::PROT_NONE, flags, -1, 0) != libc::MAP_FAILED }
}

/// Address space of the host's that nothing else is put into.
#[derive(Debug)]
pub(super) struct Reserved {
    start: *mut u8,
    len: usize,
}

// SAFETY: a mapping that belongs to this value and is not tied to a thread.
unsafe impl Send for Reserved {}

impl Reserved {
    pub(super) fn anywhere(len: usize, protection: libc::c_int) -> Option<Self> {
        Self::mapped(ptr::null_mut(), len, protection, 0)
    }

    /// At `start` and nowhere else, inaccessible.
    pub(super) fn at(start: u64, len: usize) -> Option<Self> {
        let wanted = start as *mut u8;
        let there = Self::mapped(wanted, len, libc::PROT_NONE, libc::MAP_FIXED_NOREPLACE)?;
        // A kernel before 4.17 takes the address for a hint.
        (there.start == wanted).then_some(there)
    }

    fn mapped(at: *mut u8, len: usize, protection: libc::c_int, how: libc::c_int) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | how;
        // SAFETY: a fresh mapping where nothing is.
        let start = unsafe { libc::mmap(at.cast(), len, protection, flags, -1, 0) };
        (start != libc::MAP_FAILED).then(|| {
            // SAFETY: the mapping just made. It is not for core dumps, which would look at all.
            unsafe { libc::madvise(start, len, libc::MADV_DONTDUMP) };
            Self { start: start.cast(), len }
        })
    }

    /// Where it begins.
    #[inline]
    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    /// Its first `len` bytes can be written to.
    pub(super) fn make_writable(&self, len: usize) -> bool {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a part of this mapping.
        unsafe { libc::mprotect(self.start.cast(), len, access) == 0 }
    }

    /// It has nothing any more.
    pub(super) fn clear(&self) -> bool {
        // SAFETY: all of this mapping.
        unsafe {
            reserve(self.start, self.len)
                || libc::mprotect(self.start.cast(), self.len, libc::PROT_NONE) == 0
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: the mapping of this value, and whoever used it is gone.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
