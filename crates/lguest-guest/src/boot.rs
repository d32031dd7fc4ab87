//! Where the kernel runs, and what it was started with.

use core::ops::Range;
use core::sync::atomic::{AtomicU8, Ordering};

use lguest_abi::long::entry::{DIRECT_MAP, KERNEL_MAP};

/// What the kernel runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    /// lguest, by its 64-bit ABI.
    Lguest,
    /// A PC.
    Pc,
}

static PLATFORM: AtomicU8 = AtomicU8::new(0);

/// What the kernel runs on.
pub fn platform() -> Platform {
    // Relaxed: it is set once, by the entry.
    if PLATFORM.load(Ordering::Relaxed) == 0 { Platform::Lguest } else { Platform::Pc }
}

pub(crate) fn set_platform(platform: Platform) {
    PLATFORM.store(u8::from(platform == Platform::Pc), Ordering::Relaxed);
}

/// What the kernel was started with.
#[derive(Debug)]
pub struct Boot {
    /// Physical memory that nothing is in, in whole pages.
    pub memory: Range<u64>,
    /// The command line; empty if it is no UTF-8.
    pub command_line: &'static str,
    /// The initrd.
    pub initrd: &'static [u8],
}

impl Boot {
    /// Whether the command line has this word.
    pub fn has_word(&self, word: &str) -> bool {
        self.command_line.split_whitespace().any(|found| found == word)
    }
}

/// Where physical memory is seen: all of RAM, and devices below 4 GiB on a PC.
pub const fn direct(phys: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut(DIRECT_MAP.wrapping_add(phys) as usize)
}

/// The physical address of what lies in the direct map or in the kernel's image.
pub fn phys_of<T: ?Sized>(pointer: *const T) -> u64 {
    let at = pointer.cast::<()>().expose_provenance() as u64;
    if at >= KERNEL_MAP { at - KERNEL_MAP } else { at - DIRECT_MAP }
}

/// Physical memory as bytes.
///
/// # Safety
/// It is RAM that nobody writes to any more.
pub(crate) unsafe fn bytes_at(phys: u64, len: u64) -> &'static [u8] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's.
    unsafe { core::slice::from_raw_parts(direct(phys), len as usize) }
}
