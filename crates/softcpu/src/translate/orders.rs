//! What a vCPU has the [`Workshop`] make, and when it would rather do it itself.
//!
//! A block that has turned out hot is ordered, and interpreted until its translation is there.
//! While it waits it may run so often that interpreting has cost what translating would have;
//! then the order is taken back. So waiting never costs more than twice what not waiting would
//! have. What is translated otherwise than others (hot loops, above all) is never waited for.
//!
//! The blocks that are translated with an ordered one are *marked* like it: they need not be
//! translated by themselves, unless that takes too long.

use std::sync::Arc;

use super::alignment;
use super::cache::Entry;
use super::frames::Sought;
use super::making::{Job, Order};
use super::mode::{CodeSegment, Mode};
use super::route::Route;
use super::trace::Trace;
use super::translator::Translator;
use super::wishes::Wanted;
use super::workshop::{Desk, TakenBack, Workshop};
use crate::decode::cache::{Block, BlockCache};
use crate::memory::ram::RamFrame;
use crate::system::tsc::host_tsc;
use crate::vcpu::Vcpu;

/// Runs of a block after which it is ordered.
const THRESHOLD: u32 = 4;
/// Runs of a block that take as long as translating it, or so.
const PATIENCE: u32 = 32;
/// Jobs kept for the memory they have.
const SPARE: usize = 64;

/// What has come of waiting for a translation.
enum Waited {
    /// Nobody does.
    Never,
    /// It is being made.
    Still,
    /// Nobody has begun with it: this is to be translated.
    Enough(Route),
}

/// A vCPU's standing with its workshop.
#[derive(Debug)]
pub(super) struct Orders {
    workshop: Arc<Workshop>,
    desk: Arc<Desk>,
    /// Jobs that were done, for the next ones.
    spare: Vec<Job>,
    /// What they came in.
    empty: Vec<Job>,
}

impl Orders {
    /// What was made.
    fn deliveries(&mut self) -> Vec<Job> {
        self.desk.clear(std::mem::take(&mut self.empty))
    }

    /// `job` was done, or is not wanted.
    fn keep(&mut self, job: Job) {
        if self.spare.len() < SPARE {
            self.spare.push(job);
        }
    }
}

impl Translator {
    /// What has run so often when it was ordered is waited for until it has run how often.
    pub(super) fn may_wait(runs: u32) -> u32 {
        runs.saturating_add(PATIENCE)
    }

    #[inline(always)]
    fn has_deliveries(&self) -> bool {
        self.orders.as_ref().is_some_and(|orders| orders.desk.is_full())
    }

    /// What was ordered of `wanted`, by a vCPU that does not wait for it any longer.
    fn take_back(&mut self, wanted: Wanted) -> TakenBack {
        let Some(orders) = &self.orders else { return TakenBack::Nothing };
        let taken = orders.workshop.take_back(wanted, &orders.desk);
        let back = matches!(taken, TakenBack::Order(_));
        self.maker.counters.taken_back = self.maker.counters.taken_back.wrapping_add(back.into());
        taken
    }

    /// Orders the translation of `route`, which is what `order` says: it is another one then.
    /// Says whether it could be ordered.
    fn order(&mut self, route: &mut Route, order: Order) -> bool {
        let Some(orders) = &mut self.orders else { return false };
        let spare = orders.spare.pop();
        let mut job = spare.unwrap_or_else(|| Job::new(order));
        std::mem::swap(&mut job.route, route);
        job.order = order;
        let refused = orders.workshop.order(job, &orders.desk);
        let Some(mut job) = refused else { return true };
        std::mem::swap(&mut job.route, route);
        orders.keep(job);
        false
    }
}

impl Vcpu {
    /// Has blocks translated in `workshop`, if they are translated at all. They need not be as hot
    /// for that.
    pub fn order_from(&mut self, workshop: &Arc<Workshop>) {
        if let Some(translator) = &mut self.translator {
            self.threshold = self.threshold.min(THRESHOLD);
            let workshop = Arc::clone(workshop);
            let (desk, spare, empty) = Default::default();
            translator.orders = Some(Orders { workshop, desk, spare, empty });
        }
    }

    fn orders(&mut self) -> Option<&mut Orders> {
        self.translator.as_mut()?.orders.as_mut()
    }

    /// Whether something was made in the workshop.
    #[inline(always)]
    pub(crate) fn has_deliveries(&self) -> bool {
        self.translator.as_ref().is_some_and(Translator::has_deliveries)
    }

    /// The trace that begins with `head`, in `mode`, if it is to be translated here and now. If not,
    /// that was ordered.
    pub(super) fn trace_to_translate(
        &mut self,
        blocks: &BlockCache,
        head: &Block,
        mode: Mode,
    ) -> Option<Trace> {
        let route = match self.waited_for(blocks, head, mode) {
            Waited::Still => return None,
            Waited::Enough(route) => route,
            Waited::Never => self.route_or_order(blocks, head, mode)?,
        };
        let translator = self.translator.as_mut()?;
        let trace = translator.maker.bench.trace_of(&route, self.cpuid.features());
        translator.spare_route = route;
        trace
    }

    /// Looks whether `head`, in `mode`, was waited for long enough.
    fn waited_for(&mut self, blocks: &BlockCache, head: &Block, mode: Mode) -> Waited {
        let Some(translator) = self.translator.as_mut().filter(|_| head.is_ordered()) else {
            return Waited::Never;
        };
        match translator.take_back((head.frame, head.rip, mode)) {
            TakenBack::Nothing => Waited::Never,
            TakenBack::Begun => {
                head.set_runs(translator.patience.runs(self.threshold));
                head.set_ordered(true);
                Waited::Still
            }
            TakenBack::Order(mut job) => {
                let route = std::mem::take(&mut job.route);
                let of = (job.order.frame, job.order.version);
                mark(blocks, &route, of, false);
                let stands = (of.1, job.order.tail) == (head.version, head.tail());
                if let Some(orders) = &mut translator.orders {
                    orders.keep(*job);
                }
                if stands { Waited::Enough(route) } else { Waited::Never }
            }
        }
    }

    /// The route that begins with `head`, in `mode`, unless that can be ordered.
    fn route_or_order(&mut self, blocks: &BlockCache, head: &Block, mode: Mode) -> Option<Route> {
        let mut route = std::mem::take(&mut self.translator.as_mut()?.spare_route);
        let wish = self.find_route(blocks, head, mode, &mut route)?;
        let features = *self.cpuid.features();
        let translator = self.translator.as_mut()?;
        if translator.orders.is_none() || !wish.can_wait() {
            return Some(route);
        }
        // It is told its place when it is made.
        let offset = translator.code.fixed().next_multiple_of(alignment::BLOCKS) as u32;
        let order = Order {
            manner: wish.manner(false),
            frame: head.frame,
            version: head.version,
            tail: head.tail(),
            features,
            thunks: translator.code.thunks,
            base: translator.code.bounds().start.wrapping_add(offset.into()),
            offset,
        };
        let of = (head.frame, head.version);
        mark(blocks, &route, of, true);
        if !translator.order(&mut route, order) {
            mark(blocks, &route, of, false);
            return Some(route);
        }
        head.set_runs(translator.patience.runs(self.threshold));
        head.set_ordered(true);
        translator.spare_route = route;
        None
    }

    /// Gives what was made in the workshop a place. No translated code may be running.
    #[cold]
    pub(crate) fn take_deliveries(&mut self, blocks: &BlockCache) {
        let since = host_tsc();
        self.catch_up();
        let mut deliveries = self.orders().map_or(Vec::new(), Orders::deliveries);
        for mut job in deliveries.drain(..) {
            let (frame, rip, _) = job.wanted();
            let of = (frame, job.order.version);
            self.count_delivery(&job);
            let entry = self.settle(&mut job);
            mark(blocks, &job.route, of, false);
            if let Some(head) = find(blocks, job.route.segment, of, rip) {
                head.set_runs(if job.made.is_some() { head.runs() } else { 0 });
                head.entry.set(entry);
            }
            if let Some(orders) = self.orders() {
                orders.keep(job);
            }
        }
        if let Some(orders) = self.orders() {
            orders.empty = deliveries;
        }
        self.meter.translating.add_since(since);
    }

    fn count_delivery(&mut self, job: &Job) {
        self.meter.beside.add(job.took);
        if let (Some(translator), Some(made)) = (&mut self.translator, &job.made) {
            let bytes = &mut translator.maker.counters.beside_bytes;
            *bytes = bytes.wrapping_add(made.guest_bytes);
        }
    }

    /// Gives what `job` has made a place, if it stands for what is there.
    fn settle(&mut self, job: &mut Job) -> Option<Entry> {
        let (frame, rip, mode) = job.wanted();
        let Order { version, tail, manner, .. } = job.order;
        let of = (frame, version, tail);
        self.place_translation(job.len(), of, |maker, translations| {
            // It may have been translated meanwhile, or is wanted otherwise.
            let wish = translations.wish(frame, rip, mode);
            if tail.is_none() && translations.find(Sought { rip, frame, version, mode }).is_some()
                || !wish.can_wait()
                || wish.manner(false) != manner
            {
                return None;
            }
            let entry = maker.settle_job(translations, job)?;
            maker.counters.beside = maker.counters.beside.wrapping_add(1);
            Some(entry)
        })
    }
}

/// The block at `rip`, whose frame at a version is `of`.
fn find(
    blocks: &BlockCache,
    segment: CodeSegment,
    of: (RamFrame, u32),
    rip: u64,
) -> Option<&Block> {
    let block = blocks.get(BlockCache::slot(segment.linear(rip)))?;
    (block.rip == rip && (block.frame, block.version) == of).then_some(block)
}

/// The blocks on `route` behind the first, whose frame at a version is `of`, are part of what is
/// `ordered`, or was.
fn mark(blocks: &BlockCache, route: &Route, of: (RamFrame, u32), ordered: bool) {
    for rip in route.others() {
        if let Some(block) = find(blocks, route.segment, of, rip) {
            block.set_ordered(ordered);
        }
    }
}
