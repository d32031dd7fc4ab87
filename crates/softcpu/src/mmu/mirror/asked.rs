//! A page that is asked for, and those that can be shown along with it.

use std::sync::Arc;

use super::{Page, SPAN_SHIFT};
use crate::addr::{PAGE_OFFSET, PAGE_SHIFT, PAGE_SIZE};
use crate::memory::ram::RamFrame;
use crate::mmu::access::Reached;
use crate::mmu::large_pages::PageSize;
use crate::mmu::{Access, View};
use crate::vcpu::Vcpu;

/// The smaller of the guest's large pages, bytes: larger ones are shown in such pieces.
const LARGE: u64 = 1 << 21;
/// Small pages to each side, at most.
pub(super) const AROUND: u64 = 16;

impl Vcpu {
    /// Shows the page for an access to `host` in a window, and what can be shown along with it.
    /// Says whether the access can be made now.
    pub(crate) fn show_page(&mut self, host: u64, stores: bool) -> bool {
        let Some(addr) = self.mmu.mirror.guest_address(host) else { return false };
        let space = self.mmu.data.space(View::User);
        if self.mmu.view != View::User || !self.mmu.mirror.serves(space) {
            return false;
        }
        let access = if stores { Access::Write } else { Access::Read };
        let Some(reached) = self.reached_unseen(addr, access) else { return false };
        let memory = Arc::clone(&self.memory);
        let Some(ram) = memory.shared() else { return false };
        let page = addr & !PAGE_OFFSET;
        let (first, count) = self.pages_like(page, &reached);
        let distance = page.wrapping_sub(first) >> PAGE_SHIFT;
        let frame = RamFrame(reached.frame.0.wrapping_sub(distance as u32));
        let first = Page { addr: first, frame, writable: reached.writable };
        self.mmu.mirror.show(ram, first, count) && (reached.writable || !stores)
    }

    /// Where the pages begin that can be shown along with the one at `page`, which is itself one of
    /// them, and how many they are: all of a large page of the guest's, or those beside it that
    /// the TLB has.
    fn pages_like(&self, page: u64, &Reached { frame, writable, size }: &Reached) -> (u64, u64) {
        let frame_of = |addr: u64| {
            let distance = addr.wrapping_sub(page) >> PAGE_SHIFT;
            RamFrame(frame.0.wrapping_add(distance as u32))
        };
        if size != PageSize::Small {
            let first = page & !(LARGE - 1);
            let count = LARGE >> PAGE_SHIFT;
            let unmarked = |n: u64| {
                let at = frame_of(first.wrapping_add(n << PAGE_SHIFT));
                !self.memory.code().is_marked(at)
            };
            // A guest may map more than there is.
            let [begin, end] = [first, first.wrapping_add(LARGE).wrapping_sub(PAGE_SIZE)]
                .map(|page| self.memory.address_of(frame_of(page)));
            let all_there = begin.zip(end).is_some_and(|(begin, end)| {
                end.0.wrapping_sub(begin.0) == LARGE.wrapping_sub(PAGE_SIZE)
            });
            if all_there && (!writable || (0..count).all(unmarked)) {
                return (first, count);
            }
        }
        let same = |addr: u64| {
            let data = &self.mmu.data;
            let stores = data.lookup(View::User, addr, 1, Access::Write).is_some();
            let access = if stores { Access::Write } else { Access::Read };
            data.lookup(View::User, addr, 1, access).is_some()
                && stores == writable
                && data.frame(View::User, addr, access) == frame_of(addr)
        };
        let (before, count) = neighbours(page, same);
        (page.wrapping_sub(before << PAGE_SHIFT), count.wrapping_add(before))
    }
}

/// How many pages there are around the one at `addr`, before it and from it on, of which `same`
/// says that they are like it.
pub(super) fn neighbours(addr: u64, same: impl Fn(u64) -> bool) -> (u64, u64) {
    let page = addr & !PAGE_OFFSET;
    let inside = |other: u64| other >> SPAN_SHIFT == page >> SPAN_SHIFT && same(other);
    let before = (1..AROUND).take_while(|n| inside(page.wrapping_sub(n << PAGE_SHIFT))).count();
    let behind = (1..AROUND).take_while(|n| inside(page.wrapping_add(n << PAGE_SHIFT))).count();
    (before as u64, behind.saturating_add(1) as u64)
}
