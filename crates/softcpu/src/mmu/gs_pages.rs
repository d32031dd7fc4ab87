//! The pages a kernel reaches through GS, without a look into the TLB.
//!
//! 64-bit kernels keep what belongs to each CPU at constant distances from the base of GS: which
//! task runs, how deep interrupts are nested, what guards the stack. They look there every few
//! instructions, and each look would be a sum and a check. So translated code keeps a table of
//! the pages behind that base, with where each is in host memory ([`crate::translate`]); it holds
//! while the base is the one that it was found for.
//!
//! What is kept came from the data TLB's entries for the kernel's stores to global pages, and is
//! forgotten whenever those are. It is found by the base alone, so users, who may put any base
//! there, see none at all ([`GsPages::enter`]).

use super::{Access, Mmu, View};
use crate::addr::{GuestVirtAddr, PAGE_OFFSET, PAGE_SHIFT, PAGE_SIZE};
use crate::memory::ram::RamFrame;

/// Pages behind the base: Linux's per-CPU area has some fifty.
pub(crate) const PAGES: usize = 64;
const REACH: u64 = (PAGES as u64) << PAGE_SHIFT;
/// A base that no page is kept for: it is not where a page begins.
pub(crate) const NO_BASE: u64 = 1;
/// What pages have that are not kept: a base that cannot be, as it is not canonical.
const NOT_KEPT: u64 = 1 << 63;
/// How many accesses look in vain until pages are looked for, if there may be some, and if there
/// were none the last time.
const PATIENCE: u64 = 2;
const LONG_PATIENCE: u64 = 512;

/// A page.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct GsPage {
    /// The base of GS that it was found for.
    pub(crate) base: u64,
    /// What makes host addresses of distances from that base.
    pub(crate) addend: u64,
}

/// See the module's words.
#[derive(Debug)]
pub(crate) struct GsPages {
    /// The base of GS, if the kernel's permissions are in force.
    pub(crate) base: u64,
    /// How many accesses may yet look in vain until somebody is told.
    pub(crate) misses: u64,
    pub(crate) pages: [GsPage; PAGES],
    /// The frames of those that are kept.
    frames: [RamFrame; PAGES],
    /// Those that were asked for, a bit each.
    wanted: u64,
    /// The base that some are kept for.
    kept_for: Option<u64>,
}

impl GsPages {
    pub(super) fn new() -> Self {
        Self {
            base: NO_BASE,
            misses: PATIENCE,
            pages: [GsPage { base: NOT_KEPT, addend: 0 }; PAGES],
            frames: [RamFrame(0); PAGES],
            wanted: 0,
            kept_for: None,
        }
    }

    /// GS has this base for the kernel's accesses; `None` for users, whose GS is their own affair.
    #[inline]
    pub(crate) fn enter(&mut self, base: Option<u64>) {
        self.base = base.unwrap_or(NO_BASE);
    }

    /// Whether so many accesses have looked in vain that pages are to be looked for; then they
    /// are counted anew.
    #[inline]
    pub(crate) fn take_asked(&mut self) -> bool {
        let asked = (self.misses as i64) < 0;
        if asked {
            self.misses = PATIENCE;
        }
        asked
    }

    /// Keeps none any more.
    pub(crate) fn forget(&mut self) {
        if self.kept_for.take().is_some() {
            for page in &mut self.pages {
                *page = GsPage { base: NOT_KEPT, addend: 0 };
            }
        }
    }

    /// Forgets what maps the addresses that have all but the lowest `bits` bits in common with
    /// `addr`.
    pub(super) fn invalidate(&mut self, addr: u64, bits: u32) {
        let Some(base) = self.kept_for else { return };
        let size = 1_u64.wrapping_shl(bits);
        let first = addr & size.wrapping_sub(1) ^ addr;
        if base.wrapping_sub(first) < size || first.wrapping_sub(base) < REACH {
            self.forget();
        }
    }

    /// `frame` must not be stored to unseen any more.
    pub(super) fn drop_writes_to(&mut self, frame: RamFrame) {
        let mut kept = self.pages.iter().zip(&self.frames);
        if kept.any(|(page, kept)| page.base != NOT_KEPT && *kept == frame) {
            self.forget();
        }
    }
}

impl Mmu {
    /// The page that is `number` pages behind the base of GS is wanted: keeps it, and those that
    /// were wanted before, as far as the TLB has them for the kernel's stores. Says whether it
    /// did.
    pub(crate) fn want_gs_page(&mut self, number: usize) -> bool {
        let base = self.gs_pages.base;
        let fits = base & PAGE_OFFSET == 0
            && GuestVirtAddr(base).is_canonical()
            && base >> 63 != 0
            && base.checked_add(REACH).is_some();
        if fits && number < PAGES {
            self.gs_pages.wanted |= 1 << number;
            if self.gs_pages.kept_for != Some(base) {
                self.gs_pages.forget();
                self.gs_pages.kept_for = Some(base);
            }
            for page in 0..PAGES {
                if self.gs_pages.wanted & 1 << page != 0 {
                    self.keep_gs_page(page);
                }
            }
        }
        let kept = self.gs_pages.pages.get(number).is_some_and(|page| page.base == base);
        if !kept {
            self.gs_pages.misses = LONG_PATIENCE;
        }
        kept
    }

    /// Keeps page `number` if the TLB has it.
    fn keep_gs_page(&mut self, number: usize) {
        let distance = (number as u64) << PAGE_SHIFT;
        let addr = self.gs_pages.base.wrapping_add(distance);
        let found = self.data.lookup(View::Kernel, addr, PAGE_SIZE, Access::Write);
        let backing = self.data.backing(View::Kernel, addr, Access::Write);
        let GsPages { base, pages, frames, .. } = &mut self.gs_pages;
        if let Some((host, backing)) = found.zip(backing.filter(|backing| backing.global))
            && let Some((page, frame)) = pages.get_mut(number).zip(frames.get_mut(number))
        {
            *page = GsPage { base: *base, addend: (host as u64).wrapping_sub(distance) };
            *frame = backing.frame;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::large_pages::PageSize;
    use crate::mmu::tlb::{Fill, Whose};

    const BASE: u64 = 0xffff_8880_1000_0000;

    fn fill(mmu: &mut Mmu, page: u64, writable: bool) {
        fill_as(mmu, page, writable, true);
    }

    fn fill_as(mmu: &mut Mmu, page: u64, writable: bool, global: bool) {
        let frame = RamFrame(page as u32 + 100);
        let host = 0x7000_0000 + (page << PAGE_SHIFT);
        let fill = Fill { host, frame, writable, global, size: PageSize::Small };
        let access = if writable { Access::Write } else { Access::Read };
        mmu.fill_data(View::Kernel, BASE + (page << PAGE_SHIFT), access, &fill);
    }

    /// One in which pages 2 and 7 are kept.
    fn keeping() -> Mmu {
        let mut mmu = Mmu::new();
        mmu.gs_pages.enter(Some(BASE));
        for page in [2, 7] {
            fill(&mut mmu, page, true);
            assert!(mmu.want_gs_page(page as usize));
        }
        mmu
    }

    fn kept(mmu: &Mmu) -> Vec<usize> {
        let kept = mmu.gs_pages.pages.iter().enumerate().filter(|(_, page)| page.base == BASE);
        kept.map(|(number, _)| number).collect()
    }

    #[test]
    fn what_is_kept_is_where_the_tlb_has_it() {
        let mut mmu = keeping();
        let at = |number: usize| mmu.gs_pages.pages[number].addend.wrapping_add(0x7008);
        assert_eq!(at(7), 0x7000_7008);
        assert_eq!(kept(&mmu), [2, 7]);
        // What cannot be stored to is not, nor is what is this address space's; nor what is not
        // there.
        fill(&mut mmu, 9, false);
        fill_as(&mut mmu, 8, true, false);
        assert!(!mmu.want_gs_page(8));
        assert!(!mmu.want_gs_page(9) && !mmu.want_gs_page(10) && !mmu.want_gs_page(PAGES));
        assert_eq!((kept(&mmu), mmu.gs_pages.misses), (vec![2, 7], LONG_PATIENCE));
        // What was wanted before comes along.
        mmu.gs_pages.forget();
        assert!(kept(&mmu).is_empty());
        assert!(mmu.want_gs_page(7));
        assert_eq!(kept(&mmu), [2, 7]);
    }

    #[test]
    fn users_and_odd_bases_have_none() {
        let mut mmu = keeping();
        mmu.gs_pages.enter(None);
        assert!(mmu.gs_pages.pages.iter().all(|page| page.base != mmu.gs_pages.base));
        for base in
            [None, Some(BASE + 8), Some(0x5000), Some(1 << 63), Some(0_u64.wrapping_sub(PAGE_SIZE))]
        {
            mmu.gs_pages.enter(base);
            assert!(!mmu.want_gs_page(2), "{base:x?}");
        }
        // The base it has next has no pages yet, and the former one none any more.
        mmu.gs_pages.enter(Some(BASE + 2 * PAGE_SIZE));
        assert!(mmu.want_gs_page(0) && kept(&mmu).is_empty());
    }

    #[test]
    fn what_the_tlb_forgets_is_forgotten() {
        let forgets = |what: fn(&mut Mmu)| {
            let mut mmu = keeping();
            what(&mut mmu);
            kept(&mmu).is_empty()
        };
        assert!(forgets(Mmu::flush_all));
        assert!(forgets(|mmu| mmu.invalidate(BASE + 0x7123, Whose::Present)));
        assert!(forgets(|mmu| mmu.drop_writes_to(RamFrame(102))));
        assert!(forgets(|mmu| mmu.drop_writes(0, |_| false)));
        assert!(!forgets(|mmu| mmu.drop_writes_to(RamFrame(103))));
        assert!(!forgets(|mmu| mmu.invalidate(BASE - 1, Whose::All)));
        assert!(!forgets(|mmu| mmu.invalidate(BASE + REACH, Whose::All)));
        // They are global.
        assert!(!forgets(|mmu| mmu.switch_space(5, true)));
        // A large page around it.
        let large = |size: PageSize, addr: u64| {
            let mut mmu = keeping();
            let (host, frame) = (0x6000_0000, RamFrame(9));
            let fill = Fill { host, frame, writable: true, global: true, size };
            mmu.fill_data(View::Kernel, addr, Access::Read, &fill);
            mmu.invalidate(addr, Whose::Present);
            kept(&mmu).is_empty()
        };
        assert!(large(PageSize::Large, BASE + 0x30_0000));
        assert!(!large(PageSize::Large, BASE + 0x80_0000));
        assert!(large(PageSize::Giant, BASE + 0x80_0000));
    }
}
