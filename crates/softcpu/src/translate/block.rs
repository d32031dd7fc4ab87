//! From a decoded block to host code.
//!
//! Each instruction is copied where that can be ([`super::copy`]), rewritten where it is
//! control flow or works on the stack, and handed to the interpreter otherwise. Between
//! blocks the guest's status flags are in the context; within one they are in the host's
//! flags for as long as nothing (a TLB check, above all) destroys them.

use std::collections::VecDeque;

use iced_x86::{Code, Instruction, Register as R};

use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::cold::{Cold, Fix, keep_flags, load_flags, require};
use super::copy;
use super::effects::Effects;
use super::fields;
use super::flags::{Flags, Producer};
use super::heads::Heads;
use super::manner::Manner;
use super::mode::{CodeSegment, Mode};
use super::ops::Ops;
use super::regions::Landing;
use super::registers::{GprSet, Home, Homes, VALUE, of_word};
use super::relocate::{Kind, Relocation};
use super::scratch::Scratch;
use super::shapes::How;
use super::sharing::{Grouping, Groups, Share};
use super::thunks::Thunks;
use super::trace::{Step, Then, Trace};
use crate::decode::op::Op;
use crate::state::GPR_ZERO;

/// Bytes of the shortest instruction that a translation may begin with: it becomes a jump when the
/// translation is closed, and nobody may be in the middle of that.
pub(super) const SHORTEST: usize = 2;

/// A jump that can be made to go straight to another block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Where in the block's code its distance is.
    pub(super) at: usize,
    /// Where it goes.
    pub(super) target: u64,
}

/// What came of a trace.
#[derive(Clone, Debug, Default)]
pub(super) struct Translated {
    pub(super) code: Vec<u8>,
    /// Numbered from the first number given to [`translate`].
    pub(super) links: Vec<Link>,
    /// Where code is that leaves to look the block up again.
    pub(super) way_out: usize,
    /// What must change in it elsewhere.
    pub(super) relocations: Vec<Relocation>,
    /// Its guest's code may be elsewhere too.
    pub(super) movable: bool,
    /// Where its instructions go on that fault.
    pub(super) landings: Vec<Landing>,
}

/// Code that is rarely run, and lies behind the rest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Apart {
    pub(super) at: Label,
    /// What is done about flags first.
    pub(super) fix: Fix,
    /// Where guest registers are when it is jumped to.
    pub(super) homes: Homes,
    /// The op that is noted first as the last that has set the x87 unit's FIP and FOP.
    pub(super) note: Option<u64>,
    pub(super) what: Cold,
}

/// One trace on its way.
pub(super) struct Block<'a> {
    trace: &'a Trace,
    pub(super) code: &'a mut Assembler,
    pub(super) flags: Flags,
    /// What can make the flags again.
    pub(super) producer: Option<Producer>,
    pub(super) thunks: &'a Thunks,
    kept: &'a mut Ops,
    /// The op that was kept last: where it is in the guest's code, and its address.
    last_kept: Option<(u64, u64)>,
    pub(super) cold: &'a mut VecDeque<Apart>,
    pub(super) links: Vec<Link>,
    pub(super) first_link: u32,
    pub(super) manner: Manner,
    /// Where it begins, the mode that it is for, and where its code is.
    pub(super) rip: u64,
    pub(super) mode: Mode,
    pub(super) segment: CodeSegment,
    /// The step that is being translated, and where it is in the guest's code.
    pub(super) step: usize,
    pub(super) here: u64,
    /// What the steps do to flags and registers.
    pub(super) effects: &'a mut Vec<Effects>,
    pub(super) heads: &'a mut Heads,
    /// Where guest registers are at heads.
    pub(super) lent: Homes,
    /// How the steps' accesses are checked.
    pub(super) shares: &'a mut Vec<Share>,
    /// What the code behind the rest is to check.
    pub(super) groups: &'a mut Groups,
    /// The place whose host address is in [`ADDRESS`](super::registers::ADDRESS).
    pub(super) in_address: Option<u8>,
    /// The step's access was checked as its share says.
    pub(super) checked: bool,
    /// How far the stack pointer has yet to move, and whether the step may leave it so.
    pub(super) stack_moves: i64,
    pub(super) stack_waits: bool,
    /// The places of what was checked before an instruction was interpreted in line, a bit each.
    pub(super) weak: u16,
    /// Where the step's access lands if it faults, once that is known; and all of those before.
    pub(super) landing: Option<Label>,
    pub(super) landings: &'a mut Vec<(usize, Label)>,
    /// The op before, which has set the x87 unit's FIP and FOP as the step is about to do.
    pub(super) unnoted: Option<u64>,
}

/// Where a translation is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site<'a> {
    pub(super) thunks: &'a Thunks,
    /// Where its code will be executed.
    pub(super) base: u64,
    /// The number that its first link gets.
    pub(super) first_link: u32,
}

/// Translates `trace` for `site`, in the memory of `scratch` and `spare`.
///
/// # Errors
/// None, unless the assembler is wrong.
pub(super) fn translate(
    trace: &Trace,
    site: Site<'_>,
    kept: &mut Ops,
    manner: Manner,
    scratch: &mut Scratch,
    spare: Translated,
) -> Result<Translated, NotCopied> {
    if manner.shares
        && let Ok(translated) = attempt(trace, site, kept, manner, scratch, spare)
    {
        return Ok(translated);
    }
    let manner = Manner { shares: false, ..manner };
    attempt(trace, site, kept, manner, scratch, Translated::default())
}

/// As [`translate`].
///
/// # Errors
/// When accesses should share checks, but one of them is to be interpreted.
fn attempt(
    trace: &Trace,
    Site { thunks, base, first_link }: Site<'_>,
    kept: &mut Ops,
    manner: Manner,
    scratch: &mut Scratch,
    spare: Translated,
) -> Result<Translated, NotCopied> {
    let rip = trace.ops.first().map_or(0, |op| op.rip);
    let Translated { code: memory, mut links, relocations, landings: landed, .. } = spare;
    let Scratch { code, cold, effects, heads, grouping, shares, groups, landings } = scratch;
    code.restart(base, memory, relocations);
    links.clear();
    cold.clear();
    shares.clear();
    groups.clear();
    landings.clear();
    Effects::of_all(trace, effects);
    let mut block = Block {
        trace,
        code,
        flags: Flags::Context,
        producer: None,
        thunks,
        kept,
        last_kept: None,
        cold,
        links,
        first_link,
        manner,
        rip,
        mode: trace.mode,
        segment: trace.segment,
        step: 0,
        here: rip,
        effects,
        heads,
        lent: Homes::default(),
        shares,
        groups,
        in_address: None,
        checked: false,
        stack_moves: 0,
        stack_waits: false,
        weak: 0,
        landing: None,
        landings,
        unnoted: None,
    };
    let short = |step: &Step| step.instruction.len() < SHORTEST && step.shape.stack().is_none();
    if trace.steps.first().is_some_and(short) {
        block.code.nothing(SHORTEST);
    }
    block.find_heads(trace);
    if manner.shares {
        block.share(trace, grouping);
    }
    let need = trace.steps.iter().fold(0, |need, step| need | step.shape.need);
    if need != 0 {
        block.vectors(need);
    }
    let lent = block.homes_for(trace);
    block.lent = lent;
    block.code.lend(lent);
    // Whether the step before goes on here.
    let mut open = true;
    for (n, (step, op)) in trace.steps.iter().zip(&trace.ops).enumerate() {
        (block.step, block.here) = (n, op.rip);
        block.stack_waits = block.may_wait_with_stack(step, op);
        if !block.stack_waits {
            block.move_stack_at_last()?;
        }
        block.arrive(op.rip, open)?;
        if !open && !block.heads.has(op.rip) {
            // What would have come here is interpreted, and goes on elsewhere.
            continue;
        }
        let before = (block.code.len(), block.flags, block.producer, block.cold.len());
        let (homes, stack_moves) = (block.code.homes, block.stack_moves);
        block.checked = false;
        let done = match step.then {
            Then::Next => block.next(step, op),
            Then::Followed => block.followed(op),
            Then::Unless { taken, exit } => block.unless(&step.instruction, op, taken, exit),
            Then::Last => block.branch(step, op),
        };
        open = step.then != Then::Last;
        let alone = block.share_of(n).is_alone();
        if !alone && (done.is_err() || !block.checked) {
            return Err(NotCopied);
        }
        block.checked = false;
        if done.is_err() {
            block.code.take_back(before.0);
            block.landing = None;
            block.landings.retain(|(at, _)| *at < before.0);
            (block.flags, block.producer) = (before.1, before.2);
            block.cold.truncate(before.3);
            block.code.homes = homes;
            block.stack_moves = stack_moves;
            block.move_stack_at_last()?;
            match step.then {
                Then::Next => block.interpret(op)?,
                // It says itself where it goes on.
                _ => {
                    block.interpret_last(op)?;
                    open = false;
                }
            }
        }
        let last = n.saturating_add(1) == trace.steps.len();
        let onwards = step.onwards.or(last.then_some(op.next_rip()));
        if open && let Some(target) = onwards {
            block.step = block.step_behind(n).unwrap_or(trace.steps.len());
            block.move_stack_at_last()?;
            block.edge(target)?;
            open = false;
        }
        if !open {
            block.code.homes = lent;
        }
    }
    block.finish(landed)
}

impl Block<'_> {
    /// Finds out which accesses share checks: those that follow others cannot fault.
    fn share(&mut self, trace: &Trace, grouping: &mut Grouping) {
        let mut shares = std::mem::take(self.shares);
        self.shares_of(trace, grouping, &mut shares);
        *self.shares = shares;
        self.forget_streams();
        for ((effects, share), step) in self.effects.iter_mut().zip(&*self.shares).zip(&trace.steps)
        {
            let follows = matches!(share, Share::Follows { mirrored: false, .. });
            if follows && step.then == Then::Next {
                let shape = &step.shape;
                effects.wants = shape.stack().is_none()
                    && shape.copying().is_none_or(|copying| copying.flags.reads);
            }
        }
    }

    /// The streams there are.
    pub(super) fn streams(&self) -> Vec<u8> {
        let streams = self.shares.iter().filter_map(|share| match share {
            Share::Leads { group, .. } => group.stream,
            _ => None,
        });
        streams.collect()
    }

    pub(super) fn share_of(&self, step: usize) -> &Share {
        self.shares.get(step).unwrap_or(&Share::None)
    }

    fn next(&mut self, step: &Step, op: &Op) -> Result<(), NotCopied> {
        let it = &step.instruction;
        match &step.shape.how {
            How::Stack(what, word) => self.stack(it, op, *what, *word),
            How::Lea => self.lea(it, op),
            How::String(string) => self.string(*string, op),
            // Outside 64-bit mode it knows half of the registers only.
            How::ZeroUpper if self.mode == Mode::LONG => self.code.emit(it),
            How::Divide => self.divide(it, op),
            How::Nothing => Ok(()),
            How::X87Control => self.x87_control(it, op),
            How::Privileged(_) => self.privileged(it, op),
            How::Copied(copying) => copy::copy(self, it, copying, op),
            How::ZeroUpper | How::Other => Err(NotCopied),
        }
    }

    /// `lea`
    fn lea(&mut self, instruction: &Instruction, op: &Op) -> Result<(), NotCopied> {
        let to = instruction.op0_register();
        let (number, size) = (to.number() as u8, to.size());
        self.keep_flags_for_address(op)?;
        self.overwrite(GprSet::of(number))?;
        if let Some(host) = direct(self.code.homes, number, op)
            && matches!((size, op.addr_mask), (8, _) | (4, 0xffff_ffff))
        {
            return self.code.effective(host, op, 0);
        }
        self.code.effective(VALUE, op, 0)?;
        if size == 2 {
            // The rest of the register stays: one in memory would have to be put together.
            let Home::Host(host) = self.code.homes.of(number) else { return Err(NotCopied) };
            let [to, from] = [host, VALUE].map(|register| of_word(register, 2));
            let copy = Instruction::with2(Code::Mov_r16_rm16, to, from);
            return self.code.emit(&copy.map_err(|_| NotCopied)?);
        }
        if size == 4 {
            self.code.copy_low(VALUE, VALUE);
        }
        self.code.put(number, VALUE);
        Ok(())
    }

    /// Addresses may take an addition, which changes flags.
    fn keep_flags_for_address(&mut self, op: &Op) -> Result<(), NotCopied> {
        let in_memory = |number| number != GPR_ZERO && self.code.homes.of(number) == Home::Memory;
        if in_memory(op.base) && in_memory(op.index) {
            self.lose_flags()?;
        }
        Ok(())
    }

    /// The host's flags are about to be destroyed.
    pub(super) fn lose_flags(&mut self) -> Result<(), NotCopied> {
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

    /// Whether [`Block::overwrite`] may have to save flags, which takes [`VALUE`].
    pub(super) fn may_save_flags_for(&self, registers: GprSet) -> bool {
        let read = self.producer.is_some_and(|producer| producer.reads.meets(registers));
        self.flags == Flags::Deferred && read
    }

    /// The step is about to change `registers` of the guest's, and leaves flags alone or has
    /// what it reads of them.
    pub(super) fn overwrite(&mut self, registers: GprSet) -> Result<(), NotCopied> {
        let Some(producer) = self.producer else { return Ok(()) };
        if !producer.reads.meets(registers) {
            return Ok(());
        }
        if self.flags == Flags::Deferred {
            if self.wants_flags_later() {
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

    /// The step has changed some flags, and not found the others: nobody wants any.
    pub(super) fn unmade_flags(&mut self) {
        self.flags = Flags::Dead;
        self.producer = None;
    }

    fn make_flags(&mut self) -> Result<(), NotCopied> {
        self.producer.map_or(Ok(()), |producer| producer.write(self.code, self.trace))
    }

    /// Makes sure that the context has the flags. Uses [`VALUE`].
    pub(super) fn save_flags(&mut self) -> Result<(), NotCopied> {
        if self.flags == Flags::Deferred {
            self.make_flags()?;
            self.flags = Flags::Host;
        }
        if self.flags == Flags::Host {
            keep_flags(self.code);
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
                load_flags(self.code);
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

    /// The address that the thunks want for `op`.
    pub(super) fn keep(&mut self, op: &Op) -> u64 {
        match self.last_kept {
            Some((rip, address)) if rip == op.rip => address,
            _ => {
                let address = self.kept.keep(op);
                self.last_kept = Some((op.rip, address));
                address
            }
        }
    }

    /// Puts `what` behind the rest. What jumps there does so with the flags as they are now.
    pub(super) fn apart(&mut self, what: Cold) -> Label {
        let at = self.code.label();
        let fix = self.fix();
        let (homes, note) = (self.code.homes, self.unnoted);
        self.cold.push_back(Apart { at, fix, homes, note, what });
        at
    }

    fn interpret(&mut self, op: &Op) -> Result<(), NotCopied> {
        self.save_flags()?;
        self.flags = Flags::Context;
        self.producer = None;
        if let Some(op) = self.unnoted.take() {
            self.code.note_x87(op);
        }
        let op = self.keep(op);
        let homes = self.code.homes;
        self.code.give_back();
        self.code.moving_constant(VALUE, op, Kind::Op);
        self.code.call(self.thunks.interpret);
        self.code.lend_again(homes);
        (self.in_address, self.weak) = (None, u16::MAX);
        Ok(())
    }

    fn interpret_last(&mut self, op: &Op) -> Result<(), NotCopied> {
        self.save_flags()?;
        let op = self.keep(op);
        self.code.give_back();
        self.code.moving_constant(VALUE, op, Kind::Op);
        self.code.call(self.thunks.interpret_last);
        Ok(())
    }

    /// The block uses `need` of the vector and x87 units.
    fn vectors(&mut self, need: u8) {
        let resume = self.code.label();
        let at = self.apart(Cold::Vectors { need, resume });
        self.code.load(VALUE, fields::VECTORS);
        require(self.code, need);
        self.code.jump_if(Condition::NOT_EQUAL, at);
        self.code.bind(resume);
    }

    /// Writes what lies behind the rest; where instructions land that fault goes into `landed`.
    fn finish(mut self, mut landed: Vec<Landing>) -> Result<Translated, NotCopied> {
        self.step = self.effects.len();
        while let Some(Apart { at, fix, homes, note, what }) = self.cold.pop_front() {
            self.code.bind(at);
            fix.write(self.code, self.trace)?;
            if let Some(op) = note {
                self.code.note_x87(op);
            }
            match what {
                Cold::Fill { group, stream, again, slow } => {
                    self.code.homes = homes;
                    self.code.fill_stream(self.groups.get(group)?, stream, again, slow)?;
                }
                Cold::Look { group, found, slow } => {
                    self.code.homes = homes;
                    self.code.look_for(self.groups.get(group)?, found, slow)?;
                }
                Cold::LookBehindGs { distant, found, slow } => {
                    self.code.look_behind_gs(distant, found, slow);
                }
                Cold::Exit { target, from, flags, producer } => {
                    (self.flags, self.producer, self.here) = (flags, producer, from);
                    self.code.homes = homes;
                    self.edge(target)?;
                }
                Cold::ForgetCalls { resume } => {
                    self.code.forget_calls();
                    self.code.jump(resume);
                }
                Cold::Unforeseen { op, by } => {
                    (self.flags, self.producer) = (Flags::Context, None);
                    self.code.homes = homes;
                    self.go_back_anyhow(op, by)?;
                }
                what => what.write(self.code, self.thunks, (self.rip, self.groups), homes)?,
            }
        }
        let way_out = self.code.len();
        let homes = Homes::default();
        let closed = Cold::Closed { rip: self.rip };
        closed.write(self.code, self.thunks, (self.rip, self.groups), homes)?;
        landed.clear();
        for landing in self.landings_by_place() {
            landed.push(landing.ok_or(NotCopied)?);
        }
        let (code, relocations) = self.code.finish()?;
        let movable = relocations.can_move(self.rip);
        let relocations = relocations.into_list();
        let links = self.links;
        Ok(Translated { code, links, way_out, relocations, movable, landings: landed })
    }
}

/// The host register of guest register `to`, if an address of `op`'s registers can be
/// computed in it: where they are in host registers too, none is overwritten too early.
fn direct(homes: Homes, to: u8, op: &Op) -> Option<R> {
    let in_host = |number| number == GPR_ZERO || matches!(homes.of(number), Home::Host(_));
    match homes.of(to) {
        Home::Host(host) if in_host(op.base) && in_host(op.index) => Some(host),
        _ => None,
    }
}
