//! The host memory behind guest RAM, where it is to be mapped a second time: a file in memory.
//!
//! The CPU in software shows a process's pages at addresses of its own ([`SharedRam`]). Private
//! memory cannot be shown twice; a file can. Called by [`super::GuestRam`], which takes private
//! memory where the host has no large pages for such a file.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use softcpu::addr::PAGE_SHIFT;
use softcpu::memory::shared::LARGE;
use softcpu::memory::{SharedRam, shared};

/// One stretch of it, mapped as long as this is there.
#[derive(Debug)]
pub(super) struct Pages {
    start: *mut u8,
    len: usize,
}

// SAFETY: a mapping that belongs to this value and is not tied to a thread; nothing here looks
// at what is in it.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Where it begins.
    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    /// Maps a file of stretches of `lens` bytes, each where large pages can be. `None`: the
    /// host has none for it.
    ///
    /// # Errors
    /// The host's, when it has no memory.
    pub(super) fn shared(lens: &[u64]) -> io::Result<Option<(Vec<Self>, SharedRam)>> {
        let file = memfd_create("guest RAM", MemfdFlags::CLOEXEC)?;
        let bytes = lens.iter().sum();
        ftruncate(&file, bytes)?;
        let mut mapped = Vec::new();
        let mut offset = 0_u64;
        for len in lens {
            mapped.push(Self::of(&file, offset, *len as usize)?);
            offset = offset.saturating_add(*len);
        }
        // SAFETY: the first stretch begins where a large page can, and no machine has less RAM
        // than one.
        let large = mapped
            .first()
            .is_some_and(|first| unsafe { first.len >= LARGE && shared::collapse(first.start) });
        let frames = usize::try_from(bytes >> PAGE_SHIFT).unwrap_or(usize::MAX);
        Ok(large.then(|| (mapped, SharedRam::new(file, frames))))
    }

    /// `len` bytes of `file` from `offset`, as far from a large page's beginning as there.
    fn of(file: &impl std::os::fd::AsFd, offset: u64, len: usize) -> io::Result<Self> {
        let reserved = len.saturating_add(LARGE);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nobody's memory.
        let all = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            mmap_anonymous(std::ptr::null_mut(), reserved, ProtFlags::empty(), flags)?
        };
        let lead = (offset as usize).wrapping_sub(all.addr()) & (LARGE.saturating_sub(1));
        let start = all.wrapping_byte_add(lead);
        // What is left of the reservation stays so: nothing may lie right beside RAM.
        // SAFETY: takes the place of a part of the reservation, which nobody uses.
        let placed = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
            mmap(start, len, access, flags, file, offset)
        };
        match placed {
            Ok(start) => Ok(Self { start: start.cast(), len }),
            Err(error) => {
                // SAFETY: the reservation, of which nobody has a pointer.
                let _ = unsafe { munmap(all, reserved) };
                Err(error)
            }
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and whoever used it had to keep the value.
        // The reservation around it, which is not accessible, is left to the process's end.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}
