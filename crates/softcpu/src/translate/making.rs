//! Translations that are made before they have a place in code memory: whoever makes one needs
//! nothing of the vCPU it is for, so another thread can ([`super::workshop`]).
//!
//! It is made as if it began where the code memory does, and *settled* elsewhere by changing the
//! numbers that depend on that, as a clone is ([`super::relocate`]). Jobs go to and fro, and keep
//! their memory: what one thread allocates and another frees takes either of them longer.

use super::block::{self, Site, Translated};
use super::clone::Span;
use super::maker::Maker;
use super::manner::Manner;
use super::ops::Ops;
use super::relocate::{self, Distance, MadeWith};
use super::route::Route;
use super::thunks::Thunks;
#[cfg(test)]
use super::trace::Trace;
use super::translations::{Entry, Placed, Translations};
use super::wishes::Wanted;
use super::workbench::Workbench;
use crate::decode::cache::Tail;
use crate::decode::op::Op;
use crate::memory::ram::RamFrame;
use crate::native::features::FeatureSet;
use crate::system::tsc::host_tsc;

/// What is to be translated, and then what has come of it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) route: Route,
    pub(super) order: Order,
    /// Nothing before it is made, or if it cannot be.
    pub(super) made: Option<Made>,
    /// How many ticks of the TSC that took.
    pub(super) took: u64,
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
    /// The thunks of the code memory that it is for, and where that is executed: translations are
    /// made as if they began there, where thunks are.
    pub(super) thunks: Thunks,
    pub(super) base: u64,
}

/// A translation without a place.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) translated: Translated,
    /// Guest instructions in it, and their bytes.
    instructions: usize,
    pub(super) guest_bytes: u64,
    #[cfg(test)]
    pub(super) trace: Trace,
}

/// Ops that one has memory for: no translation has more.
const OPS: usize = 512;

impl Job {
    /// One without a route.
    pub(super) fn new(order: Order) -> Self {
        Self { route: Route::default(), order, made: None, took: 0, ops: Ops::in_chunks_of(OPS) }
    }

    /// The code that is translated.
    pub(super) fn wanted(&self) -> Wanted {
        (self.order.frame, self.route.rip(), self.route.mode)
    }

    /// Bytes of code that was made.
    pub(super) fn len(&self) -> usize {
        self.made.as_ref().map_or(0, |made| made.translated.code.len())
    }

    /// What it may have interpreted.
    pub(super) fn ops(&self) -> &[Op] {
        self.ops.together().unwrap_or_default()
    }
}

impl Workbench {
    /// Does `job`, in the memory of what it has made before.
    pub(super) fn make(&mut self, job: &mut Job) {
        let since = host_tsc();
        self.make_untimed(job);
        job.took = host_tsc().saturating_sub(since);
    }

    fn make_untimed(&mut self, job: &mut Job) {
        let Job { route, order, ops, made, .. } = job;
        ops.clear();
        let spare = made.take().map(|made| made.translated).unwrap_or_default();
        let Some(trace) = self.trace_of(route, &order.features) else { return };
        let site = Site { thunks: &order.thunks, base: order.base, first_link: 0 };
        let translated = self.translate(&trace, site, ops, order.manner, spare);
        *made = translated.ok().filter(|_| ops.together().is_some()).map(|translated| Made {
            translated,
            instructions: trace.steps.len(),
            guest_bytes: trace.bytes(),
            #[cfg(test)]
            trace: trace.clone(),
        });
        self.put_back(trace);
    }
}

/// What a translation that is settled was made with, and what it has now.
struct Settling<'a> {
    ops_at: u64,
    ops: &'a Ops,
    /// Which of those is its first one.
    first_op: usize,
    links: &'a [block::Link],
}

impl MadeWith for Settling<'_> {
    fn op(&self, address: u64) -> Option<u64> {
        let number = address.checked_sub(self.ops_at)?.checked_div(size_of::<Op>() as u64)?;
        let op = self.ops.get(self.first_op.checked_add(usize::try_from(number).ok()?)?)?;
        Some(std::ptr::from_ref(op) as u64)
    }

    fn link(&self, number: u32) -> Option<usize> {
        self.links.get(number as usize).map(|link| link.at)
    }
}

impl Maker {
    /// Gives what `job` has made a place, for which there is room.
    /// Whoever goes to the translation that it replaces comes there.
    pub(super) fn settle_job(
        &mut self,
        translations: &mut Translations,
        job: &mut Job,
    ) -> Option<Entry> {
        let mut made = job.made.take()?;
        let mut code = std::mem::take(&mut made.translated.code);
        let entry = self.settle(translations, job, &made, &mut code);
        made.translated.code = code;
        job.made = Some(made);
        if let Some(entry) = entry
            && let Some(wish) = translations.wishes.get_mut(&job.wanted())
            && let Some(former) = wish.former.take()
        {
            translations.replace(former, entry.address);
        }
        entry
    }

    /// The same for what `job` has `made`, whose code is changed for it.
    fn settle(
        &mut self,
        translations: &mut Translations,
        job: &Job,
        made: &Made,
        code: &mut [u8],
    ) -> Option<Entry> {
        let ((_, rip, mode), order, ops) = (job.wanted(), &job.order, job.ops());
        let Translated { links, relocations, landings, .. } = &made.translated;
        let offset = translations.regions.next_offset()?;
        let newest = translations.regions.newest()?;
        let first_op = newest.ops.count();
        let first_link = translations.regions.number(newest.links.len())?;
        let region = translations.regions.current()?;
        for op in ops {
            region.ops.keep(op);
        }
        let settling = Settling { ops_at: ops.as_ptr() as u64, ops: &region.ops, first_op, links };
        let distances = Distance { guest: 0, host: offset.into(), links: first_link };
        relocate::relocate(code, relocations, distances, &settling)?;
        let movable = made.translated.movable;
        let placed = Placed {
            rip,
            mode,
            offset,
            len: u32::try_from(code.len()).ok()?,
            way_out: u32::try_from(made.translated.way_out).ok()?,
            first_link,
            first_op: u32::try_from(first_op).ok()?,
            ops: u16::try_from(ops.len()).ok()?,
            instructions: u16::try_from(made.instructions).ok()?,
            relocations: Span::of_movable(&mut region.relocations, relocations, movable),
            landings: Span::push(&mut region.landings, landings),
            frame: order.frame,
            stale: false,
            manner: order.manner,
            by: self.number,
        };
        let address = translations.memory.address(offset as usize) as u64;
        self.look_at(rip, code, address, landings)?;
        let entry = translations.add(code, links, placed, order.version, order.tail)?;
        self.count(made.guest_bytes, placed.len);
        #[cfg(test)]
        {
            translations.remember(&made.trace, order.manner);
            super::clone::tests::compare_newest(translations, &self.thunks, links);
        }
        Some(entry)
    }
}
