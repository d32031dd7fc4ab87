//! Translations that are made before they have a place in code memory: whoever makes one needs
//! nothing of the vCPU it is for, so another thread can ([`super::workshop`]).
//!
//! It is made as if it began at a certain place, and *settled* elsewhere by changing the numbers
//! that depend on it, as a clone is ([`super::relocate`]). Jobs go to and fro, and keep their
//! memory: what one thread allocates and another frees takes either of them longer.

use super::block::{self, Translated};
use super::cache::{Entry, Placed, Translator};
use super::clone::Span;
use super::manner::Manner;
use super::ops::Ops;
use super::plans::Plans;
use super::relocate::{self, Distance, MadeWith};
use super::route::Route;
use super::thunks::Thunks;
use super::trace::Trace;
use super::wishes::Wanted;
use crate::decode::cache::Tail;
use crate::memory::ram::RamFrame;
use crate::native::features::FeatureSet;

/// What is to be translated, and then what has come of it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) route: Route,
    pub(super) order: Order,
    /// Nothing before it is made, or if it cannot be.
    pub(super) made: Option<Made>,
    /// What a translation may have interpreted.
    ops: Ops,
}

/// What a translation is to be, besides its route.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    pub(super) manner: Manner,
    /// The frame that its code is in, and what has been copied of that.
    pub(super) frame: RamFrame,
    pub(super) version: u32,
    /// The second page it is in.
    pub(super) tail: Option<Tail>,
    /// What the guest's CPU has.
    pub(super) features: FeatureSet,
    /// The thunks of the code memory that it is for, and a place there.
    pub(super) thunks: Thunks,
    pub(super) base: u64,
}

/// A translation without a place.
#[derive(Debug)]
pub(super) struct Made {
    translated: Translated,
    /// Guest instructions in it, and their bytes.
    instructions: usize,
    guest_bytes: u64,
    #[cfg(test)]
    trace: Trace,
}

/// Ops that one has memory for. Few translations have more.
const OPS: usize = 256;

impl Job {
    /// One without a route.
    pub(super) fn new(order: Order) -> Self {
        Self { route: Route::default(), order, made: None, ops: Ops::in_chunks_of(OPS) }
    }

    /// The code that is translated.
    pub(super) fn wanted(&self) -> Wanted {
        (self.order.frame, self.route.rip(), self.route.mode)
    }

    /// Bytes of code that was made.
    pub(super) fn len(&self) -> usize {
        self.made.as_ref().map_or(0, |made| made.translated.code.len())
    }
}

/// Makes translations, one after the other.
#[derive(Debug)]
pub(super) struct Maker {
    plans: Plans,
    /// What those are for.
    features: FeatureSet,
    /// The last trace, for the memory it has.
    spare: Trace,
}

impl Maker {
    pub(super) fn new() -> Self {
        Self { plans: Plans::new(), features: FeatureSet::default(), spare: Trace::default() }
    }

    /// Does `job`.
    pub(super) fn make(&mut self, job: &mut Job) {
        let Job { route, order, ops, .. } = job;
        if self.features != order.features {
            (self.plans, self.features) = (Plans::new(), order.features);
        }
        ops.clear();
        let spare = std::mem::take(&mut self.spare);
        job.made = Trace::of(route, &mut self.plans, &order.features, spare).and_then(|trace| {
            let Order { thunks, base, manner, .. } = order;
            let made = block::translate(&trace, thunks, ops, *base, 0, *manner, Vec::new());
            let made = made.ok().map(|translated| Made {
                translated,
                instructions: trace.steps.len(),
                guest_bytes: trace.bytes(),
                #[cfg(test)]
                trace: trace.clone(),
            });
            self.spare = trace;
            made
        });
    }
}

/// What a translation that is settled was made with, and what it has now.
struct Settling<'a> {
    ops: &'a Ops,
    settled_ops: &'a Ops,
    /// Which of those is its first one.
    first_op: usize,
    links: &'a [block::Link],
}

impl MadeWith for Settling<'_> {
    fn op(&self, address: u64) -> Option<u64> {
        let number = self.ops.number(address, 0)?;
        let op = self.settled_ops.get(self.first_op.checked_add(number)?)?;
        Some(std::ptr::from_ref(op) as u64)
    }

    fn link(&self, number: u32) -> Option<usize> {
        self.links.get(number as usize).map(|link| link.at)
    }
}

impl Translator {
    /// Gives what `job` has made a place, for which there is room.
    pub(super) fn settle(&mut self, job: &mut Job) -> Option<Entry> {
        let (frame, rip, mode) = job.wanted();
        let Job { order, made, ops, .. } = job;
        let Made { translated, instructions, guest_bytes, .. } = made.as_mut()?;
        let Translated { code, links, relocations, landings, .. } = translated;
        let offset = self.regions.next_offset()?;
        let address = self.memory.address(offset as usize) as u64;
        let newest = self.regions.newest()?;
        let first_op = newest.ops.count();
        let first_link = self.regions.number(newest.links.len())?;
        let region = self.regions.current()?;
        for op in 0..ops.count() {
            region.ops.keep(ops.get(op)?);
        }
        let settling = Settling { ops, settled_ops: &region.ops, first_op, links };
        let host = address.wrapping_sub(order.base);
        let distance = Distance { guest: 0, host, links: first_link };
        relocate::relocate(code, relocations, distance, &settling)?;
        let placed = Placed {
            rip,
            mode,
            offset,
            len: u32::try_from(code.len()).ok()?,
            way_out: u32::try_from(translated.way_out).ok()?,
            first_link,
            first_op: u32::try_from(first_op).ok()?,
            ops: u16::try_from(ops.count()).ok()?,
            instructions: u16::try_from(*instructions).ok()?,
            relocations: Span::of_movable(&mut region.relocations, relocations, translated.movable),
            landings: Span::push(&mut region.landings, landings),
            frame,
            stale: false,
            manner: order.manner,
        };
        let entry = self.add(code, links, placed, order.version, order.tail)?;
        self.count(*guest_bytes);
        #[cfg(test)]
        if let Some(made) = made {
            self.remember(&made.trace, order.manner);
            super::clone::tests::compare_newest(self, &made.translated.links);
        }
        Some(entry)
    }
}
