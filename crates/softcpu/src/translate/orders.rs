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

use super::frames::Sought;
use super::making::{Job, Order};
use super::mode::{CodeSegment, Mode};
use super::route::Route;
use super::translations::Entry;
use super::translator::Translator;
use super::wishes::{Wanted, Wish};
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
    /// Nobody has begun with it: it is to be made here and now.
    Enough(Box<Job>),
}

/// A vCPU's standing with its workshop.
#[derive(Debug)]
pub(super) struct Orders {
    workshop: Arc<Workshop>,
    desk: Arc<Desk>,
    /// What deliveries came in.
    empty: Vec<Job>,
}

impl Orders {
    /// What was made.
    fn deliveries(&mut self) -> Vec<Job> {
        self.desk.clear(std::mem::take(&mut self.empty))
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

    /// `job` was done, or is not wanted.
    pub(super) fn keep(&mut self, job: Job) {
        if self.spare.len() < SPARE {
            self.spare.push(job);
        }
    }

    /// A job that is what `order` says, once it has a route.
    fn job(&mut self, order: Order) -> Job {
        let mut job = self.spare.pop().unwrap_or_else(|| Job::new(order));
        job.order = order;
        job
    }

    /// Has `job` done beside the vCPU, if that can be. Gives it back if not.
    fn order(&mut self, job: Job) -> Option<Job> {
        let Some(orders) = &self.orders else { return Some(job) };
        orders.workshop.order(job, &orders.desk)
    }
}

impl Vcpu {
    /// Has blocks translated in `workshop`, if they are translated at all. They need not be as hot
    /// for that.
    pub fn order_from(&mut self, workshop: &Arc<Workshop>) {
        if let Some(translator) = &mut self.translator {
            self.threshold = self.threshold.min(THRESHOLD);
            let workshop = Arc::clone(workshop);
            let (desk, empty) = Default::default();
            translator.orders = Some(Orders { workshop, desk, empty });
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

    /// What is to be made of the code that begins with `head`, in `mode`, here and now. `None` if
    /// that was ordered.
    pub(super) fn job_to_do(
        &mut self,
        blocks: &BlockCache,
        head: &Block,
        mode: Mode,
    ) -> Option<Job> {
        match self.waited_for(blocks, head, mode) {
            Waited::Still => None,
            Waited::Enough(mut job) => {
                let wish = self.translator.as_ref()?.code.lock().wish(head.frame, head.rip, mode);
                job.order.manner = wish.manner(self.mirrors());
                Some(*job)
            }
            Waited::Never => self.job_unless_ordered(blocks, head, mode),
        }
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
            TakenBack::Order(job) => {
                let of = (job.order.frame, job.order.version);
                mark(blocks, &job.route, of, false);
                if (of.1, job.order.tail) == (head.version, head.tail()) {
                    return Waited::Enough(job);
                }
                translator.keep(*job);
                Waited::Never
            }
        }
    }

    /// The same, which nobody waits for.
    fn job_unless_ordered(&mut self, blocks: &BlockCache, head: &Block, mode: Mode) -> Option<Job> {
        let features = *self.cpuid.features();
        let translator = self.translator.as_mut()?;
        let mut job = translator.job(Order {
            manner: Wish::default().manner(false),
            frame: head.frame,
            version: head.version,
            tail: head.tail(),
            features,
            thunks: translator.code.thunks,
            base: translator.code.bounds().start,
        });
        let wish = self.find_route(blocks, head, mode, &mut job.route);
        let mirrors = self.mirrors();
        let translator = self.translator.as_mut()?;
        let Some(wish) = wish else {
            translator.keep(job);
            return None;
        };
        job.order.manner = wish.manner(mirrors);
        if !wish.can_wait() {
            return Some(job);
        }
        let of = (head.frame, head.version);
        mark(blocks, &job.route, of, true);
        if let Some(job) = translator.order(job) {
            mark(blocks, &job.route, of, false);
            return Some(job);
        }
        head.set_runs(translator.patience.runs(self.threshold));
        head.set_ordered(true);
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
            if let Some(translator) = &mut self.translator {
                let beside = &mut translator.maker.counters.beside;
                *beside = beside.wrapping_add(entry.is_some().into());
                translator.keep(job);
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

    /// Gives what `job` has made a place, if it stands for what is there. This vCPU must be in its run
    /// loop.
    pub(super) fn settle(&mut self, job: &mut Job) -> Option<Entry> {
        let (frame, rip, mode) = job.wanted();
        let Order { version, tail, manner, .. } = job.order;
        let (of, mirrors) = ((frame, version, tail), self.mirrors());
        job.made.as_ref()?;
        self.place_translation(job.len(), of, |maker, translations| {
            // It may have been translated meanwhile, or is wanted otherwise.
            let sought = Sought { rip, frame, version, mode };
            let there = translations.find(sought).filter(|_| tail.is_none());
            if there.is_some_and(|number| translations.entry_at(number, rip).is_some())
                || translations.wish(frame, rip, mode).manner(mirrors) != manner
            {
                return None;
            }
            maker.settle_job(translations, job)
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
