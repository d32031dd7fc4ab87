//! What was made for one vCPU, for the others: a *shelf* in the workshop.
//!
//! vCPUs run the same kernel and often the same programs, and a process goes from one to another.
//! Each has code memory of its own, so that nobody changes code under another's feet; but what one
//! has had translated another need not: it is found here by where its code is in RAM, and is given
//! a place like any translation that was made beside the vCPU, before the code has run once.
//! Nothing in it is a vCPU's own: the stubs of [`crate::native`] that ops name are shared, too.
//!
//! Whoever had it translated has looked that no vCPU can change the code unseen. As long as its
//! frame's version stands none can.

use std::collections::VecDeque;
use std::sync::Arc;

use foldhash::HashMap;

use super::cache::Entry;
use super::frames::{Code, Sought};
use super::making::{Job, Made, Order, Piece};
use super::mode::Mode;
use super::relocate;
use crate::decode::op::Op;
use crate::memory::ram::RamFrame;
use crate::vcpu::Vcpu;

/// Bytes that one takes besides what it points to, or so.
const EACH: usize = 512;

/// A translation that may be taken.
#[derive(Debug)]
pub(super) struct Shelved {
    /// Where it was made for, and the mode.
    rip: u64,
    mode: Mode,
    order: Order,
    made: Made,
    /// What it may have interpreted, and where that was when it was made.
    ops: Box<[Op]>,
    ops_at: u64,
}

impl Shelved {
    /// What `job` has made, if others can use it: it is in one page, and in a segment that begins at zero,
    /// whose number is the same for all.
    pub(super) fn of(job: &Job) -> Option<Self> {
        let (made, (_, rip, mode)) = (job.made.as_ref()?, job.wanted());
        if job.order.tail.is_some() || !mode.is_movable() {
            return None;
        }
        let ops = job.ops();
        Some(Self {
            rip,
            mode,
            order: job.order,
            made: made.clone(),
            ops: ops.into(),
            ops_at: ops.as_ptr() as u64,
        })
    }

    fn key(&self) -> Key {
        (self.order.frame, Code::at(self.rip, self.mode))
    }

    fn bytes(&self) -> usize {
        let made = self.made.translated.bytes();
        made.saturating_add(size_of_val(&*self.ops)).saturating_add(EACH)
    }
}

/// Where the code is.
type Key = (RamFrame, Code);

/// See the module's words.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    all: HashMap<Key, Arc<Shelved>>,
    /// In the order in which they came.
    queue: VecDeque<Arc<Shelved>>,
    /// What they take, and may take.
    bytes: usize,
    room: usize,
}

impl Shelf {
    /// One that has room for so many bytes.
    pub(super) fn new(room: usize) -> Self {
        Self { room, ..Self::default() }
    }

    /// Puts `shelved` there. What has been there for longest goes for it.
    pub(super) fn put(&mut self, shelved: Shelved) {
        let shelved = Arc::new(shelved);
        self.bytes = self.bytes.saturating_add(shelved.bytes());
        self.all.insert(shelved.key(), Arc::clone(&shelved));
        self.queue.push_back(shelved);
        while self.bytes > self.room
            && let Some(oldest) = self.queue.pop_front()
        {
            self.bytes = self.bytes.saturating_sub(oldest.bytes());
            if self.all.get(&oldest.key()).is_some_and(|known| Arc::ptr_eq(known, &oldest)) {
                self.all.remove(&oldest.key());
            }
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// What there is for `sought`.
    pub(super) fn get(&self, sought: Sought) -> Option<Arc<Shelved>> {
        let Sought { rip, frame, version, mode } = sought;
        let shelved = self.all.get(&(frame, Code::at(rip, mode)))?;
        let fits =
            shelved.rip == rip || shelved.made.translated.movable && relocate::is_movable(rip);
        (shelved.order.version == version && fits).then(|| Arc::clone(shelved))
    }
}

impl Vcpu {
    /// A translation for `sought`, if one was made for another vCPU. No translated code may be
    /// running.
    pub(super) fn take_from_shelf(&mut self, sought: Sought) -> Option<Entry> {
        let Sought { rip, frame, mode, .. } = sought;
        let translator = self.translator.as_mut()?;
        let shelved = translator.on_shelf(sought)?;
        let wish = translator.wish(frame, rip, mode);
        let wanted = wish.can_wait() && wish.manner(false) == shelved.order.manner;
        if !wanted || shelved.order.features != *self.cpuid.features() {
            return None;
        }
        let distance = rip.wrapping_sub(shelved.rip);
        let ops: Vec<Op> = shelved.ops.iter().map(|op| op.moved(distance)).collect();
        let Shelved { order, made, ops_at, .. } = &*shelved;
        self.make_room(made.translated.code.len());
        let translator = self.translator.as_mut()?;
        let (ops, ops_at, mut code) = (&ops[..], *ops_at, made.translated.code.clone());
        let entry = translator.settle(Piece {
            rip,
            distance,
            mode,
            order,
            made,
            code: &mut code,
            ops,
            ops_at,
        })?;
        translator.counters.shared = translator.counters.shared.wrapping_add(1);
        self.tell_of_newest(entry);
        Some(entry)
    }
}
