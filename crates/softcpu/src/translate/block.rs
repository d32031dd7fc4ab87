//! From a decoded block to host code.
//!
//! Each instruction is copied where that can be ([`super::copy`]), rewritten where it is
//! control flow or works on the stack, and handed to the interpreter otherwise. Between
//! blocks the guest's status flags are in the context; within one they are in the host's
//! flags for as long as nothing (a TLB check, above all) destroys them.

use iced_x86::{Code, FlowControl, Instruction, Register as R};

use super::access::Access;
use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::cold::{Cold, load_flags, require};
use super::copy::Copier;
use super::fields;
use super::jumps;
use super::registers::{ADDRESS, STACK, VALUE};
use super::thunks::Thunks;
use crate::addr::{GuestVirtAddr, PAGE_SHIFT};
use crate::decode::op::Op;
use crate::state::{GPR_ZERO, SEG_FLAT};

/// RSP's number.
const RSP: u8 = 4;
const RBP: u8 = 5;

/// Where the guest's status flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flags {
    /// In the context only.
    Context,
    /// In the host's flags only.
    Host,
    /// In both.
    Both,
}

/// A jump that can be made to go straight to another block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    /// Where in the block's code its distance is.
    pub(super) at: usize,
    /// Where it goes.
    pub(super) target: u64,
}

/// What came of a block.
#[derive(Debug)]
pub(super) struct Translated {
    pub(super) code: Vec<u8>,
    /// Numbered from the first number given to [`translate`].
    pub(super) links: Vec<Link>,
    /// Where code is that leaves to look the block up again.
    pub(super) way_out: usize,
}

/// One block on its way.
pub(super) struct Block<'a> {
    pub(super) code: Assembler,
    pub(super) flags: Flags,
    thunks: &'a Thunks,
    /// Code that is rarely run, and lies behind the rest.
    cold: Vec<(Label, Cold)>,
    links: Vec<Link>,
    first_link: u32,
    rip: u64,
}

/// Translates `instructions`, decoded as `ops` (which may have one synthetic op more), for
/// code memory at `base`. Links get numbers from `first_link`.
///
/// # Errors
/// None, unless the assembler is wrong.
pub(super) fn translate(
    instructions: &[Instruction],
    ops: &[Op],
    copier: &mut Copier<'_>,
    thunks: &Thunks,
    base: u64,
    first_link: u32,
) -> Result<Translated, NotCopied> {
    let rip = ops.first().map_or(0, |op| op.rip);
    let mut block = Block {
        code: Assembler::new(base),
        flags: Flags::Context,
        thunks,
        cold: Vec::new(),
        links: Vec::new(),
        first_link,
        rip,
    };
    let need = instructions.iter().fold(0, |need, it| need | copier.vector_need(it));
    if need != 0 {
        block.vectors(need);
    }
    // The op behind the last instruction, if there is one, goes on with the next block.
    let synthetic = ops.len() > instructions.len();
    let mut ended = false;
    for (n, (instruction, op)) in instructions.iter().zip(ops).enumerate() {
        let last = !synthetic && n.saturating_add(1) == instructions.len();
        let branches = instruction.flow_control() != FlowControl::Next;
        let before = (block.code.len(), block.flags, block.cold.len());
        let done = match (branches, last) {
            (false, _) => block.next(instruction, op, copier),
            (true, true) => block.branch(instruction, op),
            (true, false) => Err(NotCopied),
        };
        ended = last && (branches || done.is_err());
        if done.is_err() {
            block.code.take_back(before.0);
            block.flags = before.1;
            block.cold.truncate(before.2);
            if last {
                block.interpret_last(op);
            } else {
                block.interpret(op);
            }
        }
    }
    if !ended {
        let target = ops.last().map_or(rip, |op| if synthetic { op.imm } else { op.next_rip() });
        block.save_flags();
        block.edge(target);
    }
    block.finish()
}

impl Block<'_> {
    fn next(
        &mut self,
        instruction: &Instruction,
        op: &Op,
        copier: &mut Copier<'_>,
    ) -> Result<(), NotCopied> {
        match instruction.code() {
            Code::Push_r64 => {
                let register = instruction.op0_register().number() as u8;
                self.push(op, |code| {
                    code.fetch(VALUE, register);
                    Ok(())
                })
            }
            Code::Pushq_imm8 | Code::Pushq_imm32 => {
                let value = instruction.immediate(0);
                self.push(op, |code| {
                    code.constant(VALUE, value);
                    Ok(())
                })
            }
            Code::Pop_r64 => self.pop(op, instruction.op0_register().number() as u8),
            Code::Leaveq => self.leave(op),
            Code::Lea_r64_m | Code::Lea_r32_m => {
                let to = instruction.op0_register();
                self.keep_flags_for_address(op);
                let number = to.number() as u8;
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
            _ if copier.is_nothing(instruction) => Ok(()),
            _ => copier.copy(self, instruction, op),
        }
    }

    /// Addresses may take an addition, which changes flags.
    fn keep_flags_for_address(&mut self, op: &Op) {
        use super::registers::{Home, home};
        let in_memory = |number| number != GPR_ZERO && home(number) == Home::Memory;
        if in_memory(op.base) && in_memory(op.index) {
            self.lose_flags();
        }
    }

    /// Flags are about to be destroyed.
    pub(super) fn lose_flags(&mut self) {
        self.save_flags();
        self.flags = Flags::Context;
    }

    /// Makes sure that the context has the flags.
    pub(super) fn save_flags(&mut self) {
        if self.flags == Flags::Host {
            // lahf; seto al; mov [flags], ax
            self.code.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x65, 0x66, 0x89, 0x04, 0x25]);
            self.code.bytes(&fields::FLAGS.0.to_le_bytes());
            self.flags = Flags::Both;
        }
    }

    /// Makes sure that the host's flags are the guest's. Uses [`VALUE`].
    pub(super) fn want_flags(&mut self) {
        if self.flags == Flags::Context {
            load_flags(&mut self.code);
            self.flags = Flags::Both;
        }
    }

    /// Checks the access to `op`'s memory operand; the interpreter runs `op` where it does
    /// not hold, and goes on behind it (see [`Block::resume_here`]).
    pub(super) fn check(&mut self, op: &Op, operand: &Op, access: Access) -> Result<(), NotCopied> {
        self.lose_flags();
        let (at, resume) = (self.code.label(), self.code.label());
        self.cold.push((at, Cold::Interpret { op: address_of(op), resume, to_host: false }));
        self.code.check(operand, access, at)
    }

    /// The instruction is done: what interpreted it goes on here.
    pub(super) fn resume_here(&mut self) {
        let flags = self.flags;
        if let Some((_, Cold::Interpret { resume, to_host, .. })) = self.cold.last_mut() {
            *to_host = flags != Flags::Context;
            let resume = *resume;
            self.code.bind(resume);
        }
    }

    /// As [`Block::check`], for the instruction that ends the block.
    fn check_last(&mut self, op: &Op, operand: &Op, access: Access) -> Result<(), NotCopied> {
        self.lose_flags();
        let at = self.last(op);
        self.code.check(operand, access, at)
    }

    /// Where the last op is interpreted.
    fn last(&mut self, op: &Op) -> Label {
        let at = self.code.label();
        self.cold.push((at, Cold::Last { op: address_of(op) }));
        at
    }

    fn interpret(&mut self, op: &Op) {
        self.lose_flags();
        self.code.constant(VALUE, address_of(op));
        self.code.call(self.thunks.interpret);
    }

    fn interpret_last(&mut self, op: &Op) {
        self.lose_flags();
        self.code.constant(VALUE, address_of(op));
        self.code.call(self.thunks.interpret_last);
    }

    fn push(
        &mut self,
        op: &Op,
        value: impl FnOnce(&mut Assembler) -> Result<(), NotCopied>,
    ) -> Result<(), NotCopied> {
        self.check(op, &stack_operand(op, RSP, -8), Access::STORE_WORD)?;
        value(&mut self.code)?;
        store_value(&mut self.code);
        self.code.lea(STACK, STACK, R::None, 1, -8)?;
        self.resume_here();
        Ok(())
    }

    fn pop(&mut self, op: &Op, register: u8) -> Result<(), NotCopied> {
        self.check(op, &stack_operand(op, RSP, 0), Access::LOAD_WORD)?;
        load_value(&mut self.code);
        self.code.lea(STACK, STACK, R::None, 1, 8)?;
        self.code.put(register, VALUE);
        self.resume_here();
        Ok(())
    }

    fn leave(&mut self, op: &Op) -> Result<(), NotCopied> {
        self.check(op, &stack_operand(op, RBP, 0), Access::LOAD_WORD)?;
        load_value(&mut self.code);
        self.code.lea(STACK, R::RBP, R::None, 1, 8)?;
        self.code.put(RBP, VALUE);
        self.resume_here();
        Ok(())
    }

    fn branch(&mut self, instruction: &Instruction, op: &Op) -> Result<(), NotCopied> {
        match instruction.code() {
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 if canonical(op.imm) => {
                self.save_flags();
                self.edge(op.imm);
                Ok(())
            }
            Code::Call_rel32_64 if canonical(op.imm) => {
                self.check_last(op, &stack_operand(op, RSP, -8), Access::STORE_WORD)?;
                self.code.constant(VALUE, op.next_rip());
                store_value(&mut self.code);
                self.code.lea(STACK, STACK, R::None, 1, -8)?;
                self.edge(op.imm);
                Ok(())
            }
            Code::Retnq | Code::Retnq_imm16 => {
                self.check_last(op, &stack_operand(op, RSP, 0), Access::LOAD_WORD)?;
                load_value(&mut self.code);
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
                self.code.check(&stack_operand(op, RSP, -8), Access::STORE_WORD, unusual)?;
                self.code.constant(VALUE, op.next_rip());
                store_value(&mut self.code);
                self.code.lea(STACK, STACK, R::None, 1, -8)?;
                self.code.load(VALUE, fields::SPARE);
                let miss = self.code.label();
                self.cold.push((miss, Cold::LeaveByKey));
                self.find(miss);
                self.go();
                Ok(())
            }
            _ if instruction.is_jcc_short_or_near() && canonical(op.imm) => {
                self.want_flags();
                self.save_flags();
                let condition = Condition(super::copy::condition(instruction)?);
                let not_taken = self.code.label();
                self.code.jump_if(condition.negated(), not_taken);
                self.edge(op.imm);
                self.code.bind(not_taken);
                self.edge(op.next_rip());
                Ok(())
            }
            _ => Err(NotCopied),
        }
    }

    /// The target of an indirect branch in [`VALUE`].
    fn target(&mut self, instruction: &Instruction, op: &Op) -> Result<(), NotCopied> {
        if instruction.op0_kind() == iced_x86::OpKind::Register {
            self.lose_flags();
            self.code.fetch(VALUE, instruction.op0_register().number() as u8);
        } else {
            self.check_last(op, op, Access::LOAD_WORD)?;
            load_value(&mut self.code);
        }
        Ok(())
    }

    /// Looks for the block at [`VALUE`]: its slot is in [`ADDRESS`] if there is one.
    fn find(&mut self, miss: Label) {
        // mov r13d, eax; shr r13d, 10; xor r13d, eax; and r13d, mask
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
        let at = self.code.label();
        self.cold.push((at, Cold::LeaveBySlot));
        self.look_for_events(at);
        // jmp gs:[r13 * 8 + hosts]
        self.code.bytes(&[0x65, 0x42, 0xff, 0x24, 0xed]);
        self.code.bytes(&fields::JUMP_HOSTS.0.to_le_bytes());
    }

    /// Goes on at `target`, with flags in the context.
    fn edge(&mut self, target: u64) {
        if target <= self.rip {
            self.poll(target);
        }
        if target >> PAGE_SHIFT == self.rip >> PAGE_SHIFT {
            // The mapping under this block is the target's too.
            let number = self.first_link.wrapping_add(self.links.len() as u32);
            let at = self.code.label();
            self.code.jump(at);
            self.links.push(Link { at: self.code.len().saturating_sub(4), target });
            self.cold.push((at, Cold::Link { number }));
            return;
        }
        let (key, host) = fields::jump_entry(target);
        self.code.constant(VALUE, target);
        self.code.xor(VALUE, fields::JUMP_CONTEXT);
        self.code.compare(VALUE, key);
        let miss = self.code.label();
        self.cold.push((miss, Cold::Leave { rip: target }));
        self.code.jump_if(Condition::NOT_EQUAL, miss);
        // jmp gs:[host]
        self.code.bytes(&[0x65, 0xff, 0x24, 0x25]);
        self.code.bytes(&host.0.to_le_bytes());
    }

    /// Leaves with RIP at `rip` if an event is waiting. Every cycle of blocks has a jump
    /// backwards or an indirect one, and those come by here.
    fn poll(&mut self, rip: u64) {
        self.lose_flags();
        let at = self.code.label();
        self.cold.push((at, Cold::Leave { rip }));
        self.look_for_events(at);
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
        let (at, resume) = (self.code.label(), self.code.label());
        self.cold.push((at, Cold::Vectors { need, resume }));
        self.code.load(VALUE, fields::VECTORS);
        require(&mut self.code, need);
        self.code.jump_if(Condition::NOT_EQUAL, at);
        self.code.bind(resume);
    }

    fn finish(mut self) -> Result<Translated, NotCopied> {
        for (at, cold) in self.cold {
            self.code.bind(at);
            cold.write(&mut self.code, self.thunks, self.rip);
        }
        let way_out = self.code.len();
        Cold::Leave { rip: self.rip }.write(&mut self.code, self.thunks, self.rip);
        Ok(Translated { code: self.code.finish()?, links: self.links, way_out })
    }
}

/// The host register of guest register `to`, if an address of `op`'s registers can be
/// computed in it: where they are in host registers too, none is overwritten too early.
fn direct(to: u8, op: &Op) -> Option<R> {
    use super::registers::{Home, home};
    let in_host = |number| number == GPR_ZERO || matches!(home(number), Home::Host(_));
    match home(to) {
        Home::Host(host) if in_host(op.base) && in_host(op.index) => Some(host),
        _ => None,
    }
}

/// `mov [r13], rax`
fn store_value(code: &mut Assembler) {
    code.bytes(&[0x49, 0x89, 0x45, 0x00]);
}

/// `mov rax, [r13]`
fn load_value(code: &mut Assembler) {
    code.bytes(&[0x49, 0x8b, 0x45, 0x00]);
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
