//! Accesses at constant distances from the base of GS, where kernels have what is each CPU's own
//! ([`crate::mmu::gs_pages`]).
//!
//! Which entry of the table is the one is known beforehand, so whether it is for the present base
//! is all that is looked at: three instructions, not fourteen. What is not kept goes to the look
//! into the TLB, behind the rest, and comes back with the same; now and then one is interpreted,
//! and its page kept from then on.

use super::access::{ADD, Access, Place};
use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::block::{Apart, Block};
use super::cold::{Cold, Fix};
use super::fields::{self, TLB_ADDEND, TLB_STORES};
use super::registers::{ADDRESS, VALUE};
use crate::addr::{PAGE_SHIFT, room_in_page};
use crate::decode::op::{Op, OpFlags};
use crate::mmu::gs_pages::PAGES;
use crate::state::GPR_ZERO;
use crate::state::segment::SegReg;
use crate::vcpu::Vcpu;

#[cfg(test)]
mod tests;

/// An access at a distance from the base of GS.
#[derive(Clone, Copy, Debug)]
pub(super) struct Distant {
    distance: u32,
    access: Access,
}

/// How far behind the base of GS `op`'s memory operand is, if that is a constant.
fn distance(op: &Op) -> Option<u64> {
    let constant = op.base == GPR_ZERO && op.index == GPR_ZERO && op.seg == SegReg::Gs as u8;
    (constant && !op.flags.contains(OpFlags::LEGACY)).then_some(op.disp & op.addr_mask)
}

/// Which page behind the base of GS is at `distance`.
fn page(distance: u64) -> Option<usize> {
    usize::try_from(distance >> PAGE_SHIFT).ok().filter(|page| *page < PAGES)
}

impl Distant {
    /// `access` to `op`'s memory operand, if it may be made so.
    pub(super) fn of(op: &Op, access: Access) -> Option<Self> {
        let distance = distance(op)?;
        let simple = access.align_mask == 0 && room_in_page(distance) >= u64::from(access.len);
        page(distance).filter(|_| simple)?;
        Some(Self { distance: u32::try_from(distance).ok()?, access })
    }
}

impl Block<'_> {
    /// Checks the step's access to what is `distant`, `op`'s memory operand; `slow`, which was
    /// put behind the rest just now, is for what cannot be accessed in place at all.
    pub(super) fn check_gs_page(
        &mut self,
        op: &Op,
        distant: Distant,
        slow: Label,
    ) -> Result<Place, NotCopied> {
        let page = page(distant.distance.into()).ok_or(NotCopied)?;
        if op.flags.contains(OpFlags::DISP_MOVES) {
            self.code.stays();
        }
        let (look, found) = (self.code.label(), self.code.label());
        let before = self.cold.len().saturating_sub(1);
        let homes = self.code.homes;
        let what = Cold::LookBehindGs { distant, found, slow };
        self.cold.insert(before, Apart { at: look, fix: Fix::None, homes, note: None, what });
        self.code.load(VALUE, fields::GS_BASE_KNOWN);
        self.code.compare(VALUE, fields::gs_page_base(page));
        self.code.jump_if(Condition::NOT_EQUAL, look);
        self.code.load(ADDRESS, fields::gs_page_addend(page));
        self.code.bind(found);
        Ok(Place::at(distant.distance.into()))
    }
}

impl Assembler {
    /// Looks into the TLB for what is `distant`, and goes on where it is `found`, with what makes
    /// a host address of the distance in [`ADDRESS`]; or to `slow`, as one in so many does anyway.
    pub(super) fn look_behind_gs(&mut self, distant: Distant, found: Label, slow: Label) {
        let Distant { distance, access } = distant;
        let base = fields::segment_base(SegReg::Gs as u8);
        let table = if access.stores { TLB_STORES } else { 0 };
        self.count_down(fields::GS_MISSES, slow);
        self.constant(VALUE, distance.into());
        self.add(VALUE, base);
        self.entry_of_value();
        let last = u64::from(distance).wrapping_add(u64::from(access.len.saturating_sub(1)));
        self.constant(ADDRESS, last);
        self.add(ADDRESS, base);
        self.page_of_address();
        self.compare_tag(table, slow);
        self.load(ADDRESS, base);
        self.with_entry(ADD, table.wrapping_add(TLB_ADDEND));
        self.jump(found);
    }
}

impl Vcpu {
    /// Accesses have looked for their page in vain, the last of them that of `op`, which was
    /// interpreted just now.
    #[cold]
    pub(super) fn missed_gs_page(&mut self, op: &Op) {
        // Who is followed has its stores watched, and who has breakpoints all of them.
        let watched = self.lockstep.is_some() || self.data_breakpoints_active();
        if let Some(page) = distance(op).and_then(page)
            && op.flags.contains(OpFlags::MEM)
            && !watched
        {
            self.mmu.want_gs_page(page);
        }
    }
}
