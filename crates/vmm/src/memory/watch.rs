//! Tells the CPU of writes that devices and the loader make to guest RAM.
//!
//! vm-memory lets whoever owns a mapping hear of every write through it, meant for
//! tracking dirty pages. Here the listener is the CPU's [`CodeMap`]: a disk that reads a
//! program into memory overwrites code that was decoded there before. Only raw pointers
//! escape it: who hands one to the host must call `mark_dirty` afterwards.

use std::sync::Arc;

use softcpu::addr::{PAGE_SHIFT, PAGE_SIZE};
use softcpu::memory::CodeMap;
use softcpu::memory::ram::RamFrame;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use super::pages::Pages;

/// The watch over one region of RAM.
#[derive(Clone, Debug)]
pub struct CodeWatch {
    code: Arc<CodeMap>,
    first_frame: u64,
    /// What keeps the region mapped, where that is not the region itself.
    _pages: Option<Arc<Pages>>,
}

/// The watch over a part of a region, which begins at `base`.
#[derive(Clone, Debug)]
pub struct CodeWatchSlice<'a> {
    watch: &'a CodeWatch,
    base: usize,
}

impl CodeWatch {
    /// For the region whose first page is that frame, and which `pages` keep mapped if it does
    /// not do so itself.
    pub(super) const fn new(
        code: Arc<CodeMap>,
        first_frame: u64,
        pages: Option<Arc<Pages>>,
    ) -> Self {
        Self { code, first_frame, _pages: pages }
    }

    /// `len` bytes at `offset` of the region have been written.
    fn written(&self, offset: usize, len: usize) {
        let (mut offset, end) = (offset as u64, (offset as u64).saturating_add(len as u64));
        while offset < end {
            let page_end = (offset | (PAGE_SIZE - 1)).saturating_add(1);
            let chunk = page_end.min(end).saturating_sub(offset);
            let frame = self.first_frame.saturating_add(offset >> PAGE_SHIFT);
            // Memory has at most 2^32 frames, and frames beyond it are nobody's code.
            if let Ok(frame) = u32::try_from(frame) {
                self.code.written_from_outside(RamFrame(frame), offset & (PAGE_SIZE - 1), chunk);
            }
            offset = page_end;
        }
    }
}

impl<'a> WithBitmapSlice<'a> for CodeWatch {
    type S = CodeWatchSlice<'a>;
}

impl Bitmap for CodeWatch {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.written(offset, len);
    }

    /// Nobody asks: what has been written is acted on at once, and not remembered.
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> CodeWatchSlice<'_> {
        CodeWatchSlice { watch: self, base: offset }
    }
}

impl<'a> WithBitmapSlice<'a> for CodeWatchSlice<'_> {
    type S = Self;
}

impl BitmapSlice for CodeWatchSlice<'_> {}

impl Bitmap for CodeWatchSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.watch.written(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { watch: self.watch, base: self.base.saturating_add(offset) }
    }
}
