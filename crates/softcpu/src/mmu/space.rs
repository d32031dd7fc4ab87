//! Address spaces: the numbers that TLB tags carry for the guest's PCIDs.
//!
//! A number is given out for a PCID and its translations; forgetting all of them is
//! giving the PCID a new number. When the numbers run out, the tables are emptied and
//! counting starts over. MOV to CR3, INVPCID and mode changes call this.

use super::Mmu;

/// The address-space numbers in use: 1 to 4094.
const LAST_SPACE: u64 = 4094;
/// Changes of address space without a page of the kernel's that is not global, until the
/// kernel's view is taken to be the same in all.
const STEADY: u32 = 16;
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
    /// The number of the kernel's view, where it is the same in all address spaces: with SMAP
    /// it has no pages of users, and kernels map theirs globally.
    kernel: Option<u64>,
    /// Changes since the kernel's view last had a page of one address space only.
    steady: u32,
}

impl Spaces {
    pub(crate) fn new() -> Self {
        Self { current: 1, next: 2, known: [None; REMEMBERED], oldest: 0, kernel: None, steady: 0 }
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

    /// The number of the kernel's view from now on, which has had pages of one address space
    /// only or not.
    fn kernel(&mut self, of_one_space: bool) -> u64 {
        self.steady = if of_one_space { 0 } else { self.steady.saturating_add(1) };
        if self.steady < STEADY {
            self.kernel = None;
        } else if self.kernel.is_none() && self.next <= LAST_SPACE {
            self.kernel = Some(self.next);
            self.next = self.next.wrapping_add(1);
        }
        self.kernel.unwrap_or(self.current)
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
            Some(number) => self.set_space(number, pcid),
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

    fn set_space(&mut self, number: u64, pcid: u16) {
        self.mirror.leaves(self.spaces.current);
        self.spaces.current = number;
        let of_one_space = std::mem::take(&mut self.data.kernel_of_one_space);
        self.data.set_space(number, self.spaces.kernel(of_one_space), pcid);
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
        self.set_space(self.spaces.current, pcid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::RamFrame;
    use crate::mmu::large_pages::PageSize;
    use crate::mmu::tlb::{Fill, Whose};
    use crate::mmu::{Access, View};

    fn fill(mmu: &mut Mmu, view: View, addr: u64, global: bool) {
        let fill = Fill {
            host: 0x7000_0000,
            frame: RamFrame(1),
            writable: true,
            global,
            size: PageSize::Small,
        };
        mmu.fill_data(view, addr, Access::Read, &fill);
    }

    fn hits(mmu: &Mmu, view: View, addr: u64) -> bool {
        mmu.data.lookup(view, addr, 8, Access::Read).is_some()
    }

    /// One in which the kernel's view is the same in all address spaces; the first is current.
    fn steady() -> Mmu {
        let mut mmu = Mmu::new();
        for _ in 0..=STEADY {
            mmu.switch_space(2, true);
            mmu.switch_space(1, true);
        }
        mmu
    }

    #[test]
    fn global_pages_of_a_kernel_stay_when_the_address_space_changes() {
        let mut mmu = steady();
        for view in [View::Kernel, View::KernelOverUser, View::User] {
            fill(&mut mmu, view, 0x5000, true);
        }
        mmu.switch_space(2, true);
        assert!(hits(&mmu, View::Kernel, 0x5000));
        assert!(!hits(&mmu, View::KernelOverUser, 0x5000) && !hits(&mmu, View::User, 0x5000));
        mmu.invalidate(0x5000, Whose::Present);
        assert!(!hits(&mmu, View::Kernel, 0x5000));
    }

    #[test]
    fn others_do_not() {
        let mut mmu = steady();
        fill(&mut mmu, View::Kernel, 0x5000, false);
        assert!(hits(&mmu, View::Kernel, 0x5000));
        for _ in 0..3 * STEADY {
            mmu.switch_space(2, true);
            assert!(!hits(&mmu, View::Kernel, 0x5000));
        }
        // Nor is what is forgotten in one space only there again in it.
        let mut mmu = steady();
        fill(&mut mmu, View::Kernel, 0x5000, false);
        mmu.flush_space(1);
        assert!(!hits(&mmu, View::Kernel, 0x5000));
    }

    #[test]
    fn numbers_that_run_out_start_over() {
        let mut mmu = steady();
        for round in 0..3 * LAST_SPACE {
            let own = round % 40 == 0;
            fill(&mut mmu, View::Kernel, 0x5000, !own);
            mmu.switch_space(1 + (round & 1) as u16, false);
            assert!(!own || !hits(&mmu, View::Kernel, 0x5000), "{round}");
            assert!(
                [View::Kernel, View::User]
                    .iter()
                    .all(|view| (1..=LAST_SPACE).contains(&mmu.data.space(*view)))
            );
        }
    }
}
