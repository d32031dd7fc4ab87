//! String instructions: `movs`, `stos`, `lods`, `scas`, `cmps`, one element each, and `rep movs`
//! and `rep stos`, a run of elements within a page at a time.
//!
//! One element is a load or a store like others, and a step of its pointers. A run is done by a
//! thunk ([`super::string_runs`]), all of it or nothing: what cannot be done at once (a run that
//! reaches into another page, a page with code on it, backwards) the interpreter does from where
//! registers are, and these say exactly that at any time. So nothing but the interpreter is ever
//! in the middle of an instruction. The other repeated ones are interpreted, as is what has a
//! segment that is not flat.

use iced_x86::{Code, Instruction, MemoryOperand, Mnemonic as M, OpKind, Register as R};

use super::access::{Access, Place};
use super::assembler::{Condition, Label, NotCopied};
use super::block::Block;
use super::cold::Cold;
use super::fields;
use super::registers::{ACCUMULATOR, GprSet, Home, VALUE, of_word, part, whole};
use crate::decode::op::{Op, OpFlags};
use crate::state::rflags::RFlags;
use crate::state::segment::SegReg;
use crate::state::{GPR_ZERO, SEG_FLAT};

#[cfg(test)]
mod tests;

const RAX: u8 = 0;
const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;

/// What is done to each element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Move,
    Store,
    Load,
    /// With the accumulator.
    Scan,
    Compare,
}

impl Work {
    /// Whether it follows RSI, and RDI.
    const fn pointers(self) -> (bool, bool) {
        match self {
            Self::Move | Self::Compare => (true, true),
            Self::Store | Self::Scan => (false, true),
            Self::Load => (true, false),
        }
    }
}

/// A string instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StringUse {
    pub(super) work: Work,
    /// Bytes of an element.
    pub(super) word: u8,
    /// It has a prefix that repeats it.
    pub(super) repeated: bool,
    /// Its addresses have 32 bits.
    pub(super) narrow: bool,
}

impl StringUse {
    /// What `it` is, if it is done here.
    pub(super) fn of(it: &Instruction) -> Option<Self> {
        if !it.is_string_instruction() {
            return None;
        }
        let work = match it.mnemonic() {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => Work::Move,
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => Work::Store,
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Work::Load,
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => Work::Scan,
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => Work::Compare,
            _ => return None,
        };
        let narrow = it.op_kinds().find_map(|kind| match kind {
            OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(false),
            OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(true),
            _ => None,
        })?;
        let repeated = it.has_rep_prefix() || it.has_repne_prefix();
        if repeated && !matches!(work, Work::Move | Work::Store) {
            return None;
        }
        let word = u8::try_from(it.memory_size().size()).ok()?;
        Some(Self { work, word, repeated, narrow })
    }

    /// Guest registers that it changes.
    pub(super) fn writes(self) -> GprSet {
        let (source, destination) = self.work.pointers();
        let loads = self.work == Work::Load;
        let all = [(source, RSI), (destination, RDI), (self.repeated, RCX), (loads, RAX)];
        all.into_iter().filter(|(changes, _)| *changes).map(|(_, number)| number).collect()
    }

    /// Whether it makes all flags.
    pub(super) fn makes_flags(self) -> bool {
        matches!(self.work, Work::Scan | Work::Compare)
    }
}

impl Block<'_> {
    /// A string instruction.
    ///
    /// # Errors
    /// It must be interpreted.
    pub(super) fn string(&mut self, it: StringUse, op: &Op) -> Result<(), NotCopied> {
        let legacy = op.flags.contains(OpFlags::LEGACY);
        let at = |base, seg| {
            self.mode.operand(&Op { base, index: GPR_ZERO, disp: 0, scale: 0, seg, ..*op })
        };
        let source = at(RSI, op.seg);
        let destination = at(RDI, if legacy { SegReg::Es as u8 } else { SEG_FLAT });
        let (from, to) = it.work.pointers();
        if from && source.seg != SEG_FLAT || to && destination.seg != SEG_FLAT {
            return Err(NotCopied);
        }
        let lent = |number: u8| self.code.homes.of(number) != Home::Host(whole(number));
        if from && lent(RSI) || to && lent(RDI) {
            return Err(NotCopied);
        }
        self.lose_flags()?;
        self.in_address = None;
        let resume = self.code.label();
        let kept = self.keep(op);
        let slow = self.apart(Cold::Interpret { op: kept, resume, to_host: false, again: None });
        if it.repeated {
            self.overwrite(it.writes())?;
            self.code.call(self.thunks.strings.of(it).ok_or(NotCopied)?);
            self.code.jump_if(Condition::NOT_EQUAL, slow);
        } else {
            self.code.test_field(fields::RFLAGS, RFlags::DF.bits() as u32);
            self.code.jump_if(Condition::NOT_EQUAL, slow);
            self.element(it, &source, &destination, slow)?;
            for (number, used) in [(RSI, from), (RDI, to)] {
                if used {
                    let pointer = whole(number);
                    let moved = if it.narrow { part(pointer, R::EAX) } else { pointer };
                    self.code.lea(moved, pointer, R::None, 1, it.word.into())?;
                }
            }
        }
        self.resume_here();
        Ok(())
    }

    /// One element; pointers stay.
    fn element(
        &mut self,
        it: StringUse,
        source: &Op,
        destination: &Op,
        slow: Label,
    ) -> Result<(), NotCopied> {
        let word = it.word;
        let writes = it.writes();
        match it.work {
            Work::Move => {
                self.first(source, word, slow)?;
                let place = self.code.check(destination, Access::store(word), slow)?;
                self.overwrite(writes)?;
                self.code.load(VALUE, fields::SPARE);
                self.store_word(place, VALUE, word)
            }
            Work::Store => {
                let place = self.code.check(destination, Access::store(word), slow)?;
                self.overwrite(writes)?;
                self.store_word(place, ACCUMULATOR, word)
            }
            Work::Load => {
                let place = self.code.check(source, Access::load(word), slow)?;
                self.overwrite(writes)?;
                let code =
                    [Code::Mov_r8_rm8, Code::Mov_r16_rm16, Code::Mov_r32_rm32, Code::Mov_r64_rm64];
                self.word_from(code, ACCUMULATOR, place, word)
            }
            Work::Scan => {
                let place = self.code.check(destination, Access::load(word), slow)?;
                self.compare_word(ACCUMULATOR, place, word)
            }
            Work::Compare => {
                self.first(source, word, slow)?;
                let place = self.code.check(destination, Access::load(word), slow)?;
                self.code.load(VALUE, fields::SPARE);
                self.compare_word(VALUE, place, word)
            }
        }
    }

    /// The element at `source`, into the context's spare field.
    fn first(&mut self, source: &Op, word: u8, slow: Label) -> Result<(), NotCopied> {
        let place = self.code.check(source, Access::load(word), slow)?;
        let code =
            [Code::Movzx_r32_rm8, Code::Movzx_r32_rm16, Code::Mov_r32_rm32, Code::Mov_r64_rm64];
        let whole = if word < 4 { 4 } else { word };
        let load = Instruction::with2(pick(code, word)?, of_word(VALUE, whole), place.operand());
        self.code.emit(&load.map_err(|_| NotCopied)?)?;
        self.code.store(fields::SPARE, VALUE);
        Ok(())
    }

    fn store_word(&mut self, place: Place, from: R, word: u8) -> Result<(), NotCopied> {
        let code = [Code::Mov_rm8_r8, Code::Mov_rm16_r16, Code::Mov_rm32_r32, Code::Mov_rm64_r64];
        let store = Instruction::with2::<MemoryOperand, R>(
            pick(code, word)?,
            place.operand(),
            of_word(from, word),
        );
        self.code.emit(&store.map_err(|_| NotCopied)?)
    }

    fn compare_word(&mut self, with: R, place: Place, word: u8) -> Result<(), NotCopied> {
        let code = [Code::Cmp_r8_rm8, Code::Cmp_r16_rm16, Code::Cmp_r32_rm32, Code::Cmp_r64_rm64];
        self.word_from(code, with, place, word)?;
        self.made_flags(None);
        Ok(())
    }

    /// That of four instructions which has elements of `word` bytes, on `register` and `place`.
    fn word_from(
        &mut self,
        code: [Code; 4],
        register: R,
        place: Place,
        word: u8,
    ) -> Result<(), NotCopied> {
        let it = Instruction::with2(pick(code, word)?, of_word(register, word), place.operand());
        self.code.emit(&it.map_err(|_| NotCopied)?)
    }
}

/// That of `codes`, for one, two, four and eight bytes, for `word` bytes.
fn pick(codes: [Code; 4], word: u8) -> Result<Code, NotCopied> {
    codes.get(word.trailing_zeros() as usize).copied().ok_or(NotCopied)
}
