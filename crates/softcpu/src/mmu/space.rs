//! Address spaces: the numbers that TLB tags carry for the guest's PCIDs.
//!
//! A number is given out for a PCID and its translations; forgetting all of them is
//! giving the PCID a new number. When the numbers run out, the tables are emptied and
//! counting starts over. MOV to CR3, INVPCID and mode changes call this.

use super::Mmu;

/// The address-space numbers in use: 1 to 4094.
const LAST_SPACE: u64 = 4094;
/// Guest address-space tags (PCIDs) remembered at once.
const REMEMBERED: usize = 16;

/// Which numbers stand for the guest's address spaces (PCIDs; one, tagged 0, without them).
#[derive(Debug)]
pub(crate) struct Spaces {
    current: u64,
    next: u64,
    /// PCID and number of the address spaces that may have translations to go back to.
    known: [Option<(u16, u64)>; REMEMBERED],
    oldest: usize,
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

    fn set_space(&mut self, number: u64) {
        self.spaces.current = number;
        self.data.space = number;
        self.code.space = number;
        self.jumps.space_changed();
        self.version = self.version.wrapping_add(1);
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
