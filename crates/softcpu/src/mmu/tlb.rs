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
//! space finds them (`DataTlb::lookup_slow`). Where the kernel's own pages are all global its
//! view has one number for all address spaces, and not even that is done.

use super::large_pages::PageSize;
use crate::addr::{PAGE_OFFSET, PAGE_SHIFT, room_in_page};
use crate::memory::ram::RamFrame;
use crate::mmu::{Access, Mmu, View};

/// Entries per view and kind of access of the data TLB: what reaches further than the host's
/// own second-level TLB does, because a miss here costs so much more than one there.
const DATA_ENTRIES: usize = 8192;
/// Entries of the code TLB, per privilege.
const CODE_ENTRIES: usize = 512;
/// A tag that nothing has: address spaces are numbered from one. Being zero, it makes tables
/// that were never used cost no memory.
const INVALID: u64 = 0;
/// One cached translation for loads, or for stores: what a hit needs, and nothing else, so
/// that four of them share a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(crate) struct DataEntry {
    /// Page and address space for which the access is allowed.
    pub(crate) tag: u64,
    /// Host address minus guest address.
    pub(crate) addend: u64,
}

const EMPTY_DATA: DataEntry = DataEntry { tag: INVALID, addend: 0 };

/// What else is known of an entry's page.
#[derive(Clone, Copy, Debug)]
struct Backing {
    frame: RamFrame,
    global: bool,
}

/// The entries of one view: loads, and stores that need not be looked at one by one. Two
/// tables, because what is copied is often a multiple of their reach away from its copy.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct DataTables {
    pub(crate) read: [DataEntry; DATA_ENTRIES],
    pub(crate) write: [DataEntry; DATA_ENTRIES],
    /// Of the entries for loads, and of those for stores.
    backing: [[Backing; DATA_ENTRIES]; 2],
}

impl DataTables {
    #[inline(always)]
    fn of(&self, access: Access) -> &[DataEntry; DATA_ENTRIES] {
        if matches!(access, Access::Write) { &self.write } else { &self.read }
    }

    fn both(&mut self) -> [&mut [DataEntry; DATA_ENTRIES]; 2] {
        [&mut self.read, &mut self.write]
    }
}

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
    views: Box<[DataTables; 4]>,
    /// Views that have had entries since they were emptied, a bit each.
    used: u8,
    /// Frames that may have entries for stores.
    stored: FrameFilter,
    /// What was filled last: its tag.
    last: u64,
    /// The address space of each view, as tags have it.
    spaces: [u64; 4],
    /// The kernel's view has got a page that is not global since this was last looked at.
    pub(super) kernel_of_one_space: bool,
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
        self.data.clear();
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
    pub(crate) fn fill_data(&mut self, view: View, addr: u64, access: Access, fill: &Fill) {
        self.large.note(addr, fill.size);
        self.data.fill(view, addr, access, fill);
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
    pub(crate) fn tables(&mut self, view: View) -> *mut DataTables {
        &raw mut self.views[view as usize]
    }

    /// The address space of `view`, as tags have it.
    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "a view is below 4")]
    pub(crate) fn space(&self, view: View) -> u64 {
        self.spaces[view as usize]
    }

    /// The views are of address space `number` from now on, the kernel's of `kernel`.
    pub(super) fn set_space(&mut self, number: u64, kernel: u64) {
        const _: () = assert!(View::Kernel as usize == 0);
        self.spaces = [kernel, number, number, number];
    }

    pub(crate) fn new() -> Self {
        // SAFETY: numbers and a bool, for all of which zero is a value; together they make
        // entries whose tag is `INVALID`.
        let views = unsafe { Box::<[DataTables; 4]>::new_zeroed().assume_init() };
        Self {
            views,
            used: 0,
            stored: FrameFilter::new(),
            last: u64::MAX,
            spaces: [1; 4],
            kernel_of_one_space: false,
        }
    }

    fn clear(&mut self) {
        self.kernel_of_one_space = false;
        for (number, tables) in self.views.iter_mut().enumerate() {
            if self.used & 1 << number != 0 {
                for table in tables.both() {
                    table.fill(EMPTY_DATA);
                }
            }
        }
        self.used = 0;
        self.stored.clear();
    }

    /// The entry that `addr` has to itself and its aliases.
    #[inline(always)]
    #[expect(
        clippy::indexing_slicing,
        reason = "a view is below 4 and a slot is masked to the table"
    )]
    fn entry(&self, view: View, addr: u64, access: Access) -> &DataEntry {
        &self.views[view as usize].of(access)[data_slot(addr)]
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
        let entry = self.entry(view, addr, access);
        let tag = (addr & !PAGE_OFFSET) | self.space(view);
        let hit = entry.tag == tag && len <= room_in_page(addr);
        hit.then(|| addr.wrapping_add(entry.addend) as *mut u8)
    }

    /// Looks again after a miss: a global page's entry from another address space is
    /// taken over.
    pub(crate) fn lookup_slow(&mut self, view: View, addr: u64) -> bool {
        let tag = addr & !PAGE_OFFSET | self.space(view);
        let mut taken = false;
        for (entry, backing) in self.entries_of(view, addr) {
            // An empty entry looks like page zero's, and may follow a global page's.
            let same = entry.tag != INVALID && (entry.tag ^ addr) >> PAGE_SHIFT == 0;
            if backing.global && entry.tag != tag && same {
                entry.tag = tag;
                taken = true;
            }
        }
        taken
    }

    /// The entries for loads and for stores.
    fn entries_of(
        &mut self,
        view: View,
        addr: u64,
    ) -> impl Iterator<Item = (&mut DataEntry, &mut Backing)> {
        let slot = data_slot(addr);
        let tables = self.views.get_mut(view as usize).into_iter();
        tables.flat_map(move |tables| {
            let entries = [tables.read.get_mut(slot), tables.write.get_mut(slot)];
            let backing = tables.backing.iter_mut().map(move |table| table.get_mut(slot));
            entries.into_iter().flatten().zip(backing.flatten())
        })
    }

    /// The frame of the entry that [`DataTlb::lookup`] would hit.
    pub(crate) fn frame(&self, view: View, addr: u64, access: Access) -> RamFrame {
        let stores = usize::from(matches!(access, Access::Write));
        let tables = self.views.get(view as usize);
        let table = tables.and_then(|tables| tables.backing.get(stores));
        table.and_then(|table| table.get(data_slot(addr))).map_or(RamFrame(0), |it| it.frame)
    }

    /// Keeps a translation that `access` wanted. The other kind of access gets it too, unless
    /// that would take the place of the page that was filled just before: one is copied to
    /// the other.
    fn fill(&mut self, view: View, addr: u64, access: Access, fill: &Fill) {
        let page = addr & !PAGE_OFFSET;
        let tag = page | self.space(view);
        self.kernel_of_one_space |= view == View::Kernel && !fill.global;
        let last = std::mem::replace(&mut self.last, tag);
        let new = DataEntry { tag, addend: fill.host.wrapping_sub(page) };
        let behind = Backing { frame: fill.frame, global: fill.global };
        let stores = matches!(access, Access::Write);
        self.used |= 1 << view as u8;
        if fill.writable {
            self.stored.add(fill.frame);
        }
        let [Some(read), Some(write)] = ({
            let mut entries = self.entries_of(view, addr);
            [entries.next(), entries.next()]
        }) else {
            return;
        };
        let free = |entry: &DataEntry| entry.tag != last;
        if !(stores && fill.writable) || free(read.0) {
            (*read.0, *read.1) = (new, behind);
        }
        if fill.writable && (stores || free(write.0)) {
            (*write.0, *write.1) = (new, behind);
        } else if !fill.writable && (write.0.tag ^ addr) >> PAGE_SHIFT == 0 {
            *write.0 = EMPTY_DATA;
        }
    }

    /// Takes away every permission to store unseen.
    pub(crate) fn drop_writes(&mut self) {
        for (number, tables) in self.views.iter_mut().enumerate() {
            if self.used & 1 << number != 0 {
                tables.write.fill(EMPTY_DATA);
            }
        }
        self.stored.clear();
    }

    /// Takes away the permission to store unseen to the page at `addr`.
    pub(crate) fn drop_write(&mut self, view: View, addr: u64) {
        let tables = self.views.get_mut(view as usize);
        if let Some(entry) = tables.and_then(|tables| tables.write.get_mut(data_slot(addr))) {
            *entry = EMPTY_DATA;
        }
    }

    /// Takes away the permission to store unseen to `frame`.
    pub(crate) fn drop_writes_to(&mut self, frame: RamFrame) {
        // Most code was never written to by whoever runs it.
        if !self.stored.may_have(frame) {
            return;
        }
        // All entries are looked at, so the filter can be made anew of those that stay.
        self.stored.clear();
        for (number, tables) in self.views.iter_mut().enumerate() {
            if self.used & 1 << number == 0 {
                continue;
            }
            let [_, behind] = &tables.backing;
            for (entry, backing) in tables.write.iter_mut().zip(behind) {
                if entry.tag == INVALID {
                    continue;
                }
                if backing.frame == frame {
                    *entry = EMPTY_DATA;
                } else {
                    self.stored.add(backing.frame);
                }
            }
        }
    }

    fn invalidate(&mut self, addr: u64, span: u32) {
        let matches = |entry: &DataEntry| (entry.tag ^ addr) >> span == 0;
        for table in self.views.iter_mut().flat_map(DataTables::both) {
            if span > PAGE_SHIFT {
                table.iter_mut().filter(|entry| matches(entry)).for_each(|it| *it = EMPTY_DATA);
            } else if let Some(entry) = table.get_mut(data_slot(addr)).filter(|it| matches(it)) {
                *entry = EMPTY_DATA;
            }
        }
    }
}

/// A set of frames that may claim too many, never too few: a bit each, by the frame's number.
#[derive(Debug)]
struct FrameFilter {
    words: Box<[u64; Self::WORDS]>,
}

impl FrameFilter {
    const WORDS: usize = 1024;

    fn new() -> Self {
        Self { words: Box::new([0; Self::WORDS]) }
    }

    fn place(frame: RamFrame) -> (usize, u64) {
        ((frame.0 / 64) as usize & (Self::WORDS - 1), 1 << (frame.0 % 64))
    }

    fn add(&mut self, frame: RamFrame) {
        let (word, bit) = Self::place(frame);
        if let Some(word) = self.words.get_mut(word) {
            *word |= bit;
        }
    }

    fn may_have(&self, frame: RamFrame) -> bool {
        let (word, bit) = Self::place(frame);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    fn clear(&mut self) {
        self.words.fill(0);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_entry_is_no_global_page_at_zero() {
        let mut tlb = DataTlb::new();
        let (host, frame, size) = (0x7000_0000, RamFrame(7), PageSize::Small);
        let fill = Fill { host, frame, writable: true, global: true, size };
        tlb.fill(View::User, 0x10, Access::Write, &fill);
        tlb.set_space(2, 2);
        assert!(tlb.lookup_slow(View::User, 0x10), "global");
        tlb.drop_writes();
        tlb.set_space(3, 3);
        tlb.lookup_slow(View::User, 0x10);
        assert!(tlb.lookup(View::User, 0x10, 1, Access::Write).is_none());
        assert!(tlb.lookup(View::User, 0x10, 1, Access::Read).is_some());
        tlb.clear();
        assert!(!tlb.lookup_slow(View::User, 0x10));
    }

    #[test]
    fn a_frame_loses_its_entries_for_stores_and_no_others() {
        let mut tlb = DataTlb::new();
        let fill = |frame: u32, writable| Fill {
            host: 0x7000_0000 + (u64::from(frame) << PAGE_SHIFT),
            frame: RamFrame(frame),
            writable,
            global: false,
            size: PageSize::Small,
        };
        // Two frames that the filter cannot tell apart, and one that it can.
        let same = 7 + 64 * FrameFilter::WORDS as u32;
        for (view, page, frame) in
            [(View::User, 1, 7), (View::Kernel, 2, 7), (View::User, 3, same), (View::User, 4, 9)]
        {
            tlb.fill(view, page << PAGE_SHIFT, Access::Write, &fill(frame, true));
        }
        let stores = |tlb: &DataTlb, view, page: u64| {
            tlb.lookup(view, page << PAGE_SHIFT, 8, Access::Write).is_some()
        };
        tlb.drop_writes_to(RamFrame(8));
        assert!(stores(&tlb, View::User, 1));
        tlb.drop_writes_to(RamFrame(7));
        assert!(!stores(&tlb, View::User, 1) && !stores(&tlb, View::Kernel, 2));
        assert!(stores(&tlb, View::User, 3) && stores(&tlb, View::User, 4));
        assert!(tlb.lookup(View::User, 1 << PAGE_SHIFT, 8, Access::Read).is_some());
        tlb.drop_writes_to(RamFrame(same));
        assert!(!stores(&tlb, View::User, 3), "the filter was made anew of what was left");
        tlb.clear();
        assert!(!stores(&tlb, View::User, 4));
    }
}
