//! A second look at translated code: does it reach anything that it may not?
//!
//! The block is disassembled and followed in a straight line, with what is known of the two
//! scratch registers. Every memory operand must be a field of the vCPU, an entry of one of
//! its tables by an index that was masked, or a host address that a TLB check has left, no
//! larger and no more than that check was for. Every branch must stay in the block or go to
//! a thunk, and nothing may touch the host's stack, segments or system. It shares no code
//! with what it looks at but the fields' places. Tests run it on every block they translate.
//!
//! Host addresses that are kept for later ([`pointers`]) hold over branches, and are followed
//! along each of them.

use foldhash::{HashMap, HashSet};

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M,
    OpAccess, OpKind, Register as R,
};

use self::gs_pages::GsPages;
use self::known::{Known, Shown, Sum, Term};
use self::operands::first_field;
use self::pointers::{Kept, Pointers, Roads};
use self::streams::Streams;
use self::stubs::Stubs;
use self::units::Units;
use super::fields::{self, Field, TLB_ADDEND, TLB_STORES, TLB_TAG};
use super::regions::Landing;
use super::registers::{ADDRESS, VALUE};
use super::thunks::Thunks;
use crate::mmu::tlb::DataTables;
use crate::vcpu::Vcpu;

/// What is wrong with a block, and where in its code.
#[derive(Debug, thiserror::Error)]
#[error("{why} at {offset:#x}: {instruction}")]
pub(super) struct Violation {
    why: &'static str,
    offset: u64,
    instruction: String,
}

struct Look<'a> {
    factory: InstructionInfoFactory,
    value: Known,
    address: Known,
    /// What is shown if the comparison just made holds.
    compared: Option<Shown>,
    /// What the last TLB check has shown.
    shown: Option<Shown>,
    /// What is shown if the entry of the mirror's table that was just looked at is not zero, and
    /// what was shown so.
    asked: Option<Shown>,
    mirrored: Option<Shown>,
    thunks: &'a Thunks,
    range: std::ops::Range<u64>,
    /// Where jumps go that are made with an index into the jump cache at hand.
    slots: HashSet<u64>,
    /// What of the vector and x87 units is loaded, and whether the copy of a control word just
    /// written masks all exceptions.
    units: Units,
    /// What is kept, and where the two scratch registers' pointer is among it.
    pointers: Pointers,
    streams: Streams,
    gs_pages: GsPages,
    stubs: Stubs,
    /// The first half of a noted call is on the host's stack, and the second must follow.
    pushed: bool,
}

/// Looks at `code`, which is executed at `base`, and has `landings`.
///
/// # Errors
/// The first [`Violation`].
pub(super) fn verify(
    code: &[u8],
    base: u64,
    thunks: &Thunks,
    landings: &[Landing],
) -> Result<(), Violation> {
    let decoder = Decoder::with_ip(64, code, base, DecoderOptions::NONE);
    let instructions: Vec<Instruction> = decoder.into_iter().collect();
    let near = |it: &&Instruction| {
        it.is_jcc_short_or_near() || it.is_jmp_short_or_near() || it.is_call_near()
    };
    let mut targets: HashMap<u64, u32> = HashMap::default();
    for it in instructions.iter().filter(near) {
        let times = targets.entry(it.near_branch_target()).or_default();
        *times = times.saturating_add(1);
    }
    let at = |place: u16| base.saturating_add(place.into());
    let faults: HashMap<u64, u64> =
        landings.iter().map(|landing| (at(landing.at), at(landing.to))).collect();
    for landing in faults.values() {
        let times = targets.entry(*landing).or_default();
        *times = times.saturating_add(1);
    }
    let starts: HashSet<u64> = instructions.iter().map(Instruction::ip).collect();
    let mut roads = Roads::default();
    // What was taken to be known where a jump backwards leads may turn out not to be: then all
    // is looked at again, with less.
    let ways = Ways { targets, starts, faults };
    while !look_at(&instructions, base, code.len(), thunks, &ways, &mut roads)? {}
    Ok(())
}

/// Where code can go.
struct Ways {
    /// How many ways lead to an instruction besides the one from before it.
    targets: HashMap<u64, u32>,
    /// All instructions.
    starts: HashSet<u64>,
    /// Where those go on that fault.
    faults: HashMap<u64, u64>,
}

/// Looks at it once. Says whether that was enough.
fn look_at(
    instructions: &[Instruction],
    base: u64,
    len: usize,
    thunks: &Thunks,
    Ways { targets, starts, faults }: &Ways,
    roads: &mut Roads,
) -> Result<bool, Violation> {
    let mut look = Look {
        factory: InstructionInfoFactory::new(),
        value: Known::Nothing,
        address: Known::Nothing,
        compared: None,
        shown: None,
        asked: None,
        mirrored: None,
        thunks,
        range: base..base.saturating_add(len as u64),
        slots: HashSet::default(),
        units: Units::default(),
        pointers: Pointers::default(),
        streams: Streams::of(instructions),
        gs_pages: GsPages::default(),
        stubs: Stubs::of(instructions),
        pushed: false,
    };
    roads.begin();
    let mut falls_through = true;
    for it in instructions {
        if let Some(times) = targets.get(&it.ip()) {
            let here = falls_through.then(|| look.all_pointers());
            let Some(known) = roads.arrive(it.ip(), here) else { continue };
            look.forget();
            look.units.joined(falls_through);
            look.streams.road().map_err(|why| violation(why, it, base))?;
            look.gs_pages.road();
            look.take_over(known);
            look.stubs.arrive((!falls_through).then_some(look.pointers));
            // Come to by one jump only, with an index into the jump cache.
            if !falls_through && *times == 1 && look.slots.contains(&it.ip()) {
                look.address = Known::Slot;
            }
        } else if !falls_through {
            // Nobody comes here.
            continue;
        }
        falls_through = match it.flow_control() {
            FlowControl::UnconditionalBranch
            | FlowControl::IndirectBranch
            | FlowControl::Return => false,
            // Does not come back.
            FlowControl::Call => it.near_branch_target() != thunks.interpret_last,
            _ => true,
        };
        if let FlowControl::ConditionalBranch
        | FlowControl::UnconditionalBranch
        | FlowControl::Call = it.flow_control()
        {
            let target = it.near_branch_target();
            if look.range.contains(&target) {
                roads.leave(it.ip(), target, &look.all_pointers());
            }
        }
        if let Some(landing) = faults.get(&it.ip()) {
            if !starts.contains(landing) {
                return Err(violation("a fault that goes nowhere", it, base));
            }
            roads.leave(it.ip(), *landing, &look.all_pointers());
        }
        let noted = look.pushed;
        look.step(it, starts).map_err(|why| violation(why, it, base))?;
        if noted {
            // What is called comes back to this with nothing that was known.
            look.forget();
            look.units.returned();
            look.take_over(Pointers::default());
        }
    }
    Ok(roads.hold())
}

fn violation(why: &'static str, it: &Instruction, base: u64) -> Violation {
    Violation { why, offset: it.ip().wrapping_sub(base), instruction: it.to_string() }
}

impl Look<'_> {
    fn forget(&mut self) {
        (self.value, self.address) = (Known::Nothing, Known::Nothing);
        (self.compared, self.shown) = (None, None);
        (self.asked, self.mirrored) = (None, None);
    }

    /// What is kept, and what is in [`ADDRESS`].
    fn all_pointers(&self) -> Pointers {
        let mut pointers = self.pointers;
        pointers.here = Kept::of(&self.address);
        pointers
    }

    fn take_over(&mut self, pointers: Pointers) {
        self.pointers = pointers;
        if let Some(kept) = pointers.here {
            self.address = kept.known();
        }
    }

    fn step(&mut self, it: &Instruction, starts: &HashSet<u64>) -> Result<(), &'static str> {
        if it.is_invalid() {
            return Err("no instruction");
        }
        if it.is_privileged() || it.op_code().is_input_output() {
            return Err("privileged");
        }
        match it.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch => self.streams.unless(it)?,
            _ => self.streams.road()?,
        }
        if it.flow_control() != FlowControl::Next {
            self.gs_pages.jump(it);
        }
        if self.pushed && !it.is_call_near() && !it.is_call_near_indirect() {
            return Err("half a call on the host's stack");
        }
        match it.flow_control() {
            FlowControl::Next => {}
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                return self.branch(it, starts);
            }
            FlowControl::Call if it.is_call_near() => return self.call(it, starts),
            FlowControl::IndirectBranch if branches::is_entry_of_the_jump_cache(it) => {}
            FlowControl::IndirectCall if self.pushed && returns::is_call_by_the_jump_cache(it) => {}
            FlowControl::Return if returns::is_return(it) => {}
            _ => return Err("control flow"),
        }
        self.pushed = returns::is_push(it);
        self.memory(it)?;
        self.registers(it)?;
        self.units.allow(it)?;
        let (value, address) = (self.value.clone(), self.address.clone());
        self.streams.follow(it, &value, &address)?;
        self.units.follow(it, &self.value);
        self.follow(it);
        self.streams.done();
        self.gs_pages.follow(it, &value);
        Ok(())
    }

    fn memory(&mut self, it: &Instruction) -> Result<(), &'static str> {
        if !it.op_kinds().any(|kind| kind == OpKind::Memory) {
            let implied = returns::is_push(it) || returns::is_return(it);
            return if implied || self.factory.info(it).used_memory().is_empty() {
                Ok(())
            } else {
                Err("an implied memory operand")
            };
        }
        if matches!(it.mnemonic(), M::Lea | M::Nop) {
            return Ok(());
        }
        let memories = self.factory.info(it).used_memory();
        let memory = match memories {
            [memory] => memory,
            // What is called, and where that is noted.
            [memory, _] if returns::is_call_by_the_jump_cache(it) => memory,
            _ => return Err("several memory operands"),
        };
        let (memory, size) = (*memory, memory_size(memory.memory_size().size()));
        let reads = matches!(memory.access(), OpAccess::Read | OpAccess::CondRead);
        let (base, index) = (it.memory_base(), it.memory_index());
        let displacement = it.memory_displacement64() as i64;
        let good = match (it.memory_segment(), base, index) {
            (R::GS, R::None, R::None) => {
                let end = displacement.saturating_add(size);
                let here = displacement >= 0 && end <= size_of::<Vcpu>() as i64;
                let changes =
                    || privileged::may_change(it, displacement as u64, &self.value, &self.address);
                let fills = || self.streams.may_store(it, &self.value, &self.address);
                let may = may_be_written(displacement, end) || self.keeps(it);
                here && (reads || may || changes() || fills())
            }
            (R::GS, R::None, ADDRESS) => {
                let tables = [fields::JUMP_KEYS, fields::JUMP_HOSTS];
                let table = tables.iter().any(|Field(at)| i64::from(*at) == displacement);
                self.address == Known::Slot && reads && table && it.memory_index_scale() == 8
            }
            (_, VALUE, R::None) => match &self.value {
                Known::Entry(_) => {
                    let stores = i64::from(TLB_STORES);
                    let at = displacement.wrapping_sub(stores);
                    let at = if at >= 0 { at } else { displacement };
                    reads && size == 8 && (0..=i64::from(TLB_ADDEND)).contains(&at)
                }
                Known::Tables => {
                    let end = displacement.saturating_add(size);
                    reads && displacement >= 0 && end <= size_of::<DataTables>() as i64
                }
                Known::Events => reads && displacement == 0 && size == 4,
                Known::SpanEntry(_) => reads && displacement == 0 && size == 1,
                _ => false,
            },
            (_, R::RSP, _) => returns::of_last_call(it),
            (_, ADDRESS, index) => match &self.address {
                Known::Host { len, stores } => {
                    index == R::None && displacement == 0 && size <= *len && (reads || *stores)
                }
                Known::Addend(shown) => {
                    let register = [Term::Register(index, it.memory_index_scale())];
                    let terms = if index == R::None { &[][..] } else { &register };
                    shown.covers(terms, displacement, size) && (reads || shown.stores)
                }
                Known::PageOf(shown) => {
                    let end = displacement.saturating_add(size);
                    let len = shown.last.offset.saturating_sub(shown.first.offset);
                    let inside = displacement >= 0 && end.saturating_sub(1) <= len;
                    self.is_in_page(it) && inside && (reads || shown.stores)
                }
                Known::Pointer(pointer) => {
                    let last = displacement.saturating_add(size).saturating_sub(1);
                    let inside = displacement >= pointer.first && last <= pointer.last;
                    index == R::None && inside && (reads || pointer.stores)
                }
                _ => false,
            },
            _ => false,
        };
        if good { Ok(()) } else { Err("an access to memory that nothing allows") }
    }

    /// Whether `it` keeps the pointer in [`ADDRESS`], and nothing else.
    fn keeps(&self, it: &Instruction) -> bool {
        it.code() == Code::Mov_rm64_r64
            && it.op1_register() == ADDRESS
            && Kept::of(&self.address).is_some()
            && Pointers::place(it.memory_displacement64()).is_some()
    }

    fn registers(&mut self, it: &Instruction) -> Result<(), &'static str> {
        for used in self.factory.info(it).used_registers() {
            let register = used.register();
            if register.full_register() == R::RSP && !returns::may_use_the_stack(it) {
                return Err("the host's stack pointer");
            }
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            if register.is_segment_register() && written || register.is_cr() || register.is_dr() {
                return Err("a system register");
            }
        }
        match it.mnemonic() {
            M::Wrfsbase | M::Wrgsbase | M::Syscall | M::Cpuid | M::Ldmxcsr => Err("a system's"),
            _ => Ok(()),
        }
    }

    /// What is known behind `it`.
    fn follow(&mut self, it: &Instruction) {
        if privileged::changes_view(it) && it.mnemonic() == M::Mov {
            self.forget();
            self.streams.view_changed();
            self.pointers = Pointers::default();
            return;
        }
        let first = if it.op_count() > 0 && it.op0_kind() == OpKind::Register {
            it.op0_register()
        } else {
            R::None
        };
        if it.mnemonic() == M::Test {
            return;
        }
        if it.mnemonic() == M::Cmp {
            self.compared = if first == ADDRESS && it.memory_base() == VALUE {
                self.compares(it)
            } else {
                None
            };
            self.asked = self.asks(it);
            return;
        }
        self.changes(it);
        let of = |register: R| (first.full_register() == register).then_some(());
        if of(VALUE).is_some() {
            self.value = self.result(it, self.value.clone());
            self.compared = None;
        } else if of(ADDRESS).is_some() {
            self.address = self.result(it, self.address.clone());
            self.compared = None;
        }
        for used in self.factory.info(it).used_registers() {
            if matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
                continue;
            }
            match used.register().full_register() {
                VALUE => {
                    if of(VALUE).is_none() {
                        self.value = Known::Nothing;
                    }
                    // It was what says where in the page an access may begin.
                    if let Known::PageOf(_) = self.address {
                        self.address = Known::Nothing;
                    }
                }
                ADDRESS if of(ADDRESS).is_none() => self.address = Known::Nothing,
                _ => {}
            }
        }
        if let Some(at) = first_field(it) {
            if self.keeps(it)
                && let Some(kept) = Kept::of(&self.address)
            {
                self.pointers.keep(at, kept);
            }
            // A guest's register that an address was made of has changed, if it is a field.
            let changed = Term::Field(at as u32, 1);
            self.pointers.field_changes(&changed);
            self.shown.take_if(|shown| shown.has(&changed));
            self.mirrored.take_if(|shown| shown.has(&changed));
            if matches!(&self.address, Known::Addend(shown) if shown.has(&changed)) {
                self.address = Known::Nothing;
            }
        }
    }

    /// What is shown if [`ADDRESS`] equals the tag that `it` compares it with.
    fn compares(&self, it: &Instruction) -> Option<Shown> {
        let at = it.memory_displacement64().checked_sub(u64::from(TLB_TAG))?;
        let stores = at >= u64::from(TLB_STORES);
        match (&self.address, &self.value) {
            (Known::Tag(last), Known::Entry(first)) => {
                let known = at == 0 || at == u64::from(TLB_STORES);
                let (first, last) = (first.clone(), last.clone());
                // What is further apart may be in two pages that share an entry.
                let near = (0..4096).contains(&last.offset.wrapping_sub(first.offset));
                (known && near).then_some(Shown { first, last, stores, at })
            }
            (Known::Tag(page), Known::Tables) if page.terms.is_empty() => {
                let entry = page.offset as u64 >> 8 & 0x1_fff0;
                let right = at == entry || at == entry.wrapping_add(u64::from(TLB_STORES));
                let last = Sum { terms: Vec::new(), offset: page.offset | 0xfff };
                right.then(|| Shown { first: page.clone(), last, stores, at })
            }
            _ => None,
        }
    }
}

/// Whether a block may write the vCPU's bytes from `start` to `end`: guest registers, flags,
/// and what it keeps between two steps.
fn may_be_written(start: i64, end: i64) -> bool {
    let word = |Field(at): Field| (i64::from(at), i64::from(at).saturating_add(8));
    let (gprs, _) = word(fields::gpr(0));
    let (_, last) = word(fields::gpr(15));
    let others = [
        fields::FLAGS,
        fields::SPARE,
        fields::SPLIT_AT,
        fields::HEAT,
        fields::MIRROR_MISSES,
        fields::GS_MISSES,
    ];
    [(gprs, last)].iter().chain(&others.map(word)).any(|(from, to)| start >= *from && end <= *to)
}

/// Sizes are small, and never negative.
fn memory_size(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

mod branches;
mod gs_pages;
mod known;
mod mirrored;
mod operands;
mod pointers;
mod privileged;
mod results;
mod returns;
mod streams;
mod stubs;
#[cfg(test)]
mod tests;
mod units;
