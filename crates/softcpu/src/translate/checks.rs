//! How a trace's accesses come by their checks: each for itself, first of a group that shares
//! one, or behind it ([`super::sharing`]); and where the interpreter goes on if one does not hold.

use super::access::{Access, Place};
use super::assembler::{Label, NotCopied};
use super::block::Block;
use super::cold::Cold;
use super::fields;
use super::flags::Flags;
use super::gs_pages::Distant;
use super::registers::ADDRESS;
use super::sharing::{Group, Origin, Share};
use crate::decode::op::Op;

impl Block<'_> {
    /// Checks the step's access, to `op`'s memory operand; the interpreter runs `op` where it
    /// does not hold, and goes on behind it (see [`Block::resume_here`]).
    pub(super) fn check(
        &mut self,
        op: &Op,
        operand: &Op,
        access: Access,
    ) -> Result<Place, NotCopied> {
        let place = self.check_with_value(op, operand, access)?;
        self.code.without_value(place)
    }

    /// As [`Block::check`], but where the access is may need what is in
    /// [`VALUE`](super::registers::VALUE).
    pub(super) fn check_with_value(
        &mut self,
        op: &Op,
        operand: &Op,
        access: Access,
    ) -> Result<Place, NotCopied> {
        if let Share::Follows { place, at, mirrored } = *self.share_of(self.step) {
            let from = self.code.register_of(Origin::of(operand), true);
            if mirrored && from.is_some() && self.is_weak(place) {
                self.lose_flags()?;
                (self.checked, self.in_address) = (true, None);
                let group = Group::alone(Origin::of(operand), operand.disp as i64, access);
                let slow = self.interpreted_apart(op, None);
                return self.check_mirrored(op, operand, &group, operand.disp as i64, slow);
            }
            let place = self.follow(place, at);
            if !mirrored {
                return Ok(place);
            }
            let landing = self.interpreted_apart(op, self.in_address);
            self.landing = Some(landing);
            let from = from.map(|(index, factor)| (index, factor, operand.disp as i64));
            return Ok(from.map_or(place, |(index, factor, at)| Place::from(index, factor, at)));
        }
        let operand = self.mode.operand(operand);
        self.lose_flags()?;
        self.checked = true;
        if let Share::Leads { group, at, moves } = *self.share_of(self.step) {
            let (resume, kept) = (self.code.label(), self.keep(op));
            let apart = if group.is_shared() {
                let (next, behind) = (op.next_rip(), self.groups.add(group.seen_from(moves)));
                Cold::Lead { op: kept, group: behind, next, resume, to_host: false }
            } else {
                Cold::Interpret { op: kept, resume, to_host: false, again: None }
            };
            let slow = self.apart(apart);
            self.in_address = group.is_shared().then_some(group.place);
            self.weak &= !(1 << (group.place & 15));
            if group.mirrored {
                return self.check_mirrored(op, &operand, &group, at, slow);
            }
            if let Some(stream) = group.stream {
                return self.check_stream(&group, stream, at, slow);
            }
            self.code.check_group(&group, slow)?;
            return Ok(Place::at(at));
        }
        self.in_address = None;
        let slow = self.interpreted_apart(op, None);
        if let Some(distant) = Distant::of(&operand, access) {
            return self.check_gs_page(&operand, distant, slow);
        }
        self.code.check(&operand, access, slow)
    }

    /// Whether an instruction has been interpreted in line since what is kept at `place` was
    /// checked. It has not changed the registers that accesses are made from, but nobody could
    /// tell from the code.
    fn is_weak(&self, place: u8) -> bool {
        self.weak & 1 << (place & 15) != 0
    }

    /// Where the interpreter runs `op` and goes on behind it, with what is kept at place `again`
    /// at hand.
    pub(super) fn interpreted_apart(&mut self, op: &Op, again: Option<u8>) -> Label {
        let (resume, kept) = (self.code.label(), self.keep(op));
        self.apart(Cold::Interpret { op: kept, resume, to_host: false, again })
    }

    /// The step's access is at a distance from what was checked before and is kept at `place`.
    fn follow(&mut self, place: u8, at: i64) -> Place {
        if self.in_address.replace(place) != Some(place) {
            self.code.load(ADDRESS, fields::shared(place));
        }
        self.checked = true;
        Place::at(at)
    }

    /// The instruction is done: what interpreted it goes on here.
    pub(super) fn resume_here(&mut self) {
        let share = self.shares.get(self.step).filter(|_| self.checked);
        if matches!(share, Some(Share::Follows { mirrored: false, .. })) {
            return;
        }
        let mirrored = matches!(share, Some(Share::Leads { group, .. }) if group.mirrored);
        let in_host = matches!(self.flags, Flags::Host | Flags::Both);
        // One that leads may have two of them, last.
        let mut two = false;
        for cold in self.cold.iter_mut().rev() {
            let (Cold::Interpret { resume, to_host, .. } | Cold::Lead { resume, to_host, .. }) =
                &mut cold.what
            else {
                break;
            };
            *to_host = in_host;
            self.code.bind(*resume);
            if two || !mirrored {
                break;
            }
            two = true;
        }
    }

    /// As [`Block::check`], for the instruction that ends the block.
    pub(super) fn check_last(
        &mut self,
        op: &Op,
        operand: &Op,
        access: Access,
    ) -> Result<Place, NotCopied> {
        if let Share::Follows { place, at, .. } = *self.share_of(self.step) {
            return Ok(self.follow(place, at));
        }
        let operand = self.mode.operand(operand);
        self.lose_flags()?;
        let at = self.last(op);
        self.code.check(&operand, access, at)
    }

    /// Where the last op is interpreted.
    pub(super) fn last(&mut self, op: &Op) -> Label {
        let op = self.keep(op);
        self.apart(Cold::Last { op })
    }
}
