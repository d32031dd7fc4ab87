//! A stretch in which leader and follower differ, done again in small steps.
//!
//! Both run on overlays of memory that stands still: pages as they were when the stretch
//! started, or when either first looked at them since. The leader takes its translated code a
//! look for events at a time, first as it is, with all its links; then, if that shows the
//! difference, code translated anew and left after every block, for a shorter report. If both
//! agree all the way, what differed was that a device stored to memory between the two runs,
//! or that a cached translation was older than the page tables: a guest that lets itself in
//! for either has no right to one of the two outcomes.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::chase::{Caught, Chase, Notes};
use super::snapshot::Snapshot;
use super::tape::Taped;
use super::undefined::Undefined;
use super::{Ended, Lockstep, SLACK, compare, prepare, report};
use crate::decode::cache::BlockCache;
use crate::memory::PhysMemory;
use crate::mmu::Mmu;
use crate::vcpu::{Abort, Vcpu};

/// How long a replay may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a replay has shown.
pub(super) enum Found {
    /// A difference, and this is the report.
    Difference(String),
    /// Both agree, as long as memory stands still.
    Race,
    /// They differ in undefined flags, or after one was read.
    Undefined,
    /// Nothing within the time it may take.
    Nothing,
}

/// Both agree to the end, with these flags undefined.
fn alike(undefined: Undefined) -> Found {
    if undefined.differed() { Found::Undefined } else { Found::Race }
}

/// A step in which they differ.
pub(super) struct Step<'a> {
    pub(super) before: &'a Snapshot,
    pub(super) leader: &'a Vcpu,
    pub(super) leader_ended: Ended,
    pub(super) follower: &'a Vcpu,
    pub(super) caught: Caught,
    pub(super) notes: &'a Notes,
}

impl Lockstep {
    /// Looks for the first step in which `leader` and the follower differ. The leader is as
    /// before then.
    #[cold]
    pub(super) fn investigate(&mut self, leader: &mut Vcpu, blocks: &mut BlockCache) -> Found {
        let end = Snapshot::of(leader);
        let (fault, exit) = (leader.fault, leader.exit);
        let mut found = self.replay(leader, blocks, &end);
        if matches!(found, Found::Difference(_)) && self.spare.is_some() {
            #[cfg(test)]
            if let (Some(spare), Some(own)) = (&mut self.spare, &mut leader.translator) {
                *spare.mistake() = *own.mistake();
            }
            mem::swap(&mut leader.translator, &mut self.spare);
            if let Some(translator) = &mut leader.translator {
                // What the last replay has left is of memory that is no more.
                translator.empty();
            }
            leader.alone = true;
            let again = self.replay(leader, &mut BlockCache::new(), &end);
            if matches!(again, Found::Difference(_)) {
                found = again;
            }
            leader.alone = false;
            mem::swap(&mut leader.translator, &mut self.spare);
        }
        end.restore(leader);
        (leader.fault, leader.exit) = (fault, exit);
        // Made from memory that is no more.
        blocks.clear();
        if let Some(translator) = &mut leader.translator {
            translator.empty();
        }
        leader.mmu.jumps.clear();
        found
    }

    /// One replay, from the start of the stretch to `end`.
    fn replay(&mut self, leader: &mut Vcpu, blocks: &mut BlockCache, end: &Snapshot) -> Found {
        let Some(mut follower) = self.replayer.take() else { return Found::Nothing };
        prepare(&mut follower, &self.start);
        // The leader becomes what the follower is.
        let code = Arc::clone(leader.memory.code_map());
        let frozen = PhysMemory::over(&leader.memory, code, Arc::clone(&self.before), true);
        let tape = self.tape.reader();
        let memory = mem::replace(&mut leader.memory, Arc::new(frozen));
        let env = mem::replace(&mut leader.env, Box::new(Taped::new(tape.clone(), None)));
        let recording = leader.tape.replace(tape);
        let mmu = mem::replace(&mut leader.mmu, Mmu::new());
        self.start.restore(leader);
        leader.brief = true;
        let found = self.walk(leader, &mut follower, blocks, end);
        leader.brief = false;
        leader.mmu = mmu;
        leader.tape = recording;
        leader.env = env;
        leader.memory = memory;
        self.replayer = Some(follower);
        found
    }

    fn walk(
        &self,
        leader: &mut Vcpu,
        follower: &mut Vcpu,
        blocks: &mut BlockCache,
        end: &Snapshot,
    ) -> Found {
        let start = Instant::now();
        let mut before = self.start.clone();
        let mut undefined = Undefined::default();
        let mut taken = 0_u64;
        while start.elapsed() < PATIENCE && taken < self.limit() {
            let leader_ended = match leader.run_some(blocks) {
                Ok(()) | Err(Abort::EndBlock) => Ended::Between,
                Err(Abort::Fault) => Ended::Fault,
                Err(Abort::Exit) => Ended::Exit,
            };
            let mut notes = Notes::after(undefined);
            let mut chase =
                Chase::new(leader, &self.before, leader_ended, SLACK, true).noting(&mut notes);
            let caught = follower.chase(&mut chase);
            taken = taken.saturating_add(chase.taken());
            let lost = |cpu: &Vcpu| cpu.tape.as_ref().is_some_and(|tape| tape.lost().is_some());
            match (lost(leader), lost(follower)) {
                // Beyond the end of what was recorded.
                (true, true) => return alike(notes.undefined),
                (false, false) if caught == Caught::Agrees => {}
                _ if notes.undefined.was_read() => return Found::Undefined,
                _ => {
                    let leader = &*leader;
                    let before = &before;
                    let notes = &notes;
                    let step = Step { before, leader, leader_ended, follower, caught, notes };
                    return Found::Difference(report::write(&step, &self.before));
                }
            }
            if leader_ended != Ended::Between || compare::alike(&leader.state, &end.state) {
                return alike(notes.undefined);
            }
            undefined = notes.undefined;
            before.take(leader);
        }
        if taken < self.limit() { Found::Nothing } else { alike(undefined) }
    }
}
