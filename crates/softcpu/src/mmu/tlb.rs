//! The software TLB: direct-mapped caches of finished translations.
//!
//! A hit must cost a few instructions, because every load and store pays it. So a
//! tag holds everything a hit depends on: the page's address and, in the twelve
//! bits below it, the *address-space number* that was current when it was filled.
//! Changing the address space (a CR3 write) only changes the number; nothing is
//! walked or cleared. There is one table per [`View`], so permissions need no check.
//!
//! Translations of global pages are re-tagged when an access in another address
//! space finds them ([`DataTlb::lookup_slow`]).

use crate::addr::{PAGE_OFFSET, PAGE_SHIFT, room_in_page};
use crate::memory::ram::RamFrame;
use crate::mmu::{Access, Mmu, View};

/// Entries per view of the data TLB.
const DATA_ENTRIES: usize = 1024;
/// Entries of the code TLB, per privilege.
const CODE_ENTRIES: usize = 512;
/// A tag that no canonical address has.
const INVALID: u64 = 1 << 62;
/// The address-space numbers in use: 1 to 4094.
const LAST_SPACE: u64 = 4094;
/// Guest address-space tags (PCIDs) remembered at once.
const REMEMBERED: usize = 16;

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

/// Which numbers stand for the guest's address spaces (PCIDs; one, tagged 0, without them).
#[derive(Debug)]
pub(crate) struct Spaces {
    current: u64,
    next: u64,
    /// PCID and number of the address spaces that may have translations to go back to.
    known: [Option<(u16, u64)>; REMEMBERED],
    oldest: usize,
}

/// Translations for loads and stores.
#[derive(Debug)]
pub(crate) struct DataTlb {
    entries: Box<[[DataEntry; DATA_ENTRIES]; 4]>,
    space: u64,
}

/// Translations for fetches.
#[derive(Debug)]
pub(crate) struct CodeTlb {
    entries: Box<[[CodeEntry; CODE_ENTRIES]; 2]>,
    space: u64,
}

/// Which linear addresses had large pages cut into small entries, so that one INVLPG
/// finds all of them. A filter: false hits only cost time.
#[derive(Debug)]
pub(crate) struct LargePages {
    bits: Box<[u64; 64]>,
    giant: bool,
}

impl LargePages {
    pub(crate) fn new() -> Self {
        Self { bits: Box::new([0; 64]), giant: false }
    }

    /// Large pages are looked for in units of 4 MiB, the largest size but one.
    fn position(addr: u64) -> (usize, u64) {
        let hash = (addr >> 22) ^ (addr >> 34);
        ((hash >> 6) as usize & 63, 1 << (hash & 63))
    }

    fn note(&mut self, addr: u64, size: PageSize) {
        match size {
            PageSize::Small => {}
            PageSize::Large => {
                let (word, bit) = Self::position(addr);
                if let Some(word) = self.bits.get_mut(word) {
                    *word |= bit;
                }
            }
            PageSize::Giant => self.giant = true,
        }
    }

    /// log2 of the span around `addr` that one page may cover.
    fn span(&self, addr: u64) -> u32 {
        let (word, bit) = Self::position(addr);
        if self.giant {
            30
        } else if self.bits.get(word).is_some_and(|word| word & bit != 0) {
            22
        } else {
            PAGE_SHIFT
        }
    }

    fn clear(&mut self) {
        self.bits.fill(0);
        self.giant = false;
    }
}

impl Spaces {
    pub(crate) fn new() -> Self {
        Self { current: 1, next: 2, known: [None; REMEMBERED], oldest: 0 }
    }

    fn forget(&mut self, pcid: u16) {
        for slot in &mut self.known {
            if slot.is_some_and(|(known, _)| known == pcid) {
                *slot = None;
            }
        }
    }

    /// A number without translations for `pcid`, or `None` when they have run out.
    fn fresh(&mut self, pcid: u16) -> Option<u64> {
        self.forget(pcid);
        if self.next > LAST_SPACE {
            return None;
        }
        let number = self.next;
        self.next = number.wrapping_add(1);
        if let Some(place) = self.known.get_mut(self.oldest % REMEMBERED) {
            *place = Some((pcid, number));
        }
        self.oldest = self.oldest.wrapping_add(1) % REMEMBERED;
        Some(number)
    }

    fn find(&self, pcid: u16) -> Option<u64> {
        self.known.iter().flatten().find(|(known, _)| *known == pcid).map(|(_, number)| *number)
    }
}

impl Mmu {
    /// The address space becomes `pcid`'s. With `keep`, translations it left behind
    /// hold again; without, only global ones do (SDM vol. 3, 4.10.4.1).
    pub(crate) fn switch_space(&mut self, pcid: u16, keep: bool) {
        let kept = if keep { self.spaces.find(pcid) } else { None };
        match kept.or_else(|| self.spaces.fresh(pcid)) {
            Some(number) => self.set_space(number),
            None => self.renumber(pcid),
        }
    }

    /// Forgets the non-global translations of `pcid`, which may be the current one.
    pub(crate) fn flush_space(&mut self, pcid: u16) {
        if self.spaces.find(pcid) == Some(self.spaces.current) {
            self.switch_space(pcid, false);
        } else {
            self.spaces.forget(pcid);
        }
    }

    /// Forgets the non-global translations of every address space; `pcid` is the current one.
    pub(crate) fn flush_non_global(&mut self, pcid: u16) {
        self.spaces.known = [None; REMEMBERED];
        self.switch_space(pcid, false);
    }

    /// Forgets every translation, global ones too.
    pub(crate) fn flush_all(&mut self) {
        self.data.entries.as_flattened_mut().fill(EMPTY_DATA);
        self.code.entries.as_flattened_mut().fill(EMPTY_CODE);
        self.large.clear();
    }

    /// INVLPG: forgets whatever page maps `addr`, global or not, in every address space.
    pub(crate) fn invalidate(&mut self, addr: u64) {
        let span = self.large.span(addr);
        self.data.invalidate(addr, span);
        self.code.invalidate(addr, span);
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

    fn set_space(&mut self, number: u64) {
        self.spaces.current = number;
        self.data.space = number;
        self.code.space = number;
    }

    /// The numbers have run out: start over with empty tables.
    fn renumber(&mut self, pcid: u16) {
        self.flush_all();
        self.spaces = Spaces::new();
        self.spaces.known[0] = Some((pcid, self.spaces.current));
        self.spaces.oldest = 1;
        self.set_space(self.spaces.current);
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

/// The size of the guest page a translation came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB or 4 MiB.
    Large,
    /// 1 GiB.
    Giant,
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
