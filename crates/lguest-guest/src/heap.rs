//! The global allocator: a list of free blocks for each power of two up to 4 MiB. Small ones
//! are parts of a page; what was once given to a list stays with it.
//!
//! Use it by `#[global_allocator] static HEAP: lguest_guest::heap::Heap = Heap;`, or bring
//! another: nothing here depends on it but `virtio-drivers`' need of some allocator.

use core::alloc::{GlobalAlloc, Layout};

use crate::boot::{direct, phys_of};
use crate::frames::{self, PAGE};
use crate::irq::Masked;

const SMALLEST: usize = 16;
/// 16, 32, ... 4 MiB.
const CLASSES: usize = 19;

struct Lists([Option<*mut Block>; CLASSES]);

struct Block {
    next: Option<*mut Block>,
}

// SAFETY: the blocks are nobody else's.
unsafe impl Send for Lists {}

static LISTS: Masked<Lists> = Masked::new(Lists([None; CLASSES]));

/// The allocator.
#[derive(Debug)]
pub struct Heap;

/// The list for that many bytes, and what its blocks have.
fn class(layout: Layout) -> Option<(usize, usize)> {
    let size = layout.size().max(layout.align()).max(SMALLEST).next_power_of_two();
    let class = (size / SMALLEST).trailing_zeros() as usize;
    (class < CLASSES).then_some((class, size))
}

const fn pages(layout: Layout) -> usize {
    layout.size().div_ceil(PAGE)
}

// SAFETY: blocks are of a page's own halves, quarters and so on, so aligned to their size, and
// belong to one owner at a time.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some((class, size)) = class(layout) else {
            if layout.align() > PAGE {
                return core::ptr::null_mut();
            }
            return frames::take_run(pages(layout)).map_or(core::ptr::null_mut(), direct);
        };
        LISTS.with(|lists| {
            let Some(list) = lists.0.get_mut(class) else { return core::ptr::null_mut() };
            if list.is_none() {
                let pages = size.div_ceil(PAGE);
                let Some(page) = frames::take_run(pages) else { return core::ptr::null_mut() };
                for at in (0..pages * PAGE).step_by(size) {
                    let block = direct(page + at as u64).cast::<Block>();
                    // SAFETY: within a page of our own.
                    unsafe { block.write(Block { next: *list }) };
                    *list = Some(block);
                }
            }
            let Some(block) = *list else { return core::ptr::null_mut() };
            // SAFETY: a block of the list.
            *list = unsafe { (*block).next };
            block.cast()
        })
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let Some((class, _)) = class(layout) else {
            for n in 0..pages(layout) {
                // SAFETY: the caller's: taken above, page by page.
                unsafe { frames::give(phys_of(pointer) + (n * PAGE) as u64) };
            }
            return;
        };
        LISTS.with(|lists| {
            if let Some(list) = lists.0.get_mut(class) {
                let block = pointer.cast::<Block>();
                // SAFETY: the caller gives it back, and it has room for this.
                unsafe { block.write(Block { next: *list }) };
                *list = Some(block);
            }
        });
    }
}
