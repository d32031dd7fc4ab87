//! Guest RAM that can be mapped a second time: pages of a file that is only in memory.
//!
//! The translator's mirror of a process shows such pages at addresses of its own choice. For
//! RAM like this Linux has no large pages of its own accord, as it has for a process's private
//! memory, but since 6.1 it makes one of whatever stretch it is asked to (`MADV_COLLAPSE`). It
//! is asked here, once for each stretch, when the guest first gets at a page of it, or the loader
//! is about to, or just before (`ahead`): so RAM costs the host what private memory would.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::ahead::{self, Ahead};
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
    /// Stretches that the guest or the loader has got at.
    used: Stretches,
    /// Those that the host was asked to make large pages of.
    asked: Stretches,
    ahead: Ahead,
}

/// Some of the stretches that can be large pages, a bit each.
#[derive(Debug)]
struct Stretches(Box<[AtomicU64]>);

impl Stretches {
    /// None of those in so many frames.
    fn of(frames: usize) -> Self {
        let words = (frames >> FRAMES_SHIFT >> u64::BITS.ilog2()).saturating_add(1);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    #[inline]
    fn place(&self, stretch: u32) -> Option<(&AtomicU64, u64)> {
        let word = self.0.get((stretch >> u64::BITS.ilog2()) as usize)?;
        Some((word, 1_u64.wrapping_shl(stretch)))
    }

    /// Whether `stretch` is one of them; what does not exist is.
    #[inline]
    fn has(&self, stretch: u32) -> bool {
        self.place(stretch).is_none_or(|(word, bit)| word.load(Relaxed) & bit != 0)
    }

    /// Makes `stretch` one of them. Says whether it was not.
    fn add(&self, stretch: u32) -> bool {
        self.place(stretch).is_some_and(|(word, bit)| word.fetch_or(bit, Relaxed) & bit == 0)
    }

    fn clear(&self) {
        self.0.iter().for_each(|word| word.store(0, Relaxed));
    }
}

impl SharedRam {
    /// For `file`, whose pages are the RAM of a machine of `frames` frames, mapped shared where
    /// the distance to the next large page is the same as in the file.
    #[must_use]
    pub fn new(file: OwnedFd, frames: usize) -> Self {
        let (used, asked) = (Stretches::of(frames), Stretches::of(frames));
        Self { file, used, asked, ahead: Ahead::default() }
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The RAM has been made zero, and its pages have gone back to the host.
    pub fn cleared(&self) {
        self.used.clear();
        self.asked.clear();
    }

    /// `frame`, which is mapped at `host`, is about to be used: it is to be in a large page.
    #[inline]
    pub(crate) fn used(&self, frame: RamFrame, host: *mut u8) {
        let stretch = frame.0 >> FRAMES_SHIFT;
        if !self.used.has(stretch) {
            self.reached(stretch, host);
        }
    }

    /// The first page of `stretch` to be used is at `host`.
    #[cold]
    fn reached(&self, stretch: u32, host: *mut u8) {
        if self.used.add(stretch) {
            self.ask(stretch, host);
            self.ahead.reached(stretch);
        }
    }

    /// Asks the host for a large page of `stretch`, of which a page is at `host`, if nobody has.
    fn ask(&self, stretch: u32, host: *mut u8) {
        if self.asked.add(stretch) {
            // SAFETY: `host` is a page of RAM, in a mapping of this file.
            unsafe { collapse(host) };
        }
    }

    /// Asks for large pages ahead of the guest, until that is [closed](Self::close_ahead). `place`
    /// says where a frame is mapped, if there is one.
    pub(super) fn work_ahead(&self, place: impl Fn(RamFrame) -> Option<*mut u8>) {
        while let Some(stretch) = self.ahead.next() {
            for likely in ahead::likely(stretch, |stretch| self.asked.has(stretch)) {
                if let Some(host) = place(RamFrame(likely.wrapping_shl(FRAMES_SHIFT))) {
                    self.ask(likely, host);
                }
            }
        }
    }

    /// Whoever works ahead ends.
    pub fn close_ahead(&self) {
        self.ahead.close();
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
