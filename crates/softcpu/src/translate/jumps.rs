//! Where jumps go: from a guest address to translated code without leaving it.
//!
//! A direct-mapped table that translated code looks into for every jump whose target is not
//! fixed to its block: returns, indirect calls, and direct jumps to other pages, whose
//! mapping may change. An entry stands for "this address, in this address space, at this
//! privilege": all three make its key. The key of a context is a random number, so that no
//! guest can find an address which, in one context, has the key of another address in
//! another. Whatever forgets a mapping of code empties the table ([`super::super::mmu`]).

use std::hash::{BuildHasher, RandomState};

use crate::addr::PAGE_SHIFT;

/// Entries; a power of two.
pub(crate) const ENTRIES: usize = 4096;
/// What leaves the number of an entry of a hash.
pub(super) const MASK: u32 = ENTRIES as u32 - 1;
/// Words of the filter of pages.
const FILTER: usize = 64;
/// A key that no entry has had yet. Contexts' keys are random, so an address that happens
/// to have it is as likely as one that a guest has guessed.
const NO_KEY: u64 = 0;

/// The table. Translated code reads it through the vCPU's base.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct JumpCache {
    pub(crate) keys: [u64; ENTRIES],
    pub(crate) hosts: [u64; ENTRIES],
    /// What is XORed to an address to make its key, in the current context.
    pub(crate) context: u64,
    /// Which pages have entries: a bit each, by a hash. May claim too many, never too few.
    pages: [u64; FILTER],
    /// Entries may be there that hold for the current address space but have the key of
    /// the kernel, which all share.
    kernel_of_one_space: bool,
    filled: bool,
    /// The kernel's, in every address space.
    kernel: u64,
    /// The last user's: address space and number.
    user: (u64, u64),
    random: RandomState,
}

/// Where an address has its entry.
pub(crate) const fn slot(rip: u64) -> usize {
    (rip ^ rip >> 10) as usize & (ENTRIES - 1)
}

impl JumpCache {
    pub(crate) fn new() -> Self {
        let random = RandomState::new();
        Self {
            keys: [NO_KEY; ENTRIES],
            // Nobody goes to an address that has no entry.
            hosts: [0; ENTRIES],
            context: 1,
            pages: [0; FILTER],
            kernel_of_one_space: false,
            filled: false,
            kernel: number(&random, 0, false),
            user: (0, number(&random, 0, true)),
            random,
        }
    }

    /// Forgets every entry.
    pub(crate) fn clear(&mut self) {
        if self.filled {
            self.keys = [NO_KEY; ENTRIES];
            self.pages = [0; FILTER];
            self.kernel_of_one_space = false;
            self.filled = false;
        }
    }

    /// Guest code goes on in address space `space`, at user privilege or not.
    pub(crate) fn enter_context(&mut self, space: u64, user: bool) {
        if user && self.user.0 != space {
            self.user = (space, number(&self.random, space, true));
        }
        self.context = if user { self.user.1 } else { self.kernel };
    }

    /// Where translated code for `rip` is, in the current context.
    pub(crate) fn find(&self, rip: u64) -> Option<u64> {
        let slot = slot(rip);
        let known = self.keys.get(slot) == Some(&(rip ^ self.context));
        if known { self.hosts.get(slot).copied() } else { None }
    }

    /// The address space changes: kernels map the same code in all, or else they say so.
    pub(crate) fn space_changed(&mut self) {
        if self.kernel_of_one_space {
            self.clear();
        }
    }

    /// Translated code for `rip` in the current context is at `host`. `shared` says that
    /// the page is global.
    pub(crate) fn insert(&mut self, rip: u64, host: u64, user: bool, shared: bool) {
        let slot = slot(rip);
        let key = rip ^ self.context;
        let (Some(to_key), Some(to_host)) = (self.keys.get_mut(slot), self.hosts.get_mut(slot))
        else {
            return;
        };
        (*to_key, *to_host) = (key, host);
        self.kernel_of_one_space |= !user && !shared;
        self.filled = true;
        let (word, bit) = filter(rip);
        if let Some(word) = self.pages.get_mut(word) {
            *word |= bit;
        }
    }

    /// A mapping of the page at `addr` is forgotten, in whichever address space.
    pub(crate) fn page_changed(&mut self, addr: u64) {
        let (word, bit) = filter(addr);
        if self.pages.get(word).is_some_and(|word| word & bit != 0) {
            self.clear();
        }
    }
}

/// The number of a context. Never zero: an address that equals it must have a key.
fn number(random: &RandomState, space: u64, user: bool) -> u64 {
    random.hash_one((space, user)) | 1
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
        cache.enter_context(3, true);
        cache.insert(0x1234, 7, true, false);
        assert_eq!(cache.find(0x1234), Some(7));
        for (space, user) in [(4, true), (3, false)] {
            cache.enter_context(space, user);
            assert_eq!(cache.find(0x1234), None);
        }
        cache.space_changed();
        cache.enter_context(3, true);
        assert_eq!(cache.find(0x1234), Some(7), "the old address space is back");
        cache.page_changed(0x1fff);
        assert_eq!(cache.find(0x1234), None);
    }

    #[test]
    fn a_kernel_mapped_in_one_address_space_only_is_not_kept_for_others() {
        let mut cache = JumpCache::new();
        cache.enter_context(1, false);
        cache.insert(0x5000, 7, false, true);
        cache.space_changed();
        cache.enter_context(2, false);
        assert_eq!(cache.find(0x5000), Some(7), "a global page");
        cache.insert(0x6000, 8, false, false);
        cache.space_changed();
        assert_eq!(cache.find(0x6000), None);
    }
}
