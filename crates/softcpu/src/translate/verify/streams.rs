//! Streams: is what a trace keeps of a page what a TLB check has shown, and is it used for no
//! more than that?
//!
//! A stream is filled by three stores in a row: the page that a check was of, where that is in
//! host memory, and how far in it accesses may begin, which is never so far that one reaches the
//! page's end. It
//! is emptied where the trace begins. So whatever is in it may be used by whoever has compared
//! with its page and its limit.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register as R};

use super::known::{Known, Shown, Sum};
use super::operands::field;
use crate::addr::PAGE_SIZE;
use crate::translate::fields::{self, Field};
use crate::translate::registers::{ADDRESS, VALUE};
use crate::translate::streams::{LOADING, STREAMS};

/// What is known of a trace's streams.
#[derive(Debug, Default)]
pub(super) struct Streams {
    /// The farthest that each may ever begin, over all the code.
    limits: [Option<u64>; STREAMS as usize],
    /// Those that were emptied at the beginning, a bit each.
    emptied: u32,
    /// Nothing was jumped over or to so far.
    behind_beginning: bool,
    filling: Option<Filling>,
    /// An address was just compared with the limit of a stream.
    compared: Option<(u8, Sum)>,
    /// It lies in the page of the stream.
    within: Option<(u8, Sum)>,
}

/// A stream of which a part is new.
#[derive(Debug)]
struct Filling {
    stream: u8,
    shown: Shown,
    has_host: bool,
}

/// A field of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Page,
    Limit,
    Host,
}

/// Which part of which stream `it` has as its memory operand.
fn part_of(it: &Instruction) -> Option<(u8, Part)> {
    let here = field(it)?;
    let is = |Field(at): Field| u64::from(at) == here;
    (0..STREAMS).find_map(|stream| {
        let parts = [
            (fields::stream_page(stream), Part::Page),
            (fields::stream_limit(stream), Part::Limit),
            (fields::stream_host(stream), Part::Host),
        ];
        parts.into_iter().find(|(field, _)| is(*field)).map(|(_, part)| (stream, part))
    })
}

/// The limit that `it` sets, and of which stream.
fn limit_set(it: &Instruction) -> Option<(u8, u64)> {
    match part_of(it) {
        Some((stream, Part::Limit)) if it.code() == Code::Mov_rm64_imm32 => {
            Some((stream, it.immediate(1)))
        }
        _ => None,
    }
}

impl Streams {
    /// Those of this code.
    pub(super) fn of(code: &[Instruction]) -> Self {
        let mut streams = Self::default();
        for (stream, limit) in code.iter().filter_map(limit_set).filter(|(_, limit)| *limit != 0) {
            if let Some(most) = streams.limits.get_mut(usize::from(stream)) {
                *most = Some(most.map_or(limit, |most| most.max(limit)));
            }
        }
        streams
    }

    /// The code may be come to here from elsewhere, or left.
    pub(super) fn road(&mut self) -> Result<(), &'static str> {
        self.behind_beginning = true;
        (self.compared, self.within) = (None, None);
        if self.filling.is_some() { Err("a stream that is filled in part") } else { Ok(()) }
    }

    /// A conditional jump: the way on is taken if it does not hold.
    pub(super) fn unless(&mut self, it: &Instruction) -> Result<(), &'static str> {
        let compared = self.compared.take().filter(|_| it.mnemonic() == M::Jae);
        self.road()?;
        self.within = compared;
        Ok(())
    }

    /// Whether `it` may store to the part of a stream that it stores to.
    pub(super) fn may_store(&self, it: &Instruction, value: &Known, address: &Known) -> bool {
        let Some((stream, part)) = part_of(it) else { return false };
        let filling = self.filling.as_ref().filter(|filling| filling.stream == stream);
        let from = |register: R| it.code() == Code::Mov_rm64_r64 && it.op1_register() == register;
        match part {
            Part::Page => match (value, address) {
                (Known::Page(page), Known::Addend(shown)) => {
                    let alike = shown.first.terms == shown.last.terms && *page == shown.first;
                    let stores = stream < LOADING || shown.stores;
                    self.filling.is_none() && from(VALUE) && alike && stores
                }
                _ => false,
            },
            Part::Host => filling.is_some_and(|filling| {
                from(ADDRESS) && *address == Known::HostPage(filling.shown.clone())
            }),
            Part::Limit => match (limit_set(it), filling) {
                (Some((_, 0)), None) => !self.behind_beginning,
                (Some((_, limit)), Some(filling)) => {
                    let Shown { first, last, .. } = &filling.shown;
                    let len = last.offset.wrapping_sub(first.offset);
                    let most = u64::try_from(len).ok().and_then(|len| PAGE_SIZE.checked_sub(len));
                    filling.has_host && most.is_some_and(|most| (1..=most).contains(&limit))
                }
                _ => false,
            },
        }
    }

    /// Behind `it`, which was allowed, and before which the scratch registers held these.
    ///
    /// # Errors
    /// When it does anything else amid filling a stream.
    pub(super) fn follow(
        &mut self,
        it: &Instruction,
        value: &Known,
        address: &Known,
    ) -> Result<(), &'static str> {
        self.compared = None;
        let Some((stream, part)) = part_of(it) else {
            let on_address = it.op0_kind() == OpKind::Register && it.op0_register() == ADDRESS;
            return if self.filling.is_none() || on_address && it.mnemonic() == M::Lea {
                Ok(())
            } else {
                Err("another instruction amid filling a stream")
            };
        };
        if it.op0_kind() == OpKind::Memory {
            match (part, address) {
                (Part::Page, Known::Addend(shown)) => {
                    self.filling = Some(Filling { stream, shown: shown.clone(), has_host: false });
                }
                (Part::Host, _) => {
                    if let Some(filling) = &mut self.filling {
                        filling.has_host = true;
                    }
                }
                (Part::Limit, _) => {
                    let filled = self.filling.take().is_some();
                    self.emptied |= u32::from(!filled) << (stream & 31);
                }
                _ => {}
            }
        } else if it.code() == Code::Cmp_r64_rm64
            && it.op0_register() == VALUE
            && part == Part::Limit
            && let Known::InPage(of, sum) = value
            && *of == stream
        {
            self.compared = Some((stream, sum.clone()));
        }
        Ok(())
    }

    /// Behind it, another view of memory is current.
    pub(super) fn view_changed(&mut self) {
        self.emptied = 0;
    }

    /// The instruction is done: what it found is known to nobody after it.
    pub(super) fn done(&mut self) {
        self.within = None;
    }

    /// What `it` makes of `before` in a scratch register, if that has to do with streams.
    pub(super) fn result(&self, it: &Instruction, before: &Known) -> Option<Known> {
        let (stream, part) = part_of(it)?;
        match (it.code(), part, before) {
            (Code::Sub_r64_rm64, Part::Page, Known::Address(sum)) => {
                Some(Known::InPage(stream, sum.clone()))
            }
            (Code::Mov_r64_rm64, Part::Host, _) if it.op0_register() == ADDRESS => {
                let (of, first) = self.within.as_ref()?;
                let emptied = self.emptied & 1 << (stream & 31) != 0;
                let limit = self.limits.get(usize::from(stream)).copied().flatten()?;
                let mut last = first.clone();
                let rest = i64::try_from(PAGE_SIZE.checked_sub(limit)?).ok()?;
                last.offset = last.offset.checked_add(rest)?;
                let shown =
                    Shown { first: first.clone(), last, stores: stream >= LOADING, at: u64::MAX };
                (*of == stream && emptied).then_some(Known::PageOf(shown))
            }
            _ => None,
        }
    }
}
