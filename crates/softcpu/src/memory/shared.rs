//! Guest RAM that can be mapped a second time: pages of a file that is only in memory.
//!
//! The translator's mirror of a process shows such pages at addresses of its own choice. For
//! RAM like this Linux has no large pages of its own accord, as it has for a process's private
//! memory, but since 6.1 it makes one of whatever stretch it is asked to (`MADV_COLLAPSE`). It
//! is asked here, once for each stretch, when the guest first gets at a page of it, or the loader
//! is about to: so RAM costs the host what private memory would.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::ram::RamFrame;
use crate::addr::PAGE_SHIFT;

/// log2 of the size of the host's large pages.
const LARGE_SHIFT: u32 = 21;
/// The same in bytes.
pub const LARGE: usize = 1 << LARGE_SHIFT;
/// madvise(2), since Linux 6.1.
const MADV_COLLAPSE: libc::c_int = 25;
/// log2 of the frames in one.
const FRAMES_SHIFT: u32 = LARGE_SHIFT - PAGE_SHIFT;

/// The file of a machine's RAM: frame n is its page n.
#[derive(Debug)]
pub struct SharedRam {
    file: OwnedFd,
    /// Stretches that the host was asked to make large pages of, a bit each.
    asked: Box<[AtomicU64]>,
}

impl SharedRam {
    /// For `file`, whose pages are the RAM of a machine of `frames` frames, mapped shared where
    /// the distance to the next large page is the same as in the file.
    #[must_use]
    pub fn new(file: OwnedFd, frames: usize) -> Self {
        let words = (frames >> FRAMES_SHIFT >> u64::BITS.ilog2()).saturating_add(1);
        Self { file, asked: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The RAM has been made zero, and its pages have gone back to the host.
    pub fn cleared(&self) {
        self.asked.iter().for_each(|asked| asked.store(0, Relaxed));
    }

    /// `frame`, which is mapped at `host`, is about to be used: it is to be in a large page.
    #[inline]
    pub(crate) fn used(&self, frame: RamFrame, host: *mut u8) {
        let stretch = frame.0 >> FRAMES_SHIFT;
        let bit = 1_u64.wrapping_shl(stretch);
        let Some(asked) = self.asked.get((stretch >> u64::BITS.ilog2()) as usize) else { return };
        if asked.load(Relaxed) & bit == 0 && asked.fetch_or(bit, Relaxed) & bit == 0 {
            // SAFETY: `host` is a page of RAM, in a mapping of this file.
            unsafe { collapse(host) };
        }
    }
}

/// Asks the host to make a large page of the stretch around `page`. Says whether it did: where it
/// cannot, RAM had better be of another kind.
///
/// # Safety
/// `page` is mapped memory, shared with others.
#[cold]
pub unsafe fn collapse(page: *mut u8) -> bool {
    // A stretch without any page is none to Linux.
    // SAFETY: mapped, says the caller; reading a byte changes nothing.
    unsafe { page.read_volatile() };
    let start = page.map_addr(|at| at & !(LARGE - 1));
    // SAFETY: how the host maps what is there changes, never what it is. What of the stretch is
    // not memory of this kind makes it refuse.
    unsafe { libc::madvise(start.cast(), LARGE, MADV_COLLAPSE) == 0 }
}
