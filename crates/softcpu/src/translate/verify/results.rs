//! What instructions make of the two scratch registers: the verifier's algebra of addresses.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register as R};

use super::Look;
use super::known::{Known, Shown, Sum, Term};
use super::operands::field;
use super::pointers::{Kept, Pointers};
use crate::mmu::mirror::SPAN_SHIFT;
use crate::translate::fields::{self, Field, TLB_ADDEND};
use crate::translate::jumps;
use crate::translate::registers::{ADDRESS, VALUE};

impl Look<'_> {
    /// What `it` makes of its first operand, a scratch register that held `before`.
    pub(super) fn result(&self, it: &Instruction, before: Known) -> Known {
        if let Some(known) = self.streams.result(it, &before).or_else(|| self.gs_pages.result(it)) {
            return known;
        }
        if it.op0_register().size() == 2 {
            // Of the rest nobody keeps account.
            return Known::Nothing;
        }
        let second = (it.op_count() > 1).then(|| it.op1_kind());
        let immediate = it.try_immediate(1).ok();
        let loaded = field(it).filter(|_| second == Some(OpKind::Memory)).map(|at| at as u32);
        let source = (second == Some(OpKind::Register)).then(|| it.op1_register());
        let wide = it.op0_register().size() == 8;
        match (it.mnemonic(), before, loaded) {
            (M::Mov, _, Some(at)) if wide && at == fields::EVENTS.0 => Known::Events,
            (M::Mov, _, Some(at)) if wide && at == fields::GS_BASE_KNOWN.0 => Known::GsBase,
            (M::Mov, _, Some(at)) if wide && at == fields::TLB.0 => Known::Tables,
            (M::Mov, _, Some(at))
                if wide && (at == fields::TLB_PLAIN.0 || at == fields::TLB_OVER.0) =>
            {
                Known::View
            }
            (M::Mov, ..) if wide && it.memory_base() == VALUE && second == Some(OpKind::Memory) => {
                self.checked(it).map_or(Known::Nothing, |shown| Known::Addend(shown.clone()))
            }
            (M::Mov, _, Some(at)) if wide && Pointers::place(u64::from(at)).is_some() => {
                let kept = self.pointers.kept(u64::from(at));
                let right = it.op0_register() == ADDRESS;
                kept.filter(|_| right).map_or(Known::Nothing, Kept::known)
            }
            (M::Mov, _, Some(at)) if wide && at == fields::MIRROR_DISTANCE.0 => {
                self.mirrored.clone().map_or(Known::Nothing, Known::Addend)
            }
            (M::Mov, _, Some(at)) if wide => Known::Address(Sum::field(Field(at))),
            (M::Mov, _, None) => match source {
                Some(source) if wide => self.sum_of(source).map_or(Known::Nothing, Known::Address),
                Some(source) if source.size() == 4 => {
                    self.sum_of(source).map_or(Known::Nothing, |sum| Known::Address(sum.narrow()))
                }
                None => immediate.map_or(Known::Nothing, |value| {
                    Known::Address(Sum { terms: Vec::new(), offset: value as i64 })
                }),
                _ => Known::Nothing,
            },
            (M::Movzx, _, None) if it.code() == Code::Movzx_r32_rm16 => source
                .and_then(|source| self.sum_of(source)?.lowest())
                .map_or(Known::Nothing, Known::Address),
            (M::Lea, Known::PageOf(shown), _) => {
                let distance = it.memory_displacement64() as i64;
                let inside = self.is_in_page(it).then(|| shown.behind_first(distance)).flatten();
                inside.map_or(Known::Nothing, Known::Pointer)
            }
            (M::Lea, Known::Addend(shown), _)
                if self.is_in_page(it) && self.value == Known::Page(shown.first.clone()) =>
            {
                let page = it.memory_displacement64() == 0 && it.op0_register() == ADDRESS;
                if page { Known::HostPage(shown) } else { Known::Nothing }
            }
            (M::Lea, Known::Addend(shown), _) if it.memory_base() == ADDRESS => {
                let alone = it.memory_index_scale() == 1 && it.op0_register() == ADDRESS;
                let part = Term::Register(it.memory_index().full_register(), 1);
                let nothing_else = alone && it.memory_displacement64() == 0;
                if let Some(rest) = shown.without(&part).filter(|_| nothing_else) {
                    return Known::Addend(rest);
                }
                let sum = self.sum_of(it.memory_index()).filter(|_| alone);
                let distance = it.memory_displacement64() as i64;
                let pointer = sum.and_then(|sum| shown.from(&sum)?.moved(distance));
                pointer.map_or(Known::Nothing, Known::Pointer)
            }
            (M::Lea, ..) => self.lea(it).map_or(Known::Nothing, Known::Address),
            (M::Add, Known::Address(sum), Some(at)) => {
                let mut sum = if wide { sum } else { sum.unlimited() };
                sum.terms.push(Term::Field(at, 1));
                Known::Address(if wide { sum } else { sum.narrow() })
            }
            (M::Shr, Known::Address(sum), _)
                if wide && immediate == Some(u64::from(SPAN_SHIFT)) =>
            {
                Known::Span(sum)
            }
            (M::Add, Known::Span(sum), Some(at)) if wide && at == fields::MIRROR.0 => {
                Known::SpanEntry(sum)
            }
            (M::Shr, Known::Address(sum), _) if second == Some(OpKind::Immediate8) => {
                // Which bits are left is for the mask to say.
                Known::Address(sum)
            }
            (M::And, Known::Address(sum), None) if sum == Sum::field(fields::VECTORS) => {
                immediate.map_or(Known::Nothing, Known::Units)
            }
            (M::And, Known::Address(sum), None) if immediate.is_some() => match immediate {
                Some(0x1_fff0) => Known::Index(sum),
                Some(0xffff_ffff_ffff_f000) => Known::Page(sum),
                _ => Known::Nothing,
            },
            (M::And, _, None)
                if second == Some(OpKind::Immediate32)
                    && immediate == Some(u64::from(jumps::MASK)) =>
            {
                Known::Slot
            }
            (M::Add, Known::Index(sum), Some(at)) if at == fields::TLB.0 => Known::Entry(sum),
            (M::Or, Known::Page(sum), Some(at)) if at == fields::SPACE.0 => Known::Tag(sum),
            (M::Or, Known::Address(sum), Some(at))
                if at == fields::SPACE.0 && sum.terms.is_empty() && sum.offset & 0xfff == 0 =>
            {
                Known::Tag(sum)
            }
            (M::Add, Known::Address(sum), None) if it.memory_base() == VALUE => self.host(it, &sum),
            (M::Add, Known::Addend(shown), None) if source == Some(VALUE) => match &self.value {
                Known::Address(sum) if sum.terms.is_empty() && shown.first.terms.is_empty() => {
                    let len = shown.last.offset.wrapping_sub(sum.offset).wrapping_add(1);
                    let inside = (shown.first.offset..=shown.last.offset).contains(&sum.offset);
                    if inside { Known::Host { len, stores: shown.stores } } else { Known::Nothing }
                }
                _ => Known::Nothing,
            },
            _ => Known::Nothing,
        }
    }

    /// Whether the memory operand of `it` is both scratch registers, one of them where a page
    /// is and the other how far in it.
    pub(super) fn is_in_page(&self, it: &Instruction) -> bool {
        (it.memory_base(), it.memory_index(), it.memory_index_scale()) == (ADDRESS, VALUE, 1)
    }

    /// What the last check has shown, if `it` reads the addend of the entry that was checked.
    fn checked(&self, it: &Instruction) -> Option<&Shown> {
        let shown = self.shown.as_ref()?;
        let at = shown.at.wrapping_add(u64::from(TLB_ADDEND));
        let same = match &self.value {
            Known::Entry(entry) => *entry == shown.first,
            Known::Tables => true,
            _ => false,
        };
        (same && it.memory_displacement64() == at).then_some(shown)
    }

    /// The host address of `sum`, if the last check was of just that address, or of one at a
    /// distance from there.
    fn host(&self, it: &Instruction, sum: &Sum) -> Known {
        match self.checked(it) {
            Some(shown) if shown.first == *sum && shown.last.terms == sum.terms => {
                let len = shown.last.offset.wrapping_sub(sum.offset).wrapping_add(1);
                Known::Host { len, stores: shown.stores }
            }
            Some(shown) => shown.from(sum).map_or(Known::Nothing, Known::Pointer),
            None => Known::Nothing,
        }
    }

    fn sum_of(&self, register: R) -> Option<Sum> {
        let known = match register.full_register() {
            VALUE => Some(&self.value),
            ADDRESS => Some(&self.address),
            _ => None,
        };
        match known {
            Some(Known::Address(sum)) => Some(sum.clone()),
            Some(_) => None,
            None => {
                Some(Sum { terms: vec![Term::Register(register.full_register(), 1)], offset: 0 })
            }
        }
    }

    fn lea(&self, it: &Instruction) -> Option<Sum> {
        let mut sum = Sum::default();
        let wide = it.op0_register().size() == 8;
        if it.memory_base() != R::None {
            sum = self.sum_of(it.memory_base())?;
            if !wide {
                sum = sum.unlimited();
            } else if sum.is_narrow() {
                return None;
            }
        }
        if it.memory_index() != R::None {
            let scale = it.memory_index_scale();
            let index = self.sum_of(it.memory_index())?;
            if index.offset != 0 {
                return None;
            }
            for term in index.terms {
                sum.terms.push(match term {
                    Term::Register(register, 1) => Term::Register(register, scale),
                    Term::Field(field, 1) => Term::Field(field, scale),
                    _ => return None,
                });
            }
        }
        if sum.is_fixed() && it.memory_displacement64() != 0 {
            return None;
        }
        sum.offset = sum.offset.wrapping_add(it.memory_displacement64() as i64);
        Some(if wide { sum } else { sum.narrow() })
    }
}
