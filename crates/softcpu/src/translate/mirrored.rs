//! Accesses through the mirror ([`crate::mmu::mirror`]): in hot code of user programs.
//!
//! Whether an address lies in a span that is mirrored says a table, and nothing waits for it:
//! where the data is, the address alone decides. What is not there goes to the look into the
//! TLB, behind the rest, and comes back with what makes a host address of this one. Each access
//! may fault on the host, because the mirror has not got the page, because it may not be stored
//! to, because there is none: where it does, it *lands* in code that has the interpreter do it,
//! unless the page can be had after all ([`super::faults`]).
//!
//! Those that have looked in vain for a while say so, and the mirror may take their process.

use super::access::Place;
use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::block::{Apart, Block};
use super::cold::{Cold, Fix};
use super::regions::Landing;
use super::registers::{ADDRESS, Home, VALUE};
use super::sharing::{Group, Origin};
use super::splits::SplitAt;
use super::{faults, fields};
use crate::decode::op::{Op, OpFlags};
use crate::mmu::View;
use crate::mmu::mirror::SPAN_SHIFT;
use crate::state::{GPR_ZERO, SEG_FLAT};
use crate::system::tsc::host_tsc;
use crate::vcpu::Vcpu;

/// How many times more accesses look in vain until it is asked again whether the mirror is for
/// them, if it was not.
const PATIENCE: u64 = 64;
/// How many hot loops may wait for it one after the other: some milliseconds.
const MOST_WAITS: u32 = 128;

impl Origin {
    /// What `operand` is made from.
    pub(super) fn of(operand: &Op) -> Self {
        let Op { base, index, scale, .. } = *operand;
        Self { base, index, scale: scale & 3, narrow: operand.addr_mask != u64::MAX }
    }
}

impl Block<'_> {
    /// Checks what `group` has by the mirror; `slow`, which was put behind the rest just now, is
    /// for what cannot be accessed in place at all.
    pub(super) fn check_mirrored(
        &mut self,
        op: &Op,
        operand: &Op,
        group: &Group,
        at: i64,
        slow: Label,
    ) -> Result<Place, NotCopied> {
        let (look, found) = (self.code.label(), self.code.label());
        let before = self.cold.len().saturating_sub(1);
        let landing =
            if group.is_shared() { self.interpreted_apart(op, Some(group.place)) } else { slow };
        let what = Cold::Look { group: self.groups.add(*group), found, slow };
        let homes = self.code.homes;
        self.cold.insert(before, Apart { at: look, fix: Fix::None, homes, note: None, what });
        self.code.aligned(group, slow)?;
        self.code.in_mirror(group, look)?;
        self.code.bind(found);
        self.code.point(group)?;
        self.landing = Some(landing);
        let displacement = operand.disp as i64;
        let (origin, shared) = (group.origin, group.is_shared());
        let from = self.code.register_of(origin, shared);
        let place = |(index, factor)| Place::from(index, factor, displacement);
        Ok(from.map_or(Place::at(at), place))
    }

    /// What comes next may fault, if it is an access through the mirror.
    pub(super) fn may_fault(&mut self) {
        if let Some(landing) = self.landing.take() {
            self.landings.push((self.code.len(), landing));
        }
    }

    /// Where all accesses through the mirror land. `None` for one if there is too much code.
    pub(super) fn landings_by_place(&self) -> impl Iterator<Item = Option<Landing>> {
        self.landings.iter().map(|(at, label)| {
            let to = self.code.place_of(*label)?;
            Some(Landing { at: u16::try_from(*at).ok()?, to: u16::try_from(to).ok()? })
        })
    }
}

impl Assembler {
    /// The host register, and how often, that addresses from `origin` have besides what is kept
    /// of it: an only one if others share that.
    pub(super) fn register_of(
        &self,
        origin: Origin,
        shared: bool,
    ) -> Option<(iced_x86::Register, u32)> {
        let Origin { base, index, scale, narrow } = origin;
        let (number, factor) = match (base, index) {
            _ if narrow => return None,
            (base, GPR_ZERO) => (base, 1),
            (GPR_ZERO, index) => (index, 1 << scale),
            (base, index) if !shared && matches!(self.homes.of(base), Home::Host(_)) => {
                (index, 1 << scale)
            }
            _ => return None,
        };
        match self.homes.of(number) {
            Home::Host(host) => Some((host, factor)),
            Home::Memory => None,
        }
    }

    /// As [`Assembler::point`], where a register is left for the accesses themselves. Says
    /// whether it is.
    pub(super) fn point_by_register(&mut self, group: &Group) -> Result<bool, NotCopied> {
        let (origin, shared) = (group.origin, group.is_shared());
        if self.register_of(origin, shared).is_none() {
            return Ok(false);
        }
        if shared {
            self.store(fields::shared(group.place), ADDRESS);
        } else if origin.index != GPR_ZERO
            && origin.base != GPR_ZERO
            && let Home::Host(base) = self.homes.of(origin.base)
        {
            self.lea(ADDRESS, ADDRESS, base, 1, 0)?;
        }
        Ok(true)
    }

    /// Leaves in [`ADDRESS`] what makes addresses in the mirror of all addresses in `group`, or
    /// goes to `look`. Uses [`VALUE`].
    ///
    /// # Errors
    /// As [`Assembler::check_group`].
    pub(super) fn in_mirror(&mut self, group: &Group, look: Label) -> Result<(), NotCopied> {
        self.sum(VALUE, group.origin, group.first)?;
        // shr rax, 40
        self.bytes(&[0x48, 0xc1, 0xe8, SPAN_SHIFT as u8]);
        self.add(VALUE, fields::MIRROR);
        // cmp byte [rax], 0
        self.bytes(&[0x80, 0x38, 0x00]);
        self.jump_if(Condition::EQUAL, look);
        self.load(ADDRESS, fields::MIRROR_DISTANCE);
        Ok(())
    }

    /// Looks into the TLB for `group`, and goes on where that is `found`, or to `slow`.
    ///
    /// # Errors
    /// As [`Assembler::check_group`].
    pub(super) fn look_for(
        &mut self,
        group: &Group,
        found: Label,
        slow: Label,
    ) -> Result<(), NotCopied> {
        if group.is_wide() {
            // Only the mirror can have it: it is asked for at once.
            self.store_constant(fields::MIRROR_MISSES, -1);
        } else {
            self.count_down(fields::MIRROR_MISSES, slow);
        }
        self.find_group(group, slow)?;
        self.jump(found);
        Ok(())
    }
}

impl Vcpu {
    /// Has hot code look into the mirror, and the mirror serve it once so many accesses of one
    /// process have done so in vain, if the memory can be mapped again.
    pub(crate) fn prepare_mirror(&mut self, after: Option<u32>) {
        // Who is followed has its stores watched page by page, and its TLB emptied all the time.
        let possible = self.memory.shared().is_some() && self.lockstep.is_none();
        let Some(after) = after.filter(|_| possible) else { return };
        let Some(translator) = &self.translator else { return };
        let code = translator.code.bounds();
        self.context.mirror_patience = after.into();
        self.context.mirror_misses = after.into();
        self.mmu.mirror.prepare();
        faults::handle(code.start, code.end);
    }

    /// Whether accesses of the code at hand are to look into the mirror.
    pub(super) fn mirrors(&self) -> bool {
        self.mmu.is_user() && self.state.long_mode() && self.mmu.mirror.is_ready()
    }

    /// Whether a hot loop had better be found once more: the mirror may be the loop's in some
    /// milliseconds, and what needs it would be given up for good before that.
    pub(super) fn waits_for_mirror(&mut self) -> bool {
        let space = self.mmu.data.space(View::User);
        let waits = self.mirrors()
            && self.context.mirror_waits < MOST_WAITS
            && !self.mmu.mirror.could_serve(space, host_tsc());
        self.context.mirror_waits =
            if waits { self.context.mirror_waits.saturating_add(1) } else { 0 };
        waits
    }

    /// Brings what translated code knows of the mirror up to date.
    #[inline]
    pub(super) fn sync_mirror(&mut self) {
        let user = self.mmu.view == View::User && !self.data_breakpoints_active();
        self.context.mirror = self.mmu.mirror.table(self.mmu.data.space(View::User), user);
        self.context.mirror_distance = self.mmu.mirror.distance();
    }

    /// A trace was left because what it checks at once lies in two pages. If it looks for that in
    /// the mirror, the next access that does so in vain is to say so, unless the answer was no lately.
    pub(super) fn note_split(&mut self) {
        let (begins, mirrors) = (self.context.split_at, self.mirrors());
        let mut mirrored = false;
        self.left_trace(|translator, of, from, here| {
            let at = SplitAt { rip: from, next: here, begins };
            mirrored = translator.split(of, at, mirrors, host_tsc());
        });
        if mirrored && self.context.mirror_misses <= self.context.mirror_patience {
            self.context.mirror_misses = u64::MAX;
        }
    }

    /// Accesses have looked into the mirror in vain, the last of them that of `op`.
    #[cold]
    pub(super) fn missed_mirror(&mut self, op: &Op) {
        let plain = op.flags.contains(OpFlags::MEM) && op.seg == SEG_FLAT;
        let possible = plain
            && self.mmu.view == View::User
            && self.lockstep.is_none()
            && !self.mmu.data.low_is_global()
            && !self.data_breakpoints_active();
        let space = self.mmu.data.space(View::User);
        let addr = op.effective(&self.state);
        let will = possible && self.mmu.mirror.wanted(space, addr, host_tsc());
        self.leave_if_retired();
        let patience = self.context.mirror_patience;
        self.context.mirror_misses =
            if will { patience } else { patience.saturating_mul(PATIENCE) };
    }

    /// Windows may have been given up: translated code that has ways into them is left behind
    /// the instruction that is interpreted now or next.
    fn leave_if_retired(&mut self) {
        self.code_hit |= self.mmu.mirror.has_retired();
    }

    /// An access of translated code to `host`, which is in the mirror if anywhere, has faulted.
    /// Says whether it can be tried again.
    pub(super) fn show_in_mirror(&mut self, host: u64, stores: bool) -> bool {
        let since = host_tsc();
        let shown = self.show_page(host, stores) && !self.mmu.mirror.has_retired();
        self.leave_if_retired();
        let counters = &mut self.mmu.mirror.counters;
        counters.faults = counters.faults.wrapping_add(1);
        counters.refused = counters.refused.wrapping_add(u64::from(!shown));
        self.mmu.mirror.spent(since);
        self.sync_mirror();
        shown
    }
}
