//! The first page tables of a 64-bit guest, as bytes that are copied into its RAM.
//!
//! Tables are made as they are needed, one behind the other; the first is the top level.

use lguest_abi::long::entry::{LARGE, NO_EXECUTE, PAGE_FLAGS, TABLE_FLAGS, WRITABLE};
use softcpu::addr::PAGE_SIZE;

/// What a page of 2 MiB covers.
const LARGE_PAGE: u64 = 1 << 21;
/// Entries of a table.
const ENTRIES: u64 = 512;
/// An entry's address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A stretch of addresses, and the memory behind it. All are multiples of a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Translations {
    pub(super) at: u64,
    pub(super) phys: u64,
    pub(super) len: u64,
    pub(super) writable: bool,
    pub(super) executable: bool,
    /// By pages of 2 MiB where they fit.
    pub(super) large: bool,
}

impl Translations {
    /// All of RAM from 0, writable, at `at`.
    pub(super) const fn ram(at: u64, len: u64, executable: bool) -> Self {
        Self { at, phys: 0, len, writable: true, executable, large: true }
    }

    const fn flags(&self) -> u64 {
        let mut flags = PAGE_FLAGS;
        if self.writable {
            flags |= WRITABLE;
        }
        if !self.executable {
            flags |= NO_EXECUTE;
        }
        flags
    }

    /// Most tables below the top level that it needs.
    fn tables(&self) -> u64 {
        let spans = |shift: u32| (self.len >> shift).saturating_add(2);
        let aligned = (self.at | self.phys).is_multiple_of(LARGE_PAGE);
        let lowest = if self.large && aligned { 1 } else { spans(21) };
        lowest.saturating_add(spans(30)).saturating_add(spans(39))
    }
}

/// The tables.
pub(super) struct Tables {
    /// All of them, one behind the other.
    words: Vec<u64>,
    /// Where the first is going to be.
    at: u64,
}

impl Tables {
    /// How many bytes are enough for these, in whole pages.
    pub(super) fn bytes(all: &[Translations]) -> u64 {
        let tables = all.iter().map(Translations::tables).fold(1, u64::saturating_add);
        tables.saturating_mul(PAGE_SIZE)
    }

    /// The bytes of tables that are going to be at physical `at`.
    pub(super) fn build(all: &[Translations], at: u64) -> Vec<u8> {
        let mut tables = Self { words: vec![0; ENTRIES as usize], at };
        for translations in all {
            tables.map(translations);
        }
        tables.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn map(&mut self, it: &Translations) {
        let mut done = 0;
        while done < it.len {
            let (at, phys) = (it.at.wrapping_add(done), it.phys.wrapping_add(done));
            let left = it.len.saturating_sub(done);
            let fits = (at | phys).is_multiple_of(LARGE_PAGE) && left >= LARGE_PAGE;
            if it.large && fits {
                self.set(at, 21, phys | it.flags() | LARGE);
                done = done.saturating_add(LARGE_PAGE);
            } else {
                self.set(at, 12, phys | it.flags());
                done = done.saturating_add(PAGE_SIZE);
            }
        }
    }

    /// Sets the entry for `at` of the level whose entries cover 2^`lowest` bytes.
    fn set(&mut self, at: u64, lowest: u32, entry: u64) {
        let mut table = 0;
        for shift in [39, 30, 21, 12] {
            let index = at.wrapping_shr(shift) & ENTRIES.wrapping_sub(1);
            let place = table | index as usize;
            if shift == lowest {
                if let Some(slot) = self.words.get_mut(place) {
                    *slot = entry;
                }
                return;
            }
            table = self.table_below(place);
        }
    }

    /// The number of the first word of the table that the entry at `place` points to.
    fn table_below(&mut self, place: usize) -> usize {
        let entry = self.words.get(place).copied().unwrap_or(0);
        if entry != 0 {
            let offset = (entry & ADDRESS).wrapping_sub(self.at);
            return (offset >> 3) as usize;
        }
        let new = self.words.len();
        let address = self.at.wrapping_add((new as u64).wrapping_mul(size_of::<u64>() as u64));
        self.words.resize(new.saturating_add(ENTRIES as usize), 0);
        if let Some(slot) = self.words.get_mut(place) {
            *slot = address | TABLE_FLAGS;
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AT: u64 = 0x7_0000_0000;

    /// Walks the tables as the CPU would: the physical address, writable, executable.
    fn walk(bytes: &[u8], at: u64) -> Option<(u64, bool, bool)> {
        let mut table = AT;
        for shift in [39, 30, 21, 12] {
            let place = (table - AT + (at >> shift & 0x1ff) * 8) as usize;
            let entry = u64::from_le_bytes(bytes[place..place + 8].try_into().unwrap());
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 4, 0, "not for users");
            if shift == 12 || entry & LARGE != 0 {
                let offset = at & ((1 << shift) - 1);
                let flags = (entry & WRITABLE != 0, entry & NO_EXECUTE == 0);
                return Some(((entry & ADDRESS) + offset, flags.0, flags.1));
            }
            table = entry & ADDRESS;
        }
        None
    }

    proptest! {
        #[test]
        fn what_is_mapped_is_found_and_nothing_else(
            at in (0_u64..1 << 36).prop_map(|page| page << 12), phys in 0_u64..1 << 20,
            pages in 1_u64..3000, writable: bool, executable: bool, large: bool, offset: u64,
        ) {
            let (phys, len) = (phys << 12, pages << 12);
            prop_assume!(at >> 47 == (at + len) >> 47);
            let at = if at >> 47 == 0 { at } else { at | 0xffff << 48 };
            let it = Translations { at, phys, len, writable, executable, large };
            let bytes = Tables::build(&[it], AT);
            prop_assert!(bytes.len() as u64 <= Tables::bytes(&[it]));
            let offset = offset % len;
            let found = Some((phys + offset, writable, executable));
            prop_assert_eq!(walk(&bytes, at + offset), found);
            prop_assert_eq!(walk(&bytes, at.wrapping_add(len)), None);
            prop_assert_eq!(walk(&bytes, at.wrapping_sub(1)), None);
        }
    }

    #[test]
    fn ram_is_mapped_by_large_pages_and_its_end_by_small_ones() {
        let len = (4 << 30) + 0x3000;
        let it = Translations::ram(0, len, true);
        let bytes = Tables::build(&[it], AT);
        assert!(bytes.len() <= 8 * 4096);
        assert_eq!(walk(&bytes, len - 1), Some((len - 1, true, true)));
        assert_eq!(walk(&bytes, len), None);
    }
}
