//! Copies of whole pages of guest RAM, by frame.
//!
//! What a page held before it was stored to, or what one who may not store to it has of it
//! instead. [`super::overlay`] and [`crate::lockstep`] use it.

use std::alloc::{Layout, handle_alloc_error};
use std::collections::HashMap;
use std::ptr::NonNull;

use super::access;
use super::ram::RamFrame;
use crate::addr::PAGE_SIZE;

/// A page's worth of bytes, as a `usize` for those who count in it.
pub(crate) const PAGE: usize = PAGE_SIZE as usize;
/// Pages kept for the next copies.
const SPARE: usize = 1024;

/// A page's size and alignment.
#[repr(C, align(4096))]
struct Aligned([u8; PAGE]);

const LAYOUT: Layout = Layout::new::<Aligned>();

/// A page of host memory, aligned as one. Guest code may be let loose on it, so it is
/// reached through raw pointers only.
#[derive(Debug)]
struct Page(NonNull<u8>);

// SAFETY: just memory, owned by this value.
unsafe impl Send for Page {}

impl Page {
    fn new() -> Self {
        // SAFETY: the layout is not empty.
        let page = unsafe { std::alloc::alloc_zeroed(LAYOUT) };
        NonNull::new(page).map_or_else(|| handle_alloc_error(LAYOUT), Self)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout, and freed once.
        unsafe { std::alloc::dealloc(self.0.as_ptr(), LAYOUT) };
    }
}

/// Copies of pages.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    pages: HashMap<RamFrame, Page>,
    spare: Vec<Page>,
}

impl Copies {
    /// The copy of `frame`.
    pub(crate) fn get(&self, frame: RamFrame) -> Option<*mut u8> {
        self.pages.get(&frame).map(|page| page.0.as_ptr())
    }

    /// The copy of `frame`, made now from the page at `host` if there is none.
    ///
    /// # Safety
    /// `host` is a mapped page, and no Rust reference covers it.
    pub(crate) unsafe fn keep(&mut self, frame: RamFrame, host: *const u8) -> *mut u8 {
        if let Some(known) = self.get(frame) {
            return known;
        }
        let page = self.spare.pop().unwrap_or_else(Page::new);
        let to = page.0.as_ptr();
        // SAFETY: a whole page each, says the caller and says the type.
        unsafe { access::copy(host, to, PAGE) };
        self.pages.insert(frame, page);
        to
    }

    /// Which frames have copies.
    pub(crate) fn frames(&self) -> impl Iterator<Item = RamFrame> {
        self.pages.keys().copied()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Forgets all. Pointers to them must not be used any more.
    pub(crate) fn clear(&mut self) {
        for (_, page) in self.pages.drain() {
            if self.spare.len() < SPARE {
                self.spare.push(page);
            }
        }
    }
}
