//! The software TLB for instruction fetches: smaller than that for data, because a page's code is
//! looked up once for all of a block.

use super::tlb::{Fill, INVALID};
use crate::addr::{PAGE_OFFSET, PAGE_SHIFT};
use crate::memory::ram::RamFrame;

/// Entries of the code TLB, per privilege.
const CODE_ENTRIES: usize = 512;

/// One cached translation for instruction fetches.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodeEntry {
    tag: u64,
    /// The host address of the page.
    pub(crate) host: u64,
    pub(crate) frame: RamFrame,
    global: bool,
}

const EMPTY_CODE: CodeEntry =
    CodeEntry { tag: INVALID, host: 0, frame: RamFrame(0), global: false };

/// Translations for fetches.
#[derive(Debug)]
pub(crate) struct CodeTlb {
    entries: Box<[[CodeEntry; CODE_ENTRIES]; 2]>,
    pub(super) space: u64,
}

#[inline(always)]
fn code_slot(addr: u64) -> usize {
    (addr >> PAGE_SHIFT) as usize & (CODE_ENTRIES - 1)
}

impl CodeTlb {
    pub(crate) fn new() -> Self {
        Self { entries: Box::new([[EMPTY_CODE; CODE_ENTRIES]; 2]), space: 1 }
    }

    pub(super) fn clear(&mut self) {
        self.entries.as_flattened_mut().fill(EMPTY_CODE);
    }

    #[inline(always)]
    #[expect(
        clippy::indexing_slicing,
        reason = "a bool is below 2 and a slot is masked to the table"
    )]
    fn entry(&self, user: bool, addr: u64) -> &CodeEntry {
        &self.entries[usize::from(user)][code_slot(addr)]
    }

    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "as above")]
    fn entry_mut(&mut self, user: bool, addr: u64) -> &mut CodeEntry {
        &mut self.entries[usize::from(user)][code_slot(addr)]
    }

    /// The page that `addr` is fetched from, if it is cached.
    #[inline(always)]
    pub(crate) fn lookup(&self, user: bool, addr: u64) -> Option<&CodeEntry> {
        let entry = self.entry(user, addr);
        (entry.tag == (addr & !PAGE_OFFSET) | self.space).then_some(entry)
    }

    /// Whether the page at `addr`, if it is cached, is global.
    pub(crate) fn is_global(&self, user: bool, addr: u64) -> bool {
        self.lookup(user, addr).is_some_and(|entry| entry.global)
    }

    /// As [`super::tlb::DataTlb::lookup_slow`].
    pub(crate) fn lookup_slow(&mut self, user: bool, addr: u64) -> bool {
        let space = self.space;
        let entry = self.entry_mut(user, addr);
        let page = addr & !PAGE_OFFSET;
        if !entry.global || entry.tag & !PAGE_OFFSET != page || entry.tag == page | space {
            return false;
        }
        entry.tag = page | space;
        true
    }

    pub(super) fn fill(&mut self, user: bool, addr: u64, fill: &Fill) {
        let tag = (addr & !PAGE_OFFSET) | self.space;
        *self.entry_mut(user, addr) =
            CodeEntry { tag, host: fill.host, frame: fill.frame, global: fill.global };
    }

    pub(super) fn invalidate(&mut self, addr: u64, span: u32) {
        if span > PAGE_SHIFT {
            for entry in self.entries.as_flattened_mut() {
                if (entry.tag ^ addr) >> span == 0 {
                    *entry = EMPTY_CODE;
                }
            }
            return;
        }
        for entry in self.entries.iter_mut().filter_map(|half| half.get_mut(code_slot(addr))) {
            if (entry.tag ^ addr) >> PAGE_SHIFT == 0 {
                *entry = EMPTY_CODE;
            }
        }
    }
}
