//! Where jumps go: from a guest address to translated code without leaving it.
//!
//! A direct-mapped table that translated code looks into for every jump whose target is not
//! fixed to its block: returns, indirect calls, and direct jumps to other pages, whose
//! mapping may change. An entry stands for "this address, in this address space, at this
//! privilege, in this mode": all four make its key. The key of a context is a random number,
//! so that no guest can find an address which, in one context, has the key of another address
//! in another. What forgets a mapping of code gives all contexts of that privilege new numbers,
//! so that the table has nothing for them at once: the kernel keeps its entries when processes
//! come and go.
//!
//! Behind it is a larger table of the same kind, which is asked before the run loop is.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use super::mode::Mode;
use crate::addr::{PAGE_SHIFT, room_in_page};
use crate::decode::build::MAX_INSTRUCTION;

/// Entries; a power of two.
pub(crate) const ENTRIES: usize = 1 << 14;
/// Entries of the table behind it.
const MORE: usize = 1 << 16;
/// What leaves an entry's place, in words, of a hash: entries have two.
pub(super) const MASK: u32 = (ENTRIES as u32 - 1) << 1;
/// Words of the filter of pages.
const FILTER: usize = 64;

/// An address and the translated code for it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Jump {
    /// The address XOR the number of its context. Zero in an entry that was never used: an
    /// address that happens to have that key is as likely as one that a guest has guessed.
    pub(crate) key: u64,
    pub(crate) host: u64,
}

/// Nobody goes to an address that has no entry.
const NOWHERE: Jump = Jump { key: 0, host: 0 };

/// What entries there are at one privilege.
#[derive(Debug)]
struct Held {
    /// Which pages have any: a bit each, by a hash. May claim too many, never too few.
    pages: [u64; FILTER],
    filled: bool,
    /// How often all were forgotten.
    epoch: u64,
}

/// The table. Translated code reads it through the vCPU's base.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct JumpCache {
    pub(crate) jumps: [Jump; ENTRIES],
    /// What is XORed to an address to make its key, in the current context.
    pub(crate) context: u64,
    more: Box<[Jump]>,
    /// The kernel's entries, and those of users.
    held: [Held; 2],
    /// Entries may be there that hold for the current address space but have the key of
    /// the kernel, which all share.
    kernel_of_one_space: bool,
    /// Whether `context` is the user's.
    in_user: bool,
    /// The kernel's mode and number, in every address space.
    kernel: (Mode, u64),
    /// The last user's: address space, mode and number.
    user: (u64, Mode, u64),
    random: RandomState,
}

/// The next page, if an instruction at `linear` may go on there: it depends on the mapping of
/// both.
pub(super) fn second_page(linear: u64) -> Option<u64> {
    let room = room_in_page(linear);
    (room < MAX_INSTRUCTION as u64).then(|| linear.wrapping_add(room))
}

/// Where an address has its entry.
pub(crate) const fn slot(rip: u64) -> usize {
    ((rip ^ rip >> 10) as u32 & MASK) as usize >> 1
}

/// Where it has its entry in the larger table.
fn slot_of_more(key: u64) -> usize {
    (key ^ key >> 15) as usize & (MORE - 1)
}

impl JumpCache {
    pub(crate) fn new() -> Self {
        let mut cache = Self {
            jumps: [NOWHERE; ENTRIES],
            context: 1,
            more: vec![NOWHERE; MORE].into_boxed_slice(),
            held: [(); 2].map(|()| Held { pages: [0; FILTER], filled: true, epoch: 0 }),
            kernel_of_one_space: false,
            in_user: false,
            kernel: (Mode::LONG, 1),
            user: (0, Mode::LONG, 1),
            random: RandomState::new(),
        };
        cache.clear();
        cache
    }

    /// Forgets every entry.
    pub(crate) fn clear(&mut self) {
        self.forget(false);
        self.forget(true);
    }

    /// What there is at user privilege, or the kernel's.
    #[expect(clippy::indexing_slicing, reason = "a bool is below 2")]
    fn held(&mut self, user: bool) -> &mut Held {
        &mut self.held[usize::from(user)]
    }

    /// Forgets every entry of users, or of the kernel.
    fn forget(&mut self, user: bool) {
        let held = self.held(user);
        if !held.filled {
            return;
        }
        *held = Held { pages: [0; FILTER], filled: false, epoch: held.epoch.wrapping_add(1) };
        if user {
            self.user.2 = self.number(self.user.0, true, self.user.1);
        } else {
            self.kernel.1 = self.number(0, false, self.kernel.0);
            self.kernel_of_one_space = false;
        }
        self.context = if self.in_user { self.user.2 } else { self.kernel.1 };
    }

    /// Nobody finds translated code at `hosts` any more.
    pub(crate) fn forget_code(&mut self, hosts: &Range<u64>) {
        for jump in self.jumps.iter_mut().chain(&mut self.more) {
            if hosts.contains(&jump.host) {
                *jump = NOWHERE;
            }
        }
    }

    /// The number of a context.
    fn number(&self, space: u64, user: bool, mode: Mode) -> u64 {
        let epoch = self.held.get(usize::from(user)).map(|held| held.epoch);
        self.random.hash_one((space, user, mode, epoch))
    }

    /// Guest code goes on in address space `space`, at user privilege or not, in `mode`.
    pub(crate) fn enter_context(&mut self, space: u64, user: bool, mode: Mode) {
        if user && (self.user.0, self.user.1) != (space, mode) {
            self.user = (space, mode, self.number(space, true, mode));
        } else if !user && self.kernel.0 != mode {
            self.kernel = (mode, self.number(0, false, mode));
        }
        self.in_user = user;
        self.context = if user { self.user.2 } else { self.kernel.1 };
    }

    /// Where translated code for `rip` is, in the current context.
    pub(crate) fn find(&mut self, rip: u64) -> Option<u64> {
        let key = rip ^ self.context;
        let place = self.jumps.get_mut(slot(rip))?;
        if place.key != key {
            *place = *self.more.get(slot_of_more(key)).filter(|more| more.key == key)?;
        }
        Some(place.host)
    }

    /// The address space changes: kernels map the same code in all, or else they say so.
    pub(crate) fn space_changed(&mut self) {
        if self.kernel_of_one_space {
            self.forget(false);
        }
    }

    /// Translated code for `rip` in the current context is at `host`, and depends on the page
    /// of the first linear address and on that of the second, if there is one. `shared` says
    /// that all of it is global.
    pub(crate) fn insert(
        &mut self,
        rip: u64,
        host: u64,
        (linear, second): (u64, Option<u64>),
        user: bool,
        shared: bool,
    ) {
        let jump = Jump { key: rip ^ self.context, host };
        if let Some(place) = self.jumps.get_mut(slot(rip)) {
            *place = jump;
        }
        if let Some(place) = self.more.get_mut(slot_of_more(jump.key)) {
            *place = jump;
        }
        self.kernel_of_one_space |= !user && !shared;
        let held = self.held(user);
        held.filled = true;
        for page in [Some(linear), second].into_iter().flatten() {
            let (word, bit) = filter(page);
            if let Some(word) = held.pages.get_mut(word) {
                *word |= bit;
            }
        }
    }

    /// A mapping of the page at `addr` is forgotten, in whichever address space.
    pub(crate) fn page_changed(&mut self, addr: u64) {
        let (word, bit) = filter(addr);
        for user in [false, true] {
            if self.held(user).pages.get(word).is_some_and(|word| word & bit != 0) {
                self.forget(user);
            }
        }
    }
}

/// The word and the bit of the filter that stand for the page of `addr`.
fn filter(addr: u64) -> (usize, u64) {
    let page = addr >> PAGE_SHIFT;
    let hash = (page ^ page >> 12) as usize & (FILTER * 64 - 1);
    (hash / 64, 1 << (hash % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_hold_in_their_context_only() {
        let mut cache = JumpCache::new();
        cache.enter_context(3, true, Mode::LONG);
        cache.insert(0x1234, 7, (0x1234, None), true, false);
        assert_eq!(cache.find(0x1234), Some(7));
        for (space, user, mode) in
            [(4, true, Mode::LONG), (3, false, Mode::LONG), (3, true, Mode::FLAT32)]
        {
            cache.enter_context(space, user, mode);
            assert_eq!(cache.find(0x1234), None);
        }
        cache.space_changed();
        cache.enter_context(3, true, Mode::LONG);
        assert_eq!(cache.find(0x1234), Some(7), "the old address space is back");
        cache.page_changed(0x1fff);
        assert_eq!(cache.find(0x1234), None);
    }

    #[test]
    fn who_loses_a_page_does_not_take_the_others_entries_along() {
        let mut cache = JumpCache::new();
        let find = |cache: &mut JumpCache, user, rip| {
            cache.enter_context(3, user, Mode::LONG);
            cache.find(rip)
        };
        let fill = |cache: &mut JumpCache| {
            for (user, rip, host) in [(false, 0x5000, 7), (true, 0x6000, 8)] {
                cache.enter_context(3, user, Mode::LONG);
                cache.insert(rip, host, (rip, None), user, true);
            }
        };
        for (page, left) in
            [(0x6000, [Some(7), None]), (0x5000, [None, Some(8)]), (0x7000, [Some(7), Some(8)])]
        {
            fill(&mut cache);
            cache.page_changed(page);
            assert_eq!([find(&mut cache, false, 0x5000), find(&mut cache, true, 0x6000)], left);
        }
        cache.clear();
        assert_eq!([find(&mut cache, false, 0x5000), find(&mut cache, true, 0x6000)], [None; 2]);
    }

    #[test]
    fn what_shares_a_slot_is_found_behind_it() {
        let mut cache = JumpCache::new();
        cache.enter_context(3, true, Mode::LONG);
        let (a, b) = (0x1000, 0x1000 ^ 1 << 25);
        assert_eq!(slot(a), slot(b));
        cache.insert(a, 7, (a, None), true, false);
        cache.insert(b, 8, (b, None), true, false);
        assert_eq!([a, b, a].map(|rip| cache.find(rip)), [Some(7), Some(8), Some(7)]);
        cache.clear();
        assert_eq!([a, b].map(|rip| cache.find(rip)), [None, None]);
    }

    #[test]
    fn a_kernel_mapped_in_one_address_space_only_is_not_kept_for_others() {
        let mut cache = JumpCache::new();
        cache.enter_context(1, false, Mode::LONG);
        cache.insert(0x5000, 7, (0x5000, None), false, true);
        cache.space_changed();
        cache.enter_context(2, false, Mode::LONG);
        assert_eq!(cache.find(0x5000), Some(7), "a global page");
        cache.insert(0x6000, 8, (0x6000, None), false, false);
        cache.space_changed();
        assert_eq!(cache.find(0x6000), None);
    }
}
