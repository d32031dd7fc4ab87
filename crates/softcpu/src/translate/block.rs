//! From a decoded block to host code.
//!
//! Each instruction is copied where that can be ([`super::copy`]), rewritten where it is
//! control flow or works on the stack, and handed to the interpreter otherwise. Between
//! blocks the guest's status flags are in the context; within one they are in the host's
//! flags for as long as nothing (a TLB check, above all) destroys them.

use std::collections::{HashMap, VecDeque};

use iced_x86::{Code, Instruction, Register as R};

use super::access::{Access, Place};
use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::cold::{Cold, Fix, keep_flags, load_flags, require};
use super::copy::{self, FlagUse};
use super::fields;
use super::flags::{Flags, Producer};
use super::jumps;
use super::registers::{ADDRESS, Home, STACK, VALUE, home, part};
use super::thunks::Thunks;
use super::trace::{Step, Then, Trace};
use crate::addr::{GuestVirtAddr, PAGE_SHIFT};
use crate::decode::op::Op;
use crate::state::{GPR_ZERO, SEG_FLAT};

/// RSP's number.
const RSP: u8 = 4;
const RBP: u8 = 5;

/// A jump that can be made to go straight to another block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    /// Where in the block's code its distance is.
    pub(super) at: usize,
    /// Where it goes.
    pub(super) target: u64,
}

/// What came of a trace.
#[derive(Debug)]
pub(super) struct Translated {
    pub(super) code: Vec<u8>,
    /// Numbered from the first number given to [`translate`].
    pub(super) links: Vec<Link>,
    /// Where code is that leaves to look the block up again.
    pub(super) way_out: usize,
}

/// Code that is rarely run, and lies behind the rest.
#[derive(Clone, Copy, Debug)]
struct Apart {
    at: Label,
    /// What is done about flags first.
    fix: Fix,
    what: Cold,
}

/// A place that the trace jumps back to.
#[derive(Clone, Copy, Debug)]
struct Head {
    label: Label,
    /// Whether the context must have the flags there.
    wants_flags: bool,
}

/// One trace on its way.
pub(super) struct Block<'a> {
    pub(super) code: Assembler,
    flags: Flags,
    /// What can make the flags again.
    producer: Option<Producer>,
    thunks: &'a Thunks,
    cold: VecDeque<Apart>,
    links: Vec<Link>,
    first_link: u32,
    /// Where it begins.
    rip: u64,
    /// The step that is being translated, and where it is in the guest's code.
    step: usize,
    here: u64,
    /// What the steps do to flags and registers.
    effects: Vec<Effects>,
    heads: HashMap<u64, Head>,
}

/// What translating a step may do to flags and registers.
#[derive(Clone, Copy, Debug)]
struct Effects {
    /// It must find the flags as they are: it reads them, or may fault or leave.
    wants: bool,
    /// It makes all of them.
    makes: bool,
    /// Guest registers it changes, a bit each.
    writes: u16,
}

impl Effects {
    const ANYTHING: Self = Self { wants: true, makes: false, writes: u16::MAX };

    fn of(step: &Step) -> Self {
        let bit = |register: R| 1_u16 << (register.full_register().number() & 15);
        let stack = 1 << RSP;
        let it = &step.instruction;
        let leaves = Self { wants: true, makes: false, writes: stack };
        match (step.then, it.code()) {
            // One backwards looks for events, and may leave.
            (Then::Followed, _) => {
                Self { wants: it.near_branch_target() <= it.ip(), writes: 0, ..leaves }
            }
            (Then::Unless { .. }, _) => Self { writes: 0, ..Self::ANYTHING },
            (Then::Last, _) => Self::ANYTHING,
            (Then::Next, Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32) => leaves,
            (Then::Next, Code::Pop_r64) => {
                Self { writes: stack | bit(it.op0_register()), ..leaves }
            }
            (Then::Next, Code::Leaveq) => Self { writes: stack | 1 << RBP, ..leaves },
            (Then::Next, Code::Lea_r64_m | Code::Lea_r32_m) => {
                Self { wants: false, writes: bit(it.op0_register()), ..leaves }
            }
            (Then::Next, Code::VEX_Vzeroupper) => Self { wants: false, writes: 0, ..leaves },
            (Then::Next, _) if copy::is_nothing(it) => Self { wants: false, writes: 0, ..leaves },
            (Then::Next, _) => match &step.plan {
                None => Self::ANYTHING,
                Some(plan) => {
                    let flags = FlagUse::of(plan);
                    Self {
                        wants: flags.wants || plan.size != 0,
                        makes: flags.changes && !flags.wants,
                        writes: copy::written(plan),
                    }
                }
            },
        }
    }
}

/// Translates `trace` for code memory at `base`. Links get numbers from `first_link`.
///
/// # Errors
/// None, unless the assembler is wrong.
pub(super) fn translate(
    trace: &Trace,
    thunks: &Thunks,
    base: u64,
    first_link: u32,
) -> Result<Translated, NotCopied> {
    let rip = trace.ops.first().map_or(0, |op| op.rip);
    let mut block = Block {
        code: Assembler::new(base),
        flags: Flags::Context,
        producer: None,
        thunks,
        cold: VecDeque::new(),
        links: Vec::new(),
        first_link,
        rip,
        step: 0,
        here: rip,
        effects: trace.steps.iter().map(Effects::of).collect(),
        heads: HashMap::new(),
    };
    block.find_heads(trace);
    let need = trace
        .steps
        .iter()
        .fold(0, |need, step| need | copy::vector_need(&step.instruction, &step.plan));
    if need != 0 {
        block.vectors(need);
    }
    let mut open = true;
    for (n, (step, op)) in trace.steps.iter().zip(&trace.ops).enumerate() {
        (block.step, block.here) = (n, op.rip);
        block.arrive(op.rip)?;
        let before = (block.code.len(), block.flags, block.producer, block.cold.len());
        let done = match step.then {
            Then::Next => block.next(step, op),
            Then::Followed => block.followed(op),
            Then::Unless { taken, exit } => block.unless(&step.instruction, op, taken, exit),
            Then::Last => block.branch(&step.instruction, op),
        };
        open = step.then != Then::Last;
        if done.is_err() {
            block.code.take_back(before.0);
            (block.flags, block.producer) = (before.1, before.2);
            block.cold.truncate(before.3);
            match step.then {
                Then::Next => block.interpret(op)?,
                // It says itself where it goes on.
                _ => {
                    block.interpret_last(op)?;
                    open = false;
                    break;
                }
            }
        }
    }
    if open {
        let last = trace.ops.last();
        block.step = trace.steps.len();
        let target = trace.goes_on.unwrap_or_else(|| last.map_or(rip, Op::next_rip));
        block.edge(target)?;
    }
    block.finish()
}

impl Block<'_> {
    /// Finds the places that the trace jumps back to.
    fn find_heads(&mut self, trace: &Trace) {
        let exits = trace.steps.iter().filter_map(|step| match step.then {
            Then::Unless { exit, .. } => Some(exit),
            _ => None,
        });
        let targets: Vec<u64> = exits.chain(trace.goes_on).collect();
        for (n, op) in trace.ops.iter().enumerate() {
            if targets.contains(&op.rip) && !self.heads.contains_key(&op.rip) {
                let label = self.code.label();
                self.heads.insert(op.rip, Head { label, wants_flags: self.wanted_from(n) });
            }
        }
    }

    /// The step at `rip` comes next; the trace may jump here too.
    fn arrive(&mut self, rip: u64) -> Result<(), NotCopied> {
        let Some(head) = self.heads.get(&rip).copied() else { return Ok(()) };
        if head.wants_flags {
            self.save_flags()?;
            self.flags = Flags::Context;
        } else {
            self.flags = Flags::Dead;
        }
        self.producer = None;
        self.code.bind(head.label);
        Ok(())
    }

    /// Whether somebody may want the flags that step `n` finds.
    fn wanted_from(&self, n: usize) -> bool {
        for effects in self.effects.iter().skip(n) {
            if effects.wants {
                return true;
            }
            if effects.makes {
                return false;
            }
        }
        true
    }

    fn next(&mut self, step: &Step, op: &Op) -> Result<(), NotCopied> {
        let instruction = &step.instruction;
        match instruction.code() {
            Code::Push_r64 => self.push(op, Pushed::Register(instruction.op0_register())),
            Code::Pushq_imm8 | Code::Pushq_imm32 => {
                self.push(op, Pushed::Constant(instruction.immediate(0)))
            }
            Code::Pop_r64 => self.pop(op, instruction.op0_register().number() as u8),
            Code::Leaveq => self.leave(op),
            Code::Lea_r64_m | Code::Lea_r32_m => {
                let to = instruction.op0_register();
                self.keep_flags_for_address(op)?;
                let number = to.number() as u8;
                self.overwrite(1 << (number & 15))?;
                if let Some(host) = direct(number, op)
                    && to.size() == 8
                {
                    return self.code.effective(host, op, 0);
                }
                self.code.effective(VALUE, op, 0)?;
                if to.size() == 4 {
                    // mov eax, eax
                    self.code.bytes(&[0x89, 0xc0]);
                }
                self.code.put(number, VALUE);
                Ok(())
            }
            Code::VEX_Vzeroupper => self.code.emit(instruction),
            Code::Div_rm32 | Code::Div_rm64 | Code::Idiv_rm32 | Code::Idiv_rm64 => {
                self.divide(instruction, op)
            }
            _ if copy::is_nothing(instruction) => Ok(()),
            _ => copy::copy(self, step.plan.as_ref().ok_or(NotCopied)?, op),
        }
    }

    /// Addresses may take an addition, which changes flags.
    fn keep_flags_for_address(&mut self, op: &Op) -> Result<(), NotCopied> {
        let in_memory = |number| number != GPR_ZERO && home(number) == Home::Memory;
        if in_memory(op.base) && in_memory(op.index) {
            self.lose_flags()?;
        }
        Ok(())
    }

    /// The host's flags are about to be destroyed.
    fn lose_flags(&mut self) -> Result<(), NotCopied> {
        self.flags = match self.flags {
            Flags::Host if self.worth_deferring() => Flags::Deferred,
            Flags::Host => {
                self.save_flags()?;
                Flags::Context
            }
            Flags::Both => Flags::Context,
            elsewhere => elsewhere,
        };
        Ok(())
    }

    /// Whether making the flags again when they are wanted is better than keeping them now:
    /// their makings must last until they are wanted no more.
    fn worth_deferring(&self) -> bool {
        let Some(producer) = &self.producer else { return false };
        let mut lost = false;
        for effects in self.effects.iter().skip(self.step) {
            if lost && effects.wants {
                return false;
            }
            if effects.makes {
                return true;
            }
            lost |= effects.writes & producer.reads != 0;
        }
        !lost
    }

    /// The step is about to change `registers` of the guest's, and leaves flags alone or has
    /// what it reads of them.
    pub(super) fn overwrite(&mut self, registers: u16) -> Result<(), NotCopied> {
        let Some(producer) = self.producer else { return Ok(()) };
        if producer.reads & registers == 0 {
            return Ok(());
        }
        if self.flags == Flags::Deferred {
            if self.wanted_from(self.step.saturating_add(1)) {
                self.save_flags()?;
                self.flags = Flags::Context;
            } else {
                self.flags = Flags::Dead;
            }
        }
        self.producer = None;
        Ok(())
    }

    /// The step has made all flags, or all that it changes and kept the others.
    pub(super) fn made_flags(&mut self, producer: Option<Producer>) {
        self.flags = Flags::Host;
        self.producer = producer;
    }

    fn make_flags(&mut self) -> Result<(), NotCopied> {
        if let Some(producer) = self.producer {
            for step in producer.steps() {
                self.code.emit(step)?;
            }
        }
        Ok(())
    }

    /// Makes sure that the context has the flags. Uses [`VALUE`].
    fn save_flags(&mut self) -> Result<(), NotCopied> {
        if self.flags == Flags::Deferred {
            self.make_flags()?;
            self.flags = Flags::Host;
        }
        if self.flags == Flags::Host {
            keep_flags(&mut self.code);
            self.flags = Flags::Both;
        }
        Ok(())
    }

    /// Makes sure that the host's flags are the guest's. Uses [`VALUE`].
    pub(super) fn want_flags(&mut self) -> Result<(), NotCopied> {
        match self.flags {
            Flags::Deferred => {
                self.make_flags()?;
                self.flags = Flags::Host;
            }
            Flags::Context | Flags::Dead => {
                load_flags(&mut self.code);
                self.flags = Flags::Both;
            }
            Flags::Host | Flags::Both => {}
        }
        Ok(())
    }

    /// What a piece of code must do about flags that is jumped to now.
    fn fix(&self) -> Fix {
        match (self.flags, self.producer) {
            (Flags::Host, _) => Fix::Keep,
            (Flags::Deferred, Some(producer)) => Fix::Make(producer),
            _ => Fix::None,
        }
    }

    /// Puts `what` behind the rest. What jumps there does so with the flags as they are now.
    fn apart(&mut self, what: Cold) -> Label {
        let at = self.code.label();
        let fix = self.fix();
        self.cold.push_back(Apart { at, fix, what });
        at
    }

    /// Checks the access to `op`'s memory operand; the interpreter runs `op` where it does
    /// not hold, and goes on behind it (see [`Block::resume_here`]).
    pub(super) fn check(
        &mut self,
        op: &Op,
        operand: &Op,
        access: Access,
    ) -> Result<Place, NotCopied> {
        self.lose_flags()?;
        let resume = self.code.label();
        let at = self.apart(Cold::Interpret { op: address_of(op), resume, to_host: false });
        self.code.check(operand, access, at)
    }

    /// The instruction is done: what interpreted it goes on here.
    pub(super) fn resume_here(&mut self) {
        let in_host = matches!(self.flags, Flags::Host | Flags::Both);
        if let Some(Apart { what: Cold::Interpret { resume, to_host, .. }, .. }) =
            self.cold.back_mut()
        {
            *to_host = in_host;
            let resume = *resume;
            self.code.bind(resume);
        }
    }

    /// As [`Block::check`], for the instruction that ends the block.
    fn check_last(&mut self, op: &Op, operand: &Op, access: Access) -> Result<Place, NotCopied> {
        self.lose_flags()?;
        let at = self.last(op);
        self.code.check(operand, access, at)
    }

    /// Where the last op is interpreted.
    fn last(&mut self, op: &Op) -> Label {
        self.apart(Cold::Last { op: address_of(op) })
    }

    fn interpret(&mut self, op: &Op) -> Result<(), NotCopied> {
        self.save_flags()?;
        self.flags = Flags::Context;
        self.producer = None;
        self.code.constant(VALUE, address_of(op));
        self.code.call(self.thunks.interpret);
        Ok(())
    }

    fn interpret_last(&mut self, op: &Op) -> Result<(), NotCopied> {
        self.save_flags()?;
        self.code.constant(VALUE, address_of(op));
        self.code.call(self.thunks.interpret_last);
        Ok(())
    }

    fn push(&mut self, op: &Op, what: Pushed) -> Result<(), NotCopied> {
        let place = self.check(op, &stack_operand(op, RSP, -8), Access::STORE_WORD)?;
        let from = match what {
            Pushed::Register(register) => match home(register.number() as u8) {
                Home::Host(host) => host,
                Home::Memory => {
                    self.code.fetch(VALUE, register.number() as u8);
                    VALUE
                }
            },
            Pushed::Constant(value) => {
                self.code.constant(VALUE, value);
                VALUE
            }
        };
        self.code.store_at(place, from)?;
        self.moved_stack(-8)?;
        self.resume_here();
        Ok(())
    }

    fn pop(&mut self, op: &Op, register: u8) -> Result<(), NotCopied> {
        let place = self.check(op, &stack_operand(op, RSP, 0), Access::LOAD_WORD)?;
        self.overwrite(1 << RSP | 1 << (register & 15))?;
        match home(register) {
            Home::Host(host) if host != STACK => self.code.load_at(host, place)?,
            _ => self.code.load_at(VALUE, place)?,
        }
        self.code.lea(STACK, STACK, R::None, 1, 8)?;
        if register == RSP || home(register) == Home::Memory {
            self.code.put(register, VALUE);
        }
        self.resume_here();
        Ok(())
    }

    /// RSP changes by `by`.
    fn moved_stack(&mut self, by: i64) -> Result<(), NotCopied> {
        self.overwrite(1 << RSP)?;
        self.code.lea(STACK, STACK, R::None, 1, by)
    }

    fn leave(&mut self, op: &Op) -> Result<(), NotCopied> {
        let place = self.check(op, &stack_operand(op, RBP, 0), Access::LOAD_WORD)?;
        self.overwrite(1 << RSP | 1 << RBP)?;
        self.code.lea(STACK, R::RBP, R::None, 1, 8)?;
        self.code.load_at(R::RBP, place)?;
        self.resume_here();
        Ok(())
    }

    /// A division, where it cannot fault: what might is interpreted.
    fn divide(&mut self, instruction: &Instruction, op: &Op) -> Result<(), NotCopied> {
        let (wide, signed) = match instruction.code() {
            Code::Div_rm32 => (false, false),
            Code::Idiv_rm32 => (false, true),
            code => (true, code == Code::Idiv_rm64),
        };
        self.save_flags()?;
        self.flags = Flags::Context;
        self.producer = None;
        let resume = self.code.label();
        let unusual = self.apart(Cold::Interpret { op: address_of(op), resume, to_host: false });
        if instruction.op0_kind() == iced_x86::OpKind::Register {
            self.code.fetch(ADDRESS, instruction.op0_register().number() as u8);
        } else {
            let access = Access { len: if wide { 8 } else { 4 }, ..Access::LOAD_WORD };
            let place = self.code.check(op, access, unusual)?;
            let (load, to) = if wide {
                (Code::Mov_r64_rm64, ADDRESS)
            } else {
                (Code::Mov_r32_rm32, part(ADDRESS, R::EAX))
            };
            let load = Instruction::with2(load, to, place.operand()).map_err(|_| NotCopied)?;
            self.code.emit(&load)?;
        }
        self.code.divide(wide, signed, unusual);
        self.code.bind(resume);
        Ok(())
    }

    /// The trace goes on where `op` jumps to.
    fn followed(&mut self, op: &Op) -> Result<(), NotCopied> {
        if op.imm <= op.rip { self.poll(op.imm) } else { Ok(()) }
    }

    /// The trace goes on behind a conditional jump or at its target, and leaves for `exit` if
    /// the condition holds (`taken`), or if it does not.
    fn unless(
        &mut self,
        instruction: &Instruction,
        op: &Op,
        taken: bool,
        exit: u64,
    ) -> Result<(), NotCopied> {
        self.want_flags()?;
        let condition = Condition(copy::condition(instruction)?);
        let condition = if taken { condition } else { condition.negated() };
        if self.heads.contains_key(&exit) {
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
            self.cold.push_back(Apart { at, fix: Fix::None, what });
            self.code.jump_if(condition, at);
        }
        if !taken && op.imm <= op.rip { self.poll(op.imm) } else { Ok(()) }
    }

    fn branch(&mut self, instruction: &Instruction, op: &Op) -> Result<(), NotCopied> {
        self.save_flags()?;
        match instruction.code() {
            Code::Call_rel32_64 if canonical(op.imm) => {
                let place = self.check_last(op, &stack_operand(op, RSP, -8), Access::STORE_WORD)?;
                self.code.constant(VALUE, op.next_rip());
                self.code.store_at(place, VALUE)?;
                self.code.lea(STACK, STACK, R::None, 1, -8)?;
                self.edge(op.imm)
            }
            Code::Retnq | Code::Retnq_imm16 => {
                let place = self.check_last(op, &stack_operand(op, RSP, 0), Access::LOAD_WORD)?;
                self.code.load_at(VALUE, place)?;
                let miss = self.last(op);
                self.find(miss);
                self.code.lea(STACK, STACK, R::None, 1, 8_i64.wrapping_add(op.imm as i64))?;
                self.go();
                Ok(())
            }
            Code::Jmp_rm64 => {
                self.target(instruction, op)?;
                let miss = self.last(op);
                self.find(miss);
                self.go();
                Ok(())
            }
            Code::Call_rm64 => {
                self.target(instruction, op)?;
                let unusual = self.last(op);
                // mov r13, rax; sar r13, 47; inc r13; cmp r13, 1
                self.code.copy(ADDRESS, VALUE);
                self.code.bytes(&[0x49, 0xc1, 0xfd, 47, 0x49, 0xff, 0xc5, 0x49, 0x83, 0xfd, 1]);
                self.code.jump_if(Condition::ABOVE, unusual);
                self.code.store(fields::SPARE, VALUE);
                let place =
                    self.code.check(&stack_operand(op, RSP, -8), Access::STORE_WORD, unusual)?;
                self.code.constant(VALUE, op.next_rip());
                self.code.store_at(place, VALUE)?;
                self.code.lea(STACK, STACK, R::None, 1, -8)?;
                self.code.load(VALUE, fields::SPARE);
                let miss = self.apart(Cold::LeaveByKey);
                self.find(miss);
                self.go();
                Ok(())
            }
            _ => Err(NotCopied),
        }
    }

    /// The target of an indirect branch in [`VALUE`].
    fn target(&mut self, instruction: &Instruction, op: &Op) -> Result<(), NotCopied> {
        if instruction.op0_kind() == iced_x86::OpKind::Register {
            self.lose_flags()?;
            self.code.fetch(VALUE, instruction.op0_register().number() as u8);
        } else {
            let place = self.check_last(op, op, Access::LOAD_WORD)?;
            self.code.load_at(VALUE, place)?;
        }
        Ok(())
    }

    /// Looks for the block at [`VALUE`]: its slot is in [`ADDRESS`] if there is one.
    fn find(&mut self, miss: Label) {
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

    /// Goes to the block whose slot is in [`ADDRESS`], or leaves there.
    fn go(&mut self) {
        let at = self.apart(Cold::LeaveBySlot);
        self.look_for_events(at);
        // jmp gs:[r13 * 8 + hosts]
        self.code.bytes(&[0x65, 0x42, 0xff, 0x24, 0xed]);
        self.code.bytes(&fields::JUMP_HOSTS.0.to_le_bytes());
    }

    /// Goes on at `target`.
    fn edge(&mut self, target: u64) -> Result<(), NotCopied> {
        if let Some(head) = self.heads.get(&target).copied() {
            if head.wants_flags {
                self.save_flags()?;
            }
            self.poll(target)?;
            self.code.jump(head.label);
            return Ok(());
        }
        self.save_flags()?;
        if target <= self.here {
            self.poll(target)?;
        }
        if target >> PAGE_SHIFT == self.rip >> PAGE_SHIFT {
            // The mapping under this block is the target's too.
            let number = self.first_link.wrapping_add(self.links.len() as u32);
            let at = self.code.label();
            self.code.jump(at);
            self.links.push(Link { at: self.code.len().saturating_sub(4), target });
            self.cold.push_back(Apart { at, fix: Fix::None, what: Cold::Link { number } });
            return Ok(());
        }
        let (key, host) = fields::jump_entry(target);
        self.lose_flags()?;
        self.code.constant(VALUE, target);
        self.code.xor(VALUE, fields::JUMP_CONTEXT);
        self.code.compare(VALUE, key);
        let miss = self.apart(Cold::Leave { rip: target });
        self.code.jump_if(Condition::NOT_EQUAL, miss);
        // jmp gs:[host]
        self.code.bytes(&[0x65, 0xff, 0x24, 0x25]);
        self.code.bytes(&host.0.to_le_bytes());
        Ok(())
    }

    /// Leaves with RIP at `rip` if an event is waiting. Every cycle of blocks has a jump
    /// backwards or an indirect one, and those come by here.
    fn poll(&mut self, rip: u64) -> Result<(), NotCopied> {
        if self.flags == Flags::Host && self.producer.is_some() {
            self.flags = Flags::Deferred;
        }
        self.lose_flags()?;
        let at = self.apart(Cold::Leave { rip });
        self.look_for_events(at);
        Ok(())
    }

    /// Goes to `at` if an event is waiting. Uses [`VALUE`].
    fn look_for_events(&mut self, at: Label) {
        self.code.load(VALUE, fields::EVENTS);
        // mov eax, [rax]; test [event_mask], eax
        self.code.bytes(&[0x8b, 0x00, 0x65, 0x85, 0x04, 0x25]);
        self.code.bytes(&fields::EVENT_MASK.0.to_le_bytes());
        self.code.jump_if(Condition::NOT_EQUAL, at);
    }

    /// The block uses `need` of the vector unit.
    fn vectors(&mut self, need: u8) {
        let resume = self.code.label();
        let at = self.apart(Cold::Vectors { need, resume });
        self.code.load(VALUE, fields::VECTORS);
        require(&mut self.code, need);
        self.code.jump_if(Condition::NOT_EQUAL, at);
        self.code.bind(resume);
    }

    fn finish(mut self) -> Result<Translated, NotCopied> {
        self.step = self.effects.len();
        while let Some(Apart { at, fix, what }) = self.cold.pop_front() {
            self.code.bind(at);
            fix.write(&mut self.code)?;
            match what {
                Cold::Exit { target, from, flags, producer } => {
                    (self.flags, self.producer, self.here) = (flags, producer, from);
                    self.edge(target)?;
                }
                what => what.write(&mut self.code, self.thunks, self.rip),
            }
        }
        let way_out = self.code.len();
        Cold::Stale { rip: self.rip }.write(&mut self.code, self.thunks, self.rip);
        Ok(Translated { code: self.code.finish()?, links: self.links, way_out })
    }
}

/// What is pushed.
enum Pushed {
    Register(R),
    Constant(u64),
}

/// The host register of guest register `to`, if an address of `op`'s registers can be
/// computed in it: where they are in host registers too, none is overwritten too early.
fn direct(to: u8, op: &Op) -> Option<R> {
    let in_host = |number| number == GPR_ZERO || matches!(home(number), Home::Host(_));
    match home(to) {
        Home::Host(host) if in_host(op.base) && in_host(op.index) => Some(host),
        _ => None,
    }
}

/// The word at `displacement` from `register`.
fn stack_operand(op: &Op, register: u8, displacement: i64) -> Op {
    Op {
        base: register,
        index: GPR_ZERO,
        disp: displacement as u64,
        addr_mask: u64::MAX,
        seg: SEG_FLAT,
        ..*op
    }
}

/// The op is the translator's own, and stays where it is for as long as the code.
fn address_of(op: &Op) -> u64 {
    std::ptr::from_ref(op) as u64
}

fn canonical(target: u64) -> bool {
    GuestVirtAddr(target).is_canonical()
}
