//! The software TLB: direct-mapped caches of finished translations, here those for loads and
//! stores.
//!
//! A hit must cost a few instructions, because every load and store pays it. So a
//! tag holds everything a hit depends on: the page's address and, in the twelve
//! bits below it, the *address-space number* ([`super::space`]) that was current when
//! it was filled.
//! Changing the address space (a CR3 write) only changes the number; nothing is
//! walked or cleared. Each [`View`] has tables of its own, so permissions need no check.
//!
//! Two processes that take turns often use the same addresses: one may be the other's child. So
//! that neither takes the other's entries away, the views that reach users' pages have several
//! *sets* of tables, and an address space has the one that the lowest bits of its PCID choose.
//!
//! Translations of global pages are re-tagged when an access in another address
//! space finds them (`DataTlb::lookup_slow`). Where the kernel's own pages are all global its
//! view has one number for all address spaces, and not even that is done.

use super::frame_filter::FrameFilter;
use super::large_pages::PageSize;
use crate::addr::{PAGE_OFFSET, PAGE_SHIFT, room_in_page};
use crate::memory::ram::RamFrame;
use crate::mmu::{Access, Mmu, View};

/// Entries per view and kind of access of the data TLB: what reaches further than the host's
/// own second-level TLB does, because a miss here costs so much more than one there.
const DATA_ENTRIES: usize = 8192;
/// Sets of tables, a power of two: Linux has PCIDs 1 to 6 in use.
const SETS: usize = 8;
/// Views that have tables in each set: [`View::User`] and [`View::KernelOverUser`].
const IN_SETS: usize = 2;
/// Tables there are: those of the sets behind those of the other two views.
const TABLES: usize = 2 + IN_SETS * SETS;
/// A tag that nothing has: address spaces are numbered from one. Being zero, it makes tables
/// that were never used cost no memory.
pub(super) const INVALID: u64 = 0;
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
pub(super) struct Backing {
    pub(super) frame: RamFrame,
    pub(super) global: bool,
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

/// Translations for loads and stores.
#[derive(Debug)]
pub(crate) struct DataTlb {
    tables: Box<[DataTables; TABLES]>,
    /// Tables that have had entries since they were emptied, a bit each.
    used: u32,
    /// Frames that may have entries for stores, for each of the tables.
    stored: Box<[FrameFilter; TABLES]>,
    /// Which tables are each view's at present.
    present: [u8; 4],
    /// A page in the lower half is global, which none is as a rule.
    low_is_global: bool,
    /// What was filled last: its tag.
    last: u64,
    /// The address space of each view, as tags have it.
    spaces: [u64; 4],
    /// The kernel's view has got a page that is not global since this was last looked at.
    pub(super) kernel_of_one_space: bool,
}

/// The tables of each view in the set of `pcid`.
fn tables_in_set(pcid: u16) -> [u8; 4] {
    const _: () = assert!(SETS.is_power_of_two() && TABLES <= u32::BITS as usize);
    const SET: u8 = SETS as u8 - 1;
    let first = 2_u8.wrapping_add((pcid as u8 & SET).wrapping_mul(IN_SETS as u8));
    const _: () = assert!(View::Kernel as usize == 0 && View::User as usize == 1);
    const _: () = assert!(View::KernelOverUser as usize == 2 && View::UserAligned as usize == 3);
    [0, first, first.wrapping_add(1), 1]
}

impl Mmu {
    /// Forgets every translation, global ones too.
    pub(crate) fn flush_all(&mut self) {
        self.data.clear();
        self.mirror.forget();
        self.gs_pages.forget();
        self.code.clear();
        self.large.clear();
        self.jumps.clear();
        self.version = self.version.wrapping_add(1);
    }

    /// INVLPG: forgets whatever page maps `addr` in the address spaces `of`, and global ones.
    pub(crate) fn invalidate(&mut self, addr: u64, of: Whose) {
        let span = self.large.span(addr);
        self.data.invalidate(addr, span, of);
        self.mirror.invalidate(addr, span);
        self.gs_pages.invalidate(addr, span);
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

    /// Takes away the permission to store unseen to `frame`.
    pub(crate) fn drop_writes_to(&mut self, frame: RamFrame) {
        self.data.drop_writes_to(frame);
        self.mirror.drop_writes_to(frame);
        self.gs_pages.drop_writes_to(frame);
    }

    /// Takes away every permission to store unseen to what `is_marked`, of which there were
    /// `epoch`, and others along with them.
    pub(crate) fn drop_writes(&mut self, epoch: u64, is_marked: impl Fn(RamFrame) -> bool) {
        self.data.drop_writes();
        self.mirror.drop_writes(epoch, is_marked);
        self.gs_pages.forget();
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

/// Whose translations are to be forgotten. Those of others may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// The present address space's.
    Present,
    /// Those of the address space with that PCID.
    Pcid(u16),
    /// All address spaces'.
    All,
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

    /// The number of the tables that `view` has at present.
    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "a view is below 4")]
    fn number(&self, view: View) -> usize {
        usize::from(self.present[view as usize])
    }

    /// The entries of `view`.
    #[expect(clippy::indexing_slicing, reason = "there are as many as `tables_in_set` counts")]
    pub(crate) fn tables(&mut self, view: View) -> *mut DataTables {
        &raw mut self.tables[self.number(view)]
    }

    /// Tables that have entries, and the frames of those for stores.
    fn in_use(&mut self) -> impl Iterator<Item = (&mut DataTables, &mut FrameFilter)> {
        self.in_use_of(u32::MAX)
    }

    /// The same of `some` tables, a bit each.
    fn in_use_of(
        &mut self,
        some: u32,
    ) -> impl Iterator<Item = (&mut DataTables, &mut FrameFilter)> {
        let used = self.used & some;
        let all = self.tables.iter_mut().zip(self.stored.iter_mut()).enumerate();
        all.filter(move |(number, _)| used & 1 << number != 0).map(|(_, tables)| tables)
    }

    /// The address space of `view`, as tags have it.
    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "a view is below 4")]
    pub(crate) fn space(&self, view: View) -> u64 {
        self.spaces[view as usize]
    }

    /// The views are of address space `number` from now on, which is that of `pcid`, the
    /// kernel's of `kernel`.
    pub(super) fn set_space(&mut self, number: u64, kernel: u64, pcid: u16) {
        const _: () = assert!(View::Kernel as usize == 0);
        self.spaces = [kernel, number, number, number];
        self.present = tables_in_set(pcid);
    }

    pub(crate) fn new() -> Self {
        // SAFETY: numbers and a bool, for all of which zero is a value; together they make
        // entries whose tag is `INVALID`.
        let tables = unsafe { Box::<[DataTables; TABLES]>::new_zeroed().assume_init() };
        // SAFETY: numbers; zeroes are empty filters.
        let stored = unsafe { Box::<[FrameFilter; TABLES]>::new_zeroed().assume_init() };
        Self {
            tables,
            used: 0,
            stored,
            present: tables_in_set(0),
            low_is_global: false,
            last: u64::MAX,
            spaces: [1; 4],
            kernel_of_one_space: false,
        }
    }

    fn clear(&mut self) {
        self.kernel_of_one_space = false;
        self.low_is_global = false;
        for (tables, stored) in self.in_use() {
            for table in tables.both() {
                table.fill(EMPTY_DATA);
            }
            stored.clear();
        }
        self.used = 0;
    }

    /// The entry that `addr` has to itself and its aliases.
    #[inline(always)]
    #[expect(
        clippy::indexing_slicing,
        reason = "`tables_in_set` counts the tables and a slot is masked to one"
    )]
    fn entry(&self, view: View, addr: u64, access: Access) -> &DataEntry {
        &self.tables[self.number(view)].of(access)[data_slot(addr)]
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
        let number = self.number(view);
        let tables = self.tables.get_mut(number).into_iter();
        tables.flat_map(move |tables| {
            let entries = [tables.read.get_mut(slot), tables.write.get_mut(slot)];
            let backing = tables.backing.iter_mut().map(move |table| table.get_mut(slot));
            entries.into_iter().flatten().zip(backing.flatten())
        })
    }

    /// The frame of the entry that [`DataTlb::lookup`] would hit.
    pub(crate) fn frame(&self, view: View, addr: u64, access: Access) -> RamFrame {
        self.backing(view, addr, access).map_or(RamFrame(0), |it| it.frame)
    }

    /// What else is known of that entry's page.
    pub(super) fn backing(&self, view: View, addr: u64, access: Access) -> Option<Backing> {
        let stores = usize::from(matches!(access, Access::Write));
        let tables = self.tables.get(self.number(view))?;
        tables.backing.get(stores)?.get(data_slot(addr)).copied()
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
        self.low_is_global |= fill.global && !is_high(addr);
        let number = self.number(view);
        self.used |= 1 << number;
        if fill.writable
            && let Some(stored) = self.stored.get_mut(number)
        {
            stored.add(fill.frame);
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

    /// Whether a user's page is global, as far as is known.
    pub(crate) fn low_is_global(&self) -> bool {
        self.low_is_global
    }

    /// Takes away every permission to store unseen.
    pub(crate) fn drop_writes(&mut self) {
        for (tables, stored) in self.in_use() {
            tables.write.fill(EMPTY_DATA);
            stored.clear();
        }
    }

    /// Takes away the permission to store unseen to the page at `addr`.
    pub(crate) fn drop_write(&mut self, view: View, addr: u64) {
        let number = self.number(view);
        let tables = self.tables.get_mut(number);
        if let Some(entry) = tables.and_then(|tables| tables.write.get_mut(data_slot(addr))) {
            *entry = EMPTY_DATA;
        }
    }

    /// Takes away the permission to store unseen to `frame`.
    fn drop_writes_to(&mut self, frame: RamFrame) {
        // Most code was never written to by whoever runs it.
        for (tables, stored) in self.in_use().filter(|(_, stored)| stored.may_have(frame)) {
            // All entries are looked at, so the filter can be made anew of those that stay.
            stored.clear();
            let [_, behind] = &tables.backing;
            for (entry, backing) in tables.write.iter_mut().zip(behind) {
                if entry.tag == INVALID {
                    continue;
                }
                if backing.frame == frame {
                    *entry = EMPTY_DATA;
                } else {
                    stored.add(backing.frame);
                }
            }
        }
    }

    fn invalidate(&mut self, addr: u64, span: u32, of: Whose) {
        let matches = |entry: &DataEntry| (entry.tag ^ addr) >> span == 0;
        let bits = |tables: [u8; 4]| {
            tables.iter().fold(0, |bits, number| bits | 1_u32.wrapping_shl((*number).into()))
        };
        let concerned = match of {
            // What is global is so in all of them.
            _ if is_high(addr) || self.low_is_global => u32::MAX,
            Whose::Present => bits(self.present),
            // That may be the present one, whatever set it got when it became so.
            Whose::Pcid(pcid) => bits(self.present) | bits(tables_in_set(pcid)),
            Whose::All => u32::MAX,
        };
        for (tables, _) in self.in_use_of(concerned) {
            for table in tables.both() {
                if span > PAGE_SHIFT {
                    table.iter_mut().filter(|entry| matches(entry)).for_each(|it| *it = EMPTY_DATA);
                } else if let Some(entry) = table.get_mut(data_slot(addr)).filter(|it| matches(it))
                {
                    *entry = EMPTY_DATA;
                }
            }
        }
    }
}

/// Whether `addr` is in the upper half of the address space, where kernels are.
fn is_high(addr: u64) -> bool {
    addr >> 63 != 0
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
        tlb.set_space(2, 2, 0);
        assert!(tlb.lookup_slow(View::User, 0x10), "global");
        tlb.drop_writes();
        tlb.set_space(3, 3, 0);
        tlb.lookup_slow(View::User, 0x10);
        assert!(tlb.lookup(View::User, 0x10, 1, Access::Write).is_none());
        assert!(tlb.lookup(View::User, 0x10, 1, Access::Read).is_some());
        tlb.clear();
        assert!(!tlb.lookup_slow(View::User, 0x10));
    }

    #[test]
    fn address_spaces_of_different_pcids_keep_their_entries() {
        let fill = |mmu: &mut Mmu, addr, global| {
            let (host, frame, size) = (0x7000_0000, RamFrame(7), PageSize::Small);
            let fill = Fill { host, frame, writable: true, global, size };
            mmu.fill_data(View::User, addr, Access::Read, &fill);
        };
        let hits = |mmu: &Mmu, addr| mmu.data.lookup(View::User, addr, 8, Access::Read).is_some();
        let mut mmu = Mmu::new();
        for pcid in [1, 2, 1, 2] {
            mmu.switch_space(pcid, true);
            if pcid == 1 || !hits(&mmu, 0x5000) {
                fill(&mut mmu, 0x5000, false);
            }
        }
        let here = |mmu: &mut Mmu, pcid, addr| {
            mmu.switch_space(pcid, true);
            hits(mmu, addr)
        };
        assert!(here(&mut mmu, 1, 0x5000) && here(&mut mmu, 2, 0x5000), "at the same address");
        mmu.invalidate(0x5000, Whose::Present);
        assert!(!here(&mut mmu, 2, 0x5000) && here(&mut mmu, 1, 0x5000));
        mmu.switch_space(2, true);
        mmu.invalidate(0x5000, Whose::Pcid(1));
        assert!(!here(&mut mmu, 1, 0x5000));
        // What is global is forgotten everywhere, in either half.
        for addr in [u64::MAX << 12, 0x5000] {
            for pcid in [1, 2] {
                mmu.switch_space(pcid, true);
                fill(&mut mmu, addr, true);
            }
            mmu.invalidate(addr, Whose::Present);
            assert!(!here(&mut mmu, 1, addr) && !here(&mut mmu, 2, addr), "{addr:x}");
        }
        for pcid in [1, 2] {
            mmu.switch_space(pcid, true);
            fill(&mut mmu, 0x6000, false);
        }
        mmu.invalidate(0x6000, Whose::All);
        assert!(!here(&mut mmu, 1, 0x6000) && !here(&mut mmu, 2, 0x6000));
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
