//! Physical memory by the page.

use core::ops::Range;

use crate::boot::{direct, phys_of};
use crate::irq::Masked;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Free pages: a list through themselves, and what was never used.
struct Frames {
    free: Option<*mut Free>,
    untouched: Range<u64>,
}

struct Free {
    next: Option<*mut Free>,
}

// SAFETY: the pages are nobody else's.
unsafe impl Send for Frames {}

static FRAMES: Masked<Frames> = Masked::new(Frames { free: None, untouched: 0..0 });

/// Gives the allocator the memory of [`Boot::memory`](crate::Boot).
pub fn start(memory: Range<u64>) {
    FRAMES.with(|frames| frames.untouched = memory);
}

/// A page of zeroes, by its physical address. `None`: there is no memory left.
pub fn take() -> Option<u64> {
    let page = FRAMES.with(|frames| match frames.free {
        Some(page) => {
            // SAFETY: a page of the list.
            frames.free = unsafe { (*page).next };
            Some(page.cast::<u8>())
        }
        None => take_untouched(frames, 1),
    })?;
    // SAFETY: a page that is nobody's.
    unsafe { page.write_bytes(0, PAGE) };
    Some(phys_of(page))
}

fn take_untouched(frames: &mut Frames, count: usize) -> Option<*mut u8> {
    let start = frames.untouched.start;
    let end =
        start.checked_add((count * PAGE) as u64).filter(|end| *end <= frames.untouched.end)?;
    frames.untouched.start = end;
    Some(direct(start))
}

/// Pages that follow each other, zeroed. They can be given back one by one.
pub fn take_run(count: usize) -> Option<u64> {
    if count == 1 {
        return take();
    }
    let run = FRAMES.with(|frames| take_untouched(frames, count))?;
    // SAFETY: as for one.
    unsafe { run.write_bytes(0, count * PAGE) };
    Some(phys_of(run))
}

/// Gives a page back.
///
/// # Safety
/// It was taken here, and nobody uses it any more.
pub unsafe fn give(phys: u64) {
    let page = direct(phys).cast::<Free>();
    FRAMES.with(|frames| {
        // SAFETY: the caller's.
        unsafe { page.write(Free { next: frames.free }) };
        frames.free = Some(page);
    });
}

/// How many bytes have never been used.
pub fn untouched() -> u64 {
    FRAMES.with(|frames| frames.untouched.end - frames.untouched.start)
}
