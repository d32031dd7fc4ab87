//! Where a block may go: on within itself, to a thunk, or to what the jump cache has.

use foldhash::HashSet;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register as R};

use super::Look;
use super::known::Known;
use crate::translate::fields::{self, Field};
use crate::translate::jumps::{ENTRIES, Jump};

impl Look<'_> {
    /// A call.
    pub(super) fn call(
        &mut self,
        it: &Instruction,
        starts: &HashSet<u64>,
    ) -> Result<(), &'static str> {
        let target = it.near_branch_target();
        if std::mem::take(&mut self.pushed) {
            // It is noted for a return.
            return self.branch(it, starts);
        }
        let thunks = [
            self.thunks.interpret,
            self.thunks.interpret_last,
            self.thunks.load_vectors,
            self.thunks.load_x87,
        ];
        self.forget();
        if target == self.thunks.interpret {
            self.pointers = self.stubs.interpreted(self.pointers);
        }
        let known = thunks.contains(&target) || self.thunks.strings.has(target);
        if known { Ok(()) } else { Err("a call of what is no thunk") }
    }

    /// A jump.
    pub(super) fn branch(
        &mut self,
        it: &Instruction,
        starts: &HashSet<u64>,
    ) -> Result<(), &'static str> {
        let target = it.near_branch_target();
        let leaves = [
            self.thunks.leave_at,
            self.thunks.leave_by_link,
            self.thunks.leave_to_interpret,
            self.thunks.leave_closed,
            self.thunks.leave_split,
            self.thunks.leave_hot,
        ];
        let jump = !it.is_jcc_short_or_near();
        let inside = self.range.contains(&target) && starts.contains(&target);
        if !(inside || jump && leaves.contains(&target)) {
            return Err("a branch out of the block");
        }
        if self.address == Known::Slot {
            self.slots.insert(target);
        }
        self.units.branch(it);
        // What does not hold goes elsewhere; here it has held.
        if it.mnemonic() == M::Jne
            && let Some(shown) = self.compared.take()
        {
            self.shown = Some(shown);
        }
        let asked = self.asked.take();
        self.mirrored = asked.filter(|_| it.mnemonic() == M::Je);
        if jump {
            self.forget();
        }
        Ok(())
    }
}

/// Whether the memory operand of `it` is code that the jump cache has.
pub(super) fn is_entry_of_the_jump_cache(it: &Instruction) -> bool {
    let Field(hosts) = fields::JUMP_HOSTS;
    let entry = size_of::<Jump>() as u64;
    let end = u64::from(hosts).saturating_add(entry.saturating_mul(ENTRIES as u64));
    let at = it.memory_displacement64();
    it.op0_kind() == OpKind::Memory
        && it.memory_segment() == R::GS
        && it.memory_base() == R::None
        && match it.memory_index() {
            R::None => {
                (u64::from(hosts)..end).contains(&at)
                    && at.wrapping_sub(u64::from(hosts)).is_multiple_of(entry)
            }
            _ => at == u64::from(hosts),
        }
}
