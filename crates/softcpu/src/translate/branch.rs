//! Control flow: jumps inside a trace and out of it, calls and returns, and the looks for
//! events that every cycle of them has.

use iced_x86::{Code, Instruction, Mnemonic as M, Register as R};

use super::access::{Access, Place};
use super::assembler::{Condition, Label, NotCopied};
use super::block::{Apart, Block, Link};
use super::cold::{Cold, Fix};
use super::flags::Flags;
use super::registers::{ADDRESS, VALUE, of_word};
use super::relocate::Kind;
use super::returns::Way;
use super::stack::{RSP, StackUse, down, stack_operand};
use super::trace::Step;
use super::{copy, fields, jumps};
use crate::decode::op::Op;

impl Block<'_> {
    /// The trace goes on where `op` jumps to.
    pub(super) fn followed(&mut self, op: &Op) -> Result<(), NotCopied> {
        if op.imm <= op.rip { self.poll(op.imm) } else { Ok(()) }
    }

    /// The trace goes on behind a conditional jump or at its target, and leaves for `exit` if
    /// the condition holds (`taken`), or if it does not.
    pub(super) fn unless(
        &mut self,
        instruction: &Instruction,
        op: &Op,
        taken: bool,
        exit: u64,
    ) -> Result<(), NotCopied> {
        self.want_flags()?;
        let condition = Condition(copy::condition(instruction)?);
        let condition = if taken { condition } else { condition.negated() };
        if let Some(head) = self.heads.get(exit)
            && exit > op.rip
            && (self.flags == Flags::Both || !head.wants_flags)
        {
            let label = head.label;
            self.code.jump_if(condition, label);
        } else if self.heads.has(exit) {
            // A loop: this is the likely way.
            let onwards = self.code.label();
            self.code.jump_if(condition.negated(), onwards);
            let (flags, producer) = (self.flags, self.producer);
            self.edge(exit)?;
            (self.flags, self.producer) = (flags, producer);
            self.code.bind(onwards);
        } else {
            let at = self.code.label();
            let (flags, producer, from) = (self.flags, self.producer, op.rip);
            let what = Cold::Exit { target: exit, from, flags, producer };
            let homes = self.code.homes;
            self.cold.push_back(Apart { at, fix: Fix::None, homes, note: None, what });
            self.code.jump_if(condition, at);
        }
        if !taken && op.imm <= op.rip { self.poll(op.imm) } else { Ok(()) }
    }

    pub(super) fn branch(&mut self, step: &Step, op: &Op) -> Result<(), NotCopied> {
        let instruction = &step.instruction;
        self.save_flags()?;
        self.code.give_back();
        let segment = self.segment;
        let reaches = |rip| segment.reaches(rip);
        match (instruction.code(), step.shape.stack()) {
            (_, Some((StackUse::Call, word))) if reaches(op.imm) && reaches(op.next_rip()) => {
                let to = stack_operand(self.mode, op, RSP, down(word));
                let place = self.check_last(op, &to, Access::store(word))?;
                self.push_return(op, place, word)?;
                self.edge_by(op.imm, Way::Call(op.next_rip()))
            }
            (_, Some((StackUse::Return, word))) => {
                let from = stack_operand(self.mode, op, RSP, 0);
                let place = self.check_last(op, &from, Access::load(word))?;
                self.load_word(place, word)?;
                self.go_back(op, i64::from(word).wrapping_add(op.imm as i64))
            }
            (Code::Jmp_rm64 | Code::Jmp_rm32 | Code::Jmp_rm16, _) => {
                self.target(instruction, op)?;
                let miss = self.last(op);
                self.find(miss);
                self.go(Way::Jump)
            }
            (Code::Call_rm64 | Code::Call_rm32 | Code::Call_rm16, _) if reaches(op.next_rip()) => {
                let word = op.size;
                let to = stack_operand(self.mode, op, RSP, down(word));
                self.target(instruction, op)?;
                let unusual = self.last(op);
                if word == 8 {
                    self.code.canonical_only(unusual);
                }
                self.code.store(fields::SPARE, VALUE);
                let place = self.code.check(&to, Access::store(word), unusual)?;
                self.push_return(op, place, word)?;
                self.code.load(VALUE, fields::SPARE);
                let miss = self.apart(Cold::LeaveByKey);
                let way = Way::Call(op.next_rip());
                self.make_room(way);
                self.find(miss);
                self.go(way)
            }
            _ if matches!(instruction.mnemonic(), M::Loop | M::Jcxz | M::Jecxz | M::Jrcxz)
                && reaches(op.imm) =>
            {
                self.by_counter(instruction.mnemonic() == M::Loop, op)
            }
            _ => Err(NotCopied),
        }
    }

    /// Jumps where RCX, or as much of it as `op` has for a counter, is zero; or, if it `counts`,
    /// takes one off and jumps where it is not.
    fn by_counter(&mut self, counts: bool, op: &Op) -> Result<(), NotCopied> {
        self.lose_flags()?;
        let (word, test) = match op.addr_mask {
            0xffff => (2, Code::Test_rm16_r16),
            0xffff_ffff => (4, Code::Test_rm32_r32),
            _ => (8, Code::Test_rm64_r64),
        };
        let counter = of_word(R::RCX, word);
        let stays = if counts { Condition::EQUAL } else { Condition::NOT_EQUAL };
        if counts {
            self.code.lea(counter, R::RCX, R::None, 1, -1)?;
        }
        let test = Instruction::with2(test, counter, counter);
        self.code.emit(&test.map_err(|_| NotCopied)?)?;
        let onwards = self.code.label();
        self.code.jump_if(stays, onwards);
        let before = (self.flags, self.producer, self.code.homes);
        self.edge(op.imm)?;
        (self.flags, self.producer, self.code.homes) = before;
        self.code.bind(onwards);
        self.edge(op.next_rip())
    }

    /// `op`, a call, puts where it is returned to at `place`, which has been checked.
    fn push_return(&mut self, op: &Op, place: Place, word: u8) -> Result<(), NotCopied> {
        self.code.guest_address(VALUE, op.next_rip());
        self.code.store_at(place, of_word(VALUE, word))?;
        self.move_stack(down(word))
    }

    /// The target of an indirect branch in [`VALUE`].
    fn target(&mut self, instruction: &Instruction, op: &Op) -> Result<(), NotCopied> {
        if instruction.op0_kind() == iced_x86::OpKind::Register {
            self.lose_flags()?;
            self.code.fetch(VALUE, instruction.op0_register().number() as u8);
            match op.size {
                2 => self.code.copy_lowest(VALUE),
                4 => self.code.copy_low(VALUE, VALUE),
                _ => {}
            }
            Ok(())
        } else {
            let place = self.check_last(op, op, Access::load(op.size))?;
            self.load_word(place, op.size)
        }
    }

    /// Looks for the block at [`VALUE`]: its slot is in [`super::registers::ADDRESS`] if there is one.
    pub(super) fn find(&mut self, miss: Label) {
        // mov r13d, eax; shr r13d, 10; xor r13d, eax; and r13d, mask: entries have two words
        self.code.bytes(&[0x41, 0x89, 0xc5, 0x41, 0xc1, 0xed, 10, 0x41, 0x31, 0xc5]);
        self.code.bytes(&[0x41, 0x81, 0xe5]);
        self.code.bytes(&jumps::MASK.to_le_bytes());
        self.code.xor(VALUE, fields::JUMP_CONTEXT);
        // cmp rax, gs:[r13 * 8 + keys]
        self.code.bytes(&[0x65, 0x4a, 0x3b, 0x04, 0xed]);
        self.code.bytes(&fields::JUMP_KEYS.0.to_le_bytes());
        self.code.jump_if(Condition::NOT_EQUAL, miss);
    }

    /// Goes to the block whose slot is in [`super::registers::ADDRESS`], or leaves there. There
    /// is room if that is by a call.
    pub(super) fn go(&mut self, way: Way) -> Result<(), NotCopied> {
        let at = self.apart(Cold::LeaveBySlot);
        self.look_for_events(at);
        self.note(way);
        // jmp or call gs:[r13 * 8 + hosts]
        self.code.bytes(&[0x65, 0x42, 0xff, way.mod_rm(), 0xed]);
        self.code.bytes(&fields::JUMP_HOSTS.0.to_le_bytes());
        self.land(way)
    }

    /// Goes on at `target`.
    pub(super) fn edge(&mut self, target: u64) -> Result<(), NotCopied> {
        self.edge_by(target, Way::Jump)
    }

    /// Goes on at `target`, by a jump or a call.
    fn edge_by(&mut self, target: u64, way: Way) -> Result<(), NotCopied> {
        if let Some(head) = self.heads.get(target) {
            if head.wants_flags {
                self.save_flags()?;
            }
            if target <= self.here {
                self.poll(target)?;
            }
            self.make_room(way);
            if self.code.homes != self.lent {
                // A call, of what the trace jumps to as well, has given registers back.
                self.code.lend(self.lent);
            }
            self.note(way);
            self.code.jump_or_call(head.label, way);
            return self.land(way);
        }
        self.save_flags()?;
        self.code.give_back();
        if target <= self.here {
            self.poll(target)?;
        }
        if let Way::Call(_) = way {
            self.lose_flags()?;
        }
        self.make_room(way);
        self.outwards(target, way)
    }

    /// Goes on at `target` in a block of its own: flags are in the context, and registers at home.
    pub(super) fn outwards(&mut self, target: u64, way: Way) -> Result<(), NotCopied> {
        if self.segment.in_one_page(target, self.rip)
            && jumps::second_page(self.segment.linear(target)).is_none()
        {
            // The mapping under this block is all of the target's too.
            let number = self.first_link.wrapping_add(self.links.len() as u32);
            let at = self.code.label();
            let before = self.code.len();
            self.note(way);
            let noting = self.code.len().saturating_sub(before);
            self.code.take_back(before);
            self.code.align_distance(noting);
            self.note(way);
            self.code.jump_or_call(at, way);
            self.links.push(Link { at: self.code.len().saturating_sub(4), target });
            let (homes, what) = (self.code.homes, Cold::Link { number });
            self.cold.push_back(Apart { at, fix: Fix::None, homes, note: None, what });
        } else {
            let (key, host) = fields::jump_entry(target);
            self.lose_flags()?;
            if let Way::Call(back) = way {
                self.code.guest_address(ADDRESS, back);
            }
            self.code.guest_address(VALUE, target);
            self.code.xor(VALUE, fields::JUMP_CONTEXT);
            self.code.compare(VALUE, key);
            self.code.depends(Kind::Jump);
            let miss = self.apart(Cold::Leave { rip: target });
            self.code.jump_if(Condition::NOT_EQUAL, miss);
            // jmp or call gs:[host]
            if let Way::Call(_) = way {
                self.code.push_address();
            }
            self.code.bytes(&[0x65, 0xff, way.mod_rm(), 0x25]);
            self.code.bytes(&host.0.to_le_bytes());
            self.code.depends(Kind::Jump);
        }
        self.land(way)
    }

    /// Leaves with RIP at `rip` if an event is waiting. Every cycle of blocks has a jump
    /// backwards or an indirect one, and those come by here.
    fn poll(&mut self, rip: u64) -> Result<(), NotCopied> {
        if self.flags == Flags::Host && self.producer.is_some() {
            self.flags = Flags::Deferred;
        }
        self.lose_flags()?;
        if self.segment.in_one_page(rip, self.rip) {
            self.count_turn(rip);
        }
        let at = self.apart(Cold::Leave { rip });
        self.look_for_events(at);
        Ok(())
    }

    /// Counts a turn of the loop at `rip`, unless it is known to be hot: one in so many is a
    /// sample, and what is found then is likely hot. Flags are lost.
    fn count_turn(&mut self, rip: u64) {
        if self.manner.hot {
            return;
        }
        // dec qword [heat]
        self.code.bytes(&[0x65, 0x48, 0xff, 0x0c, 0x25]);
        self.code.bytes(&fields::HEAT.0.to_le_bytes());
        let hot = self.apart(Cold::Hot { rip });
        self.code.jump_if(Condition::EQUAL, hot);
    }

    /// Goes to `at` if an event is waiting. Uses [`VALUE`].
    pub(super) fn look_for_events(&mut self, at: Label) {
        self.code.load(VALUE, fields::EVENTS);
        // mov eax, [rax]; test [event_mask], eax
        self.code.bytes(&[0x8b, 0x00, 0x65, 0x85, 0x04, 0x25]);
        self.code.bytes(&fields::EVENT_MASK.0.to_le_bytes());
        self.code.jump_if(Condition::NOT_EQUAL, at);
    }
}
