//! Streams: accesses of a loop that step through memory.
//!
//! A loop that walks an array stays in one page for many turns. So in hot loops an access, or
//! a group of them, whose registers only move by constants compares its address with the page
//! of its last turn, which the vCPU keeps ([`Stream`]): five instructions instead of ten, and
//! the address of the data does not wait for a look into the TLB. The comparison leaves how far
//! in the page the data is, which is all that the access needs then. Only where it leaves that
//! page it looks there, and keeps the next one.
//!
//! What is kept holds until the trace is left, as what was checked together does; so it is
//! forgotten at each beginning of the trace.

use std::ops::RangeInclusive;

use super::access::Place;
use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::block::{Apart, Block};
use super::cold::{Cold, Fix};
use super::fields;
use super::registers::{ADDRESS, VALUE};
use super::shapes::How;
use super::sharing::{Group, Share, walk};
use super::trace::Trace;
use crate::addr::PAGE_SIZE;

#[cfg(test)]
mod tests;

/// The page that accesses of one stream were in.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Stream {
    /// Its address.
    pub(super) page: u64,
    /// How far in it they may begin: nowhere, if nothing is kept.
    pub(super) limit: u64,
    /// Where it is in host memory.
    pub(super) host: u64,
}

/// How many there can be in a trace: the first of them load, the others may store.
pub(super) const STREAMS: u8 = 16;
/// Those that load.
pub(super) const LOADING: u8 = 12;
/// Most bytes that a turn moves by what is a stream rather than looked for in the mirror: there
/// is another page every so often.
const SHORT: u64 = PAGE_SIZE / 16;

impl Block<'_> {
    /// Makes streams of the groups of `trace` that are worth it.
    pub(super) fn find_streams(&self, trace: &Trace, shares: &mut [Share]) {
        let changes_view =
            trace.steps.iter().any(|step| matches!(step.shape.how, How::Privileged(_)));
        if !self.manner.hot || changes_view {
            return;
        }
        let loops: Vec<_> = trace.loops().collect();
        let (mut loads, mut stores) = (0..LOADING, LOADING..STREAMS);
        for (n, share) in shares.iter_mut().enumerate() {
            let Share::Leads { group, .. } = share else { continue };
            if group.origin.narrow {
                continue;
            }
            let inner = loops
                .iter()
                .filter(|steps| steps.contains(&n))
                .min_by_key(|steps| steps.end().saturating_sub(*steps.start()));
            let walk = |m: usize| {
                let (step, op) = (trace.steps.get(m)?, trace.ops.get(m)?);
                walk(step, op, group.origin, self.writes_of(m), trace.mode)
            };
            let stride = |inner: &RangeInclusive<usize>| {
                inner.clone().try_fold(0_i64, |sum, m| sum.checked_add(walk(m)?))
            };
            let most = if group.mirrored { SHORT } else { u64::MAX };
            let short = |stride: i64| stride.unsigned_abs() <= most;
            if !group.is_wide() && inner.and_then(stride).is_some_and(short) {
                group.stream = if group.stores { stores.next() } else { loads.next() };
                group.mirrored &= group.stream.is_none();
            }
        }
    }

    /// Forgets what was kept for the streams of this trace before.
    pub(super) fn forget_streams(&mut self) {
        for stream in self.streams() {
            self.code.limit_stream(stream, 0);
        }
    }

    /// Checks all that `group` may access, which is stream number `stream`, or goes to `slow`.
    /// Says where the access at `at` is then: it may need what is in [`VALUE`].
    ///
    /// # Errors
    /// As [`Assembler::check_group`].
    pub(super) fn check_stream(
        &mut self,
        group: &Group,
        stream: u8,
        at: i64,
        slow: Label,
    ) -> Result<Place, NotCopied> {
        let (again, away) = (self.code.label(), self.code.label());
        let what = Cold::Fill { group: self.groups.add(*group), stream, again, slow };
        let fill = Apart { at: away, fix: Fix::None, homes: self.code.homes, note: None, what };
        // The last of them is the instruction's own.
        let last = self.cold.len().saturating_sub(1);
        self.cold.insert(last, fill);
        self.code.bind(again);
        self.code.in_stream(group, stream, away, slow)?;
        if !group.is_shared() {
            return Ok(Place::from(VALUE, 1, at.wrapping_sub(group.first)));
        }
        self.code.lea(ADDRESS, ADDRESS, VALUE, 1, group.zero.wrapping_sub(group.first))?;
        self.code.store(fields::shared(group.place), ADDRESS);
        Ok(Place::at(at))
    }
}

impl Assembler {
    /// Looks whether `group` lies in the page of `stream`, or goes to `fill`. Where that page is
    /// in host memory is in [`ADDRESS`] then, and how far in it the group begins in [`VALUE`].
    fn in_stream(
        &mut self,
        group: &Group,
        stream: u8,
        fill: Label,
        slow: Label,
    ) -> Result<(), NotCopied> {
        self.aligned(group, slow)?;
        self.sum(VALUE, group.origin, group.first)?;
        self.subtract(VALUE, fields::stream_page(stream));
        self.compare(VALUE, fields::stream_limit(stream));
        self.jump_if(Condition::BELOW.negated(), fill);
        self.load(ADDRESS, fields::stream_host(stream));
        Ok(())
    }

    /// Finds the page that `group` lies in, or goes to `slow`, keeps it for `stream` and goes
    /// back to look `again`. Uses [`VALUE`] and [`ADDRESS`].
    ///
    /// # Errors
    /// As [`Assembler::check_group`].
    pub(super) fn fill_stream(
        &mut self,
        group: &Group,
        stream: u8,
        again: Label,
        slow: Label,
    ) -> Result<(), NotCopied> {
        self.find_group(group, slow)?;
        self.sum(VALUE, group.origin, group.first)?;
        // and rax, -4096
        self.bytes(&[0x48, 0x25, 0x00, 0xf0, 0xff, 0xff]);
        self.store(fields::stream_page(stream), VALUE);
        self.lea(ADDRESS, ADDRESS, VALUE, 1, 0)?;
        self.store(fields::stream_host(stream), ADDRESS);
        let len = group.last.wrapping_sub(group.first) as u64;
        self.limit_stream(stream, PAGE_SIZE.saturating_sub(len) as i32);
        self.jump(again);
        Ok(())
    }

    fn limit_stream(&mut self, stream: u8, limit: i32) {
        self.store_constant(fields::stream_limit(stream), limit);
    }
}
