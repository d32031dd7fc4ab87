//! `pushfq` and `popfq`: the flags register as a word in memory.
//!
//! While translated code runs, the status flags are in the host's flags or the context, as
//! `lahf` and `seto` leave them, and all others in the state. The word is put together from
//! both, and taken apart. A `popfq` that changes a flag which something else follows from
//! (IF, TF, AC, IOPL) is the interpreter's.

use super::access::Access;
use super::assembler::{Assembler, Condition, NotCopied};
use super::block::Block;
use super::fields;
use super::flags::Flags;
use super::registers::{GprSet, VALUE};
use super::stack::{RSP, stack_operand};
use crate::decode::op::Op;
use crate::state::rflags::RFlags;
use crate::system::flags::FOLLOWED;

/// Status flags in the low byte, where AH has them.
const LOW: u8 = RFlags::STATUS.bits() as u8;

impl Block<'_> {
    /// `pushfq`.
    pub(super) fn push_flags(&mut self, op: &Op) -> Result<(), NotCopied> {
        self.save_flags()?;
        let to = stack_operand(self.mode, op, RSP, -8);
        let place = self.check(op, &to, Access::store(8))?;
        self.flags = Flags::Context;
        self.producer = None;
        self.code.flags_word();
        self.code.store_at(place, VALUE)?;
        self.overwrite(GprSet::of(RSP))?;
        self.move_stack(-8)?;
        self.resume_here();
        Ok(())
    }

    /// `popfq`.
    pub(super) fn pop_flags(&mut self, op: &Op) -> Result<(), NotCopied> {
        let detour = self.detour(op)?;
        let from = stack_operand(self.mode, op, RSP, 0);
        let place = self.check(op, &from, Access::load(8))?;
        self.code.load_at(VALUE, place)?;
        self.code.store(fields::SPARE, VALUE);
        self.code.xor(VALUE, fields::RFLAGS);
        // test eax, followed
        self.code.bytes(&[0xa9]);
        self.code.bytes(&(FOLLOWED.bits() as u32).to_le_bytes());
        self.code.jump_if(Condition::NOT_EQUAL, detour.unusual);
        self.code.take_flags_word();
        self.flags = Flags::Context;
        self.producer = None;
        self.overwrite(GprSet::of(RSP))?;
        self.move_stack(8)?;
        self.resume_here();
        self.rejoin(detour);
        Ok(())
    }
}

impl Assembler {
    /// The flags as a word in [`VALUE`]; those that are status are in the context.
    fn flags_word(&mut self) {
        // movzx eax, word [flags]; rol ax, 8; shl ah, 3
        self.bytes(&[0x65, 0x0f, 0xb7, 0x04, 0x25]);
        self.bytes(&fields::FLAGS.0.to_le_bytes());
        self.bytes(&[0x66, 0xc1, 0xc0, 8, 0xc0, 0xe4, 3]);
        self.store(fields::SPARE, VALUE);
        self.load(VALUE, fields::RFLAGS);
        // and eax, what the word has of it
        self.bytes(&[0x25]);
        let others = RFlags::all().difference(RFlags::STATUS | RFlags::RF | RFlags::VM);
        self.bytes(&(others.bits() as u32).to_le_bytes());
        self.or(VALUE, fields::SPARE);
    }

    /// Takes the flags from the word in the context's spare field, of which [`VALUE`] has what
    /// is changed by it.
    fn take_flags_word(&mut self) {
        // and eax, what may be changed
        self.bytes(&[0x25]);
        let free = RFlags::DF | RFlags::NT | RFlags::ID;
        self.bytes(&(free.bits() as u32).to_le_bytes());
        self.xor_field(fields::RFLAGS, VALUE);
        self.and_field(fields::RFLAGS, !RFlags::RF.bits());
        self.load(VALUE, fields::SPARE);
        // ror ax, 8; shr al, 3; and al, 1; and ah, low; or ah, fixed; mov [flags], ax
        self.bytes(&[0x66, 0xc1, 0xc8, 8, 0xc0, 0xe8, 3, 0x24, 1, 0x80, 0xe4, LOW]);
        self.bytes(&[0x80, 0xcc, RFlags::FIXED.bits() as u8, 0x65, 0x66, 0x89, 0x04, 0x25]);
        self.bytes(&fields::FLAGS.0.to_le_bytes());
    }
}
