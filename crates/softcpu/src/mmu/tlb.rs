//! The software TLB: direct-mapped caches of finished translations.
//!
//! A hit must cost a few instructions, because every load and store pays it. So a
//! tag holds everything a hit depends on: the page's address and, in the twelve
//! bits below it, the *address-space number* ([`super::space`]) that was current when
//! it was filled.
//! Changing the address space (a CR3 write) only changes the number; nothing is
//! walked or cleared. There is one table per [`View`], so permissions need no check.
//!
//! Translations of global pages are re-tagged when an access in another address
//! space finds them (`DataTlb::lookup_slow`).

use super::large_pages::PageSize;
use crate::addr::{PAGE_OFFSET, PAGE_SHIFT, room_in_page};
use crate::memory::ram::RamFrame;
use crate::mmu::{Access, Mmu, View};

/// Entries per view of the data TLB.
const DATA_ENTRIES: usize = 1024;
/// Entries of the code TLB, per privilege.
const CODE_ENTRIES: usize = 512;
/// A tag that no canonical address has.
const INVALID: u64 = 1 << 62;
/// One cached translation for loads and stores.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub(crate) struct DataEntry {
    /// Page and address space for which loads are allowed.
    pub(crate) read: u64,
    /// The same for stores; invalid where stores must be looked at one by one.
    pub(crate) write: u64,
    /// Host address minus guest address.
    pub(crate) addend: u64,
    pub(crate) frame: RamFrame,
    global: bool,
}

const EMPTY_DATA: DataEntry =
    DataEntry { read: INVALID, write: INVALID, addend: 0, frame: RamFrame(0), global: false };

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

/// Translations for loads and stores.
#[derive(Debug)]
pub(crate) struct DataTlb {
    entries: Box<[[DataEntry; DATA_ENTRIES]; 4]>,
    pub(super) space: u64,
}

/// Translations for fetches.
#[derive(Debug)]
pub(crate) struct CodeTlb {
    entries: Box<[[CodeEntry; CODE_ENTRIES]; 2]>,
    pub(super) space: u64,
}

impl Mmu {
    /// Forgets every translation, global ones too.
    pub(crate) fn flush_all(&mut self) {
        self.data.entries.as_flattened_mut().fill(EMPTY_DATA);
        self.code.entries.as_flattened_mut().fill(EMPTY_CODE);
        self.large.clear();
        self.jumps.clear();
        self.version = self.version.wrapping_add(1);
    }

    /// INVLPG: forgets whatever page maps `addr`, global or not, in every address space.
    pub(crate) fn invalidate(&mut self, addr: u64) {
        let span = self.large.span(addr);
        self.data.invalidate(addr, span);
        self.code.invalidate(addr, span);
        if span > PAGE_SHIFT {
            self.jumps.clear();
        } else {
            self.jumps.page_changed(addr);
        }
        self.version = self.version.wrapping_add(1);
    }

    /// Keeps a translation for loads and stores.
    pub(crate) fn fill_data(&mut self, view: View, addr: u64, fill: &Fill) {
        self.large.note(addr, fill.size);
        self.data.fill(view, addr, fill);
    }

    /// Keeps a translation for fetches.
    pub(crate) fn fill_code(&mut self, user: bool, addr: u64, fill: &Fill) {
        self.large.note(addr, fill.size);
        self.code.fill(user, addr, fill);
    }
}

#[inline(always)]
fn data_slot(addr: u64) -> usize {
    (addr >> PAGE_SHIFT) as usize & (DATA_ENTRIES - 1)
}

#[inline(always)]
fn code_slot(addr: u64) -> usize {
    (addr >> PAGE_SHIFT) as usize & (CODE_ENTRIES - 1)
}

/// What the walker found, for the TLB to keep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fill {
    pub(crate) host: u64,
    pub(crate) frame: RamFrame,
    /// Stores may go straight to memory.
    pub(crate) writable: bool,
    pub(crate) global: bool,
    pub(crate) size: PageSize,
}

impl DataTlb {
    /// Entries per view.
    pub(crate) const ENTRIES: usize = DATA_ENTRIES;

    /// The entries of `view`.
    #[expect(clippy::indexing_slicing, reason = "a view is below 4")]
    pub(crate) fn table(&mut self, view: View) -> *mut DataEntry {
        self.entries[view as usize].as_mut_ptr()
    }

    /// The current address space, as tags have it.
    pub(crate) fn space(&self) -> u64 {
        self.space
    }

    pub(crate) fn new() -> Self {
        Self { entries: Box::new([[EMPTY_DATA; DATA_ENTRIES]; 4]), space: 1 }
    }

    /// The entry that `addr` has to itself and its aliases.
    #[inline(always)]
    #[expect(
        clippy::indexing_slicing,
        reason = "a view is below 3 and a slot is masked to the table"
    )]
    fn entry(&self, view: View, addr: u64) -> &DataEntry {
        &self.entries[view as usize][data_slot(addr)]
    }

    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "as above")]
    fn entry_mut(&mut self, view: View, addr: u64) -> &mut DataEntry {
        &mut self.entries[view as usize][data_slot(addr)]
    }

    /// The host address of `len` bytes at `addr`, if they lie in one page that is
    /// cached for `access` (a load or a store).
    #[inline(always)]
    pub(crate) fn lookup(
        &self,
        view: View,
        addr: u64,
        len: u64,
        access: Access,
    ) -> Option<*mut u8> {
        let entry = self.entry(view, addr);
        let tag = if matches!(access, Access::Write) { entry.write } else { entry.read };
        let hit = tag == (addr & !PAGE_OFFSET) | self.space && len <= room_in_page(addr);
        hit.then(|| addr.wrapping_add(entry.addend) as *mut u8)
    }

    /// Looks again after a miss: a global page's entry from another address space is
    /// taken over.
    pub(crate) fn lookup_slow(&mut self, view: View, addr: u64) -> bool {
        let space = self.space;
        let entry = self.entry_mut(view, addr);
        let page = addr & !PAGE_OFFSET;
        if !entry.global || entry.read & !PAGE_OFFSET != page || entry.read == page | space {
            return false;
        }
        entry.read = page | space;
        if entry.write != INVALID {
            entry.write = page | space;
        }
        true
    }

    /// The frame of the entry that [`DataTlb::lookup`] would hit.
    pub(crate) fn frame(&self, view: View, addr: u64) -> RamFrame {
        self.entry(view, addr).frame
    }

    /// Keeps a translation.
    fn fill(&mut self, view: View, addr: u64, fill: &Fill) {
        let page = addr & !PAGE_OFFSET;
        let tag = page | self.space;
        *self.entry_mut(view, addr) = DataEntry {
            read: tag,
            write: if fill.writable { tag } else { INVALID },
            addend: fill.host.wrapping_sub(page),
            frame: fill.frame,
            global: fill.global,
        };
    }

    /// Takes away every permission to store unseen.
    pub(crate) fn drop_writes(&mut self) {
        for entry in self.entries.as_flattened_mut() {
            entry.write = INVALID;
        }
    }

    /// Takes away the permission to store unseen to the page at `addr`.
    pub(crate) fn drop_write(&mut self, view: View, addr: u64) {
        self.entry_mut(view, addr).write = INVALID;
    }

    /// Takes away the permission to store unseen to `frame`.
    pub(crate) fn drop_writes_to(&mut self, frame: RamFrame) {
        for entry in self.entries.as_flattened_mut() {
            if entry.frame == frame {
                entry.write = INVALID;
            }
        }
    }

    fn invalidate(&mut self, addr: u64, span: u32) {
        if span > PAGE_SHIFT {
            for entry in self.entries.as_flattened_mut() {
                if (entry.read ^ addr) >> span == 0 {
                    *entry = EMPTY_DATA;
                }
            }
            return;
        }
        for entry in self.entries.iter_mut().filter_map(|view| view.get_mut(data_slot(addr))) {
            if (entry.read ^ addr) >> PAGE_SHIFT == 0 {
                *entry = EMPTY_DATA;
            }
        }
    }
}

impl CodeTlb {
    pub(crate) fn new() -> Self {
        Self { entries: Box::new([[EMPTY_CODE; CODE_ENTRIES]; 2]), space: 1 }
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

    /// As [`DataTlb::lookup_slow`].
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

    fn fill(&mut self, user: bool, addr: u64, fill: &Fill) {
        let tag = (addr & !PAGE_OFFSET) | self.space;
        *self.entry_mut(user, addr) =
            CodeEntry { tag, host: fill.host, frame: fill.frame, global: fill.global };
    }

    fn invalidate(&mut self, addr: u64, span: u32) {
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
