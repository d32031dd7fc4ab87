//! How a trace's accesses come by their checks: each for itself, first of a group that shares
//! one, or behind it ([`super::sharing`]); and where the interpreter goes on if one does not hold.

use super::access::{Access, Place};
use super::assembler::{Label, NotCopied};
use super::block::{Apart, Block};
use super::cold::Cold;
use super::fields;
use super::flags::Flags;
use super::registers::ADDRESS;
use super::sharing::Share;
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
        let share = self.share_of(self.step);
        if let Share::Follows { place, at } = share {
            return Ok(self.follow(place, at));
        }
        let operand = self.mode.operand(operand);
        self.lose_flags()?;
        self.checked = Some(share);
        let resume = self.code.label();
        let kept = self.keep(op);
        if let Share::Leads { group, at, moves } = share {
            let (next, group_behind) = (op.next_rip(), group.seen_from(moves));
            let slow = self.apart(if group.is_shared() {
                Cold::Lead { op: kept, group: group_behind, next, resume, to_host: false }
            } else {
                Cold::Interpret { op: kept, resume, to_host: false }
            });
            match group.stream {
                Some(stream) => self.check_stream(&group, stream, slow)?,
                None => self.code.check_group(&group, slow)?,
            }
            self.in_address = group.is_shared().then_some(group.place);
            return Ok(Place::at(at));
        }
        self.in_address = None;
        let slow = self.apart(Cold::Interpret { op: kept, resume, to_host: false });
        self.code.check(&operand, access, slow)
    }

    /// The step's access is at a distance from what was checked before.
    fn follow(&mut self, place: u8, at: i64) -> Place {
        if self.in_address.replace(place) != Some(place) {
            self.code.load(ADDRESS, fields::shared(place));
        }
        self.checked = Some(Share::Follows { place, at });
        Place::at(at)
    }

    /// The instruction is done: what interpreted it goes on here.
    pub(super) fn resume_here(&mut self) {
        if matches!(self.checked, Some(Share::Follows { .. })) {
            return;
        }
        let in_host = matches!(self.flags, Flags::Host | Flags::Both);
        if let Some(Apart {
            what: Cold::Interpret { resume, to_host, .. } | Cold::Lead { resume, to_host, .. },
            ..
        }) = self.cold.back_mut()
        {
            *to_host = in_host;
            let resume = *resume;
            self.code.bind(resume);
        }
    }

    /// As [`Block::check`], for the instruction that ends the block.
    pub(super) fn check_last(
        &mut self,
        op: &Op,
        operand: &Op,
        access: Access,
    ) -> Result<Place, NotCopied> {
        if let Share::Follows { place, at } = self.share_of(self.step) {
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
