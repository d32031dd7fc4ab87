//! Returns, predicted by the host: a call leaves where it comes from on the host's stack, as a
//! pair of the guest's address and, by a host's call, the code for it. A return that goes to the
//! address on top is one by the host too, whose predictor knows it. Any other is looked for in
//! the jump cache, and those that were noted are forgotten: the guest has changed stacks, or
//! jumped out of calls.
//!
//! The pairs hold for as long as translated code runs and nothing else happens. Whatever goes
//! elsewhere (an exit, an exception, a change of the address space) drops them, so neither
//! evicting code nor another mapping can leave one behind that is wrong. At the bottom lies one
//! that stands for no call, and leads to the jump cache.

use iced_x86::Register as R;

use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::block::{Apart, Block};
use super::cold::{Cold, Fix};
use super::fields;
use super::registers::VALUE;
use crate::decode::op::Op;

/// Calls that are noted: more than predictors know. Each takes 16 bytes of the host's stack.
pub(super) const DEPTH: u32 = 256;

/// How control goes elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Jump,
    /// By a call, which is returned from to this address.
    Call(u64),
}

impl Way {
    /// The ModRM byte of `jmp` or `call` by an address in memory that has a SIB byte.
    pub(super) fn mod_rm(self) -> u8 {
        match self {
            Self::Jump => 0x24,
            Self::Call(_) => 0x14,
        }
    }
}

impl Assembler {
    /// Forgets all calls that were noted.
    pub(super) fn forget_calls(&mut self) {
        self.load(R::RSP, fields::HOST_STACK);
    }

    /// `push rax`
    pub(super) fn push_value(&mut self) {
        self.bytes(&[0x50]);
    }

    /// `push r13`
    pub(super) fn push_address(&mut self) {
        self.bytes(&[0x41, 0x55]);
    }

    /// Jumps to `label`, or calls it, which must have been noted: the distance is what is written
    /// last.
    pub(super) fn jump_or_call(&mut self, label: Label, way: Way) {
        match way {
            Way::Jump => self.jump(label),
            Way::Call(_) => self.call_label(label),
        }
    }

    /// The guest's address of the last call that was noted, in [`VALUE`].
    pub(super) fn last_call(&mut self) {
        // mov rax, [rsp + 8]
        self.bytes(&[0x48, 0x8b, 0x44, 0x24, 0x08]);
    }

    /// Compares [`VALUE`] with it.
    fn compare_with_last_call(&mut self) {
        // cmp rax, [rsp + 8]
        self.bytes(&[0x48, 0x3b, 0x44, 0x24, 0x08]);
    }

    /// Returns from it.
    fn return_from_last_call(&mut self) {
        // ret 8
        self.bytes(&[0xc2, 0x08, 0x00]);
    }
}

impl Block<'_> {
    /// If it is by a call, that is about to be noted: makes sure that there is room. Flags are
    /// lost then.
    pub(super) fn make_room(&mut self, way: Way) {
        let Way::Call(_) = way else { return };
        let (full, resume) = (self.code.label(), self.code.label());
        let homes = self.code.homes;
        self.cold.push_back(Apart {
            at: full,
            fix: Fix::None,
            homes,
            note: None,
            what: Cold::ForgetCalls { resume },
        });
        self.code.compare(R::RSP, fields::STACK_LIMIT);
        self.code.jump_if(Condition::BELOW, full);
        self.code.bind(resume);
    }

    /// If it was by a call, that is returned from to here, and goes on outwards, because what the
    /// trace knows may not hold any more.
    pub(super) fn land(&mut self, way: Way) -> Result<(), NotCopied> {
        let Way::Call(back) = way else { return Ok(()) };
        let homes = std::mem::take(&mut self.code.homes);
        self.outwards(back, Way::Jump)?;
        self.code.homes = homes;
        Ok(())
    }

    /// Returns, as `op` does, to the address in [`VALUE`]. The stack pointer is moved by `by`.
    pub(super) fn go_back(&mut self, op: &Op, by: i64) -> Result<(), NotCopied> {
        let kept = self.keep(op);
        let unknown = self.apart(Cold::Unforeseen { op: kept, by });
        self.code.compare_with_last_call();
        self.code.jump_if(Condition::NOT_EQUAL, unknown);
        self.move_stack(by)?;
        let event = self.apart(Cold::LeaveByReturn);
        self.look_for_events(event);
        self.code.return_from_last_call();
        Ok(())
    }

    /// The same for an address that no call was noted for.
    pub(super) fn go_back_anyhow(&mut self, op: u64, by: i64) -> Result<(), NotCopied> {
        self.code.forget_calls();
        let miss = self.apart(Cold::Last { op });
        self.find(miss);
        self.move_stack(by)?;
        self.go(Way::Jump)
    }

    /// If it is by a call, notes where that is returned from to; the host's call must follow.
    pub(super) fn note(&mut self, way: Way) {
        if let Way::Call(back) = way {
            self.code.guest_address(VALUE, back);
            self.code.push_value();
        }
    }
}

#[cfg(test)]
mod tests;
