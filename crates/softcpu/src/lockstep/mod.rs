//! Lockstep: the interpreter checks what the translator does, instruction by instruction, and
//! the run stops at the first difference.
//!
//! Guest code is run in *stretches*. The vCPU (the *leader*) runs one as it always does, in
//! translated code, interpreted code or both. Meanwhile each page is copied before it is
//! first stored to (`memory::copies`), and whatever the machine or the clock answers is recorded
//! (`tape`). A stretch ends before anything else than running code happens: before an event
//! is taken, an exception delivered, an exit returned. Then a second vCPU (the *follower*)
//! starts from where the stretch started, on an overlay that shows memory as it was, and
//! interprets (`chase`) until it is where the leader is and has the same registers, flags,
//! pages and answers used. So nothing is asked of the translator but that it gets somewhere:
//! not how it cuts code into blocks, nor how it goes from one to the next. If the follower
//! never gets there, the stretch is done again in small steps, both on memory that stands
//! still (`replay`), to find the block at fault and to tell a difference from a device's
//! store that came between the two runs; and `report` says what was found.
//!
//! Devices store to real memory only, which the follower never does, so nothing is lost or
//! done twice. One vCPU only: another's stores would come between all the time.

pub(crate) mod chase;
mod compare;
mod replay;
mod report;
mod snapshot;
pub(crate) mod tape;
#[cfg(test)]
mod tests;
mod undefined;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::cpuid::CpuidTable;
use crate::decode::cache::BlockCache;
use crate::env::Environment;
use crate::handle::{Event, VcpuHandle};
use crate::memory::overlay::Before;
use crate::memory::ram::RamFrame;
use crate::memory::{CodeMap, PhysMemory};
use crate::mmu::{Access, View};
use crate::native::Stubs;
use crate::sync::lock;
use crate::system::tsc::host_tsc;
use crate::translate::{self, Translator};
use crate::vcpu::{Abort, Engine, Exit, Vcpu, VcpuConfig};
use chase::{Caught, Chase};
use replay::Found;
use snapshot::Snapshot;
use tape::{Tape, Taped};

/// Runs of a block after which it is translated: sooner than otherwise, so that more is
/// checked, but late enough to know which way its branches go and to make traces.
pub(crate) const THRESHOLD: u32 = 4;
/// Turns of loops until one is taken to be hot.
pub(crate) const TURNS: u64 = 101;
/// Pages stored to after which a stretch should end, and after which it does wherever it is.
const MANY_PAGES: usize = 512;
const TOO_MANY_PAGES: usize = 8 * MANY_PAGES;
/// Permissions to store unseen that are taken back one by one; more are all at once.
const MANY_GRANTS: usize = 1024;
/// Instructions that a host retires in a cycle of its time-stamp counter, at most.
const PER_CYCLE: u64 = 6;
/// Instructions that a follower may always take.
const SLACK: u64 = 1 << 16;
/// How often a follower sets out for one stretch, at most.
const ATTEMPTS: u32 = 3;
/// How long a device may take from its store to saying what it has stored.
const DEVICES_TAKE: Duration = Duration::from_millis(1);

/// How a stretch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Between two instructions.
    Between,
    /// With the exception that is in the vCPU.
    Fault,
    /// With the exit that is in the vCPU.
    Exit,
}

/// What lockstep did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Stretches compared.
    pub stretches: u64,
    /// Instructions that followers took for them.
    pub instructions: u64,
    /// Stretches that differed but did not when they were done again on memory that stands
    /// still: a device has stored to what both had read.
    pub raced: u64,
    /// Stretches that differed in flags that are undefined, or after one was read.
    pub undefined: u64,
    /// Stretches that differed and took too long to be done again.
    pub unsettled: u64,
}

/// What a leader has.
pub(crate) struct Lockstep {
    follower: Box<Vcpu>,
    /// The follower in replays, and the translator for what is translated anew in them. Both
    /// are here from the start: later the process may not have memory for code any more.
    replayer: Option<Box<Vcpu>>,
    spare: Option<Translator>,
    /// Pages as they were when the stretch started, if they have been stored to.
    before: Before,
    /// Permissions to store unseen given since.
    granted: Vec<(View, u64)>,
    tape: Tape,
    start: Snapshot,
    /// When the stretch started, by the host's time-stamp counter.
    begun: u64,
    /// How long the leader took for it, in that counter's cycles.
    cycles: u64,
    counters: Counters,
    report: Option<String>,
}

impl Lockstep {
    /// For a vCPU on `memory` that asks `machine`; the environment to ask in its place comes
    /// with it.
    ///
    /// # Errors
    /// When the host refuses memory for the follower's code.
    pub(crate) fn new(
        memory: &Arc<PhysMemory>,
        cpuid: &CpuidTable,
        machine: Box<dyn Environment>,
        handle: VcpuHandle,
        translation: translate::Config,
        stubs: &Arc<Stubs>,
    ) -> io::Result<(Self, Box<dyn Environment>)> {
        let tape = Tape::blank(handle.clone());
        let before = Before::default();
        let follower = follower(memory, cpuid, &tape, &before, stubs, false)?;
        let replayer = Some(self::follower(memory, cpuid, &tape, &before, stubs, true)?);
        let start = Snapshot::of(&follower);
        let lockstep = Self {
            follower,
            replayer,
            spare: Some(Translator::new(translation, None, stubs, handle)?),
            before,
            granted: Vec::new(),
            tape: tape.clone(),
            start,
            begun: 0,
            cycles: 0,
            counters: Counters::default(),
            report: None,
        };
        Ok((lockstep, Box::new(Taped::new(tape, Some(machine)))))
    }

    /// What the leader records on.
    pub(crate) fn tape(&self) -> Tape {
        self.tape.clone()
    }

    /// Whether the follower gets where `leader` is.
    fn agrees(&mut self, leader: &Vcpu, ended: Ended) -> bool {
        self.cycles = host_tsc().saturating_sub(self.begun);
        self.counters.stretches = self.counters.stretches.wrapping_add(1);
        for attempt in 0..ATTEMPTS {
            if attempt > 1 {
                // A device may be about to say what it has stored.
                std::thread::sleep(DEVICES_TAKE);
            }
            // From the second on the follower looks within string instructions too.
            if self.set_out(leader, ended, attempt > 0) {
                return true;
            }
        }
        false
    }

    /// The most instructions that the leader can have taken.
    fn limit(&self) -> u64 {
        self.cycles.saturating_mul(PER_CYCLE).saturating_add(SLACK)
    }

    fn set_out(&mut self, leader: &Vcpu, ended: Ended, fine: bool) -> bool {
        let limit = self.limit();
        let mut chase = Chase::new(leader, &self.before, ended, limit, fine);
        prepare(&mut self.follower, &self.start);
        let caught = self.follower.chase(&mut chase);
        self.counters.instructions = self.counters.instructions.wrapping_add(chase.taken());
        caught == Caught::Agrees
    }
}

/// Puts `follower` to `start`, with memory as it was then.
fn prepare(follower: &mut Vcpu, start: &Snapshot) {
    follower.memory.take_back();
    follower.mmu.flush_non_global(0);
    start.restore(follower);
    if let Some(tape) = &follower.tape {
        tape.rewind();
    }
}

/// A vCPU that interprets, over `memory`.
fn follower(
    memory: &Arc<PhysMemory>,
    cpuid: &CpuidTable,
    tape: &Tape,
    before: &Before,
    stubs: &Arc<Stubs>,
    frozen: bool,
) -> io::Result<Box<Vcpu>> {
    let code = Arc::new(CodeMap::new(memory.code().frames()));
    // This map hears of the follower's stores only. So somebody has to be behind for ever:
    // then every block is compared with memory before it is run.
    let behind = code.enrol(VcpuHandle::new());
    code.enter(&behind, || ());
    let tape = tape.reader();
    let mut vcpu = Vcpu::new(VcpuConfig {
        memory: Arc::new(PhysMemory::over(memory, code, Arc::clone(before), frozen)),
        cpuid: cpuid.clone(),
        env: Box::new(Taped::new(tape.clone(), None)),
        engine: Engine::Interpreter,
        translation: translate::Config::default(),
        code: None,
        stubs: Arc::clone(stubs),
        handle: VcpuHandle::new(),
    })?;
    vcpu.tape = Some(tape);
    Ok(vcpu)
}

impl Vcpu {
    /// What lockstep did so far; `None` without it.
    #[must_use]
    pub fn lockstep_counters(&self) -> Option<Counters> {
        self.lockstep.as_ref().map(|lockstep| lockstep.counters)
    }

    /// What was found when [`Exit::Diverged`] was returned.
    #[must_use]
    pub fn divergence(&self) -> Option<&str> {
        self.lockstep.as_ref()?.report.as_deref()
    }

    /// As `run_blocks`, in lockstep.
    pub(crate) fn run_in_lockstep(&mut self, blocks: &mut BlockCache) -> Exit {
        self.begin_stretch();
        loop {
            if let Some(exit) = self.advance_in_lockstep(blocks) {
                return exit;
            }
        }
    }

    /// Takes an event and runs some code, in lockstep.
    fn advance_in_lockstep(&mut self, blocks: &mut BlockCache) -> Option<Exit> {
        let pending = self.handle.pending().bits() & self.event_mask;
        if pending == Event::CODE_CHANGED.bits() {
            // Nothing that the guest could see; the run loop looks before it enters a block.
            self.handle.take(Event::CODE_CHANGED);
        } else if pending != 0 {
            if !self.finish_stretch(blocks, Ended::Between) {
                return Some(Exit::Diverged);
            }
            if let Some(exit) = self.service_events() {
                return Some(exit);
            }
            self.begin_stretch();
        }
        let outcome = self.run_some(blocks);
        let ended = match outcome {
            Err(Abort::Fault) => Ended::Fault,
            Err(Abort::Exit) => Ended::Exit,
            // A repeated string instruction may be half done, and the follower need not
            // halve it in the same place.
            Err(Abort::EndBlock) if !self.stretch_is_long(TOO_MANY_PAGES) => return None,
            Ok(()) if !self.stretch_is_long(MANY_PAGES) => return None,
            Ok(()) | Err(Abort::EndBlock) => Ended::Between,
        };
        if !self.finish_stretch(blocks, ended) {
            return Some(Exit::Diverged);
        }
        let exit = match ended {
            Ended::Between => None,
            Ended::Exit => Some(self.exit),
            Ended::Fault => self.take_fault(),
        };
        if exit.is_none() {
            self.begin_stretch();
        }
        exit
    }

    /// One block, or one event, as a stretch of its own.
    pub(crate) fn run_one_block_in_lockstep(&mut self, blocks: &mut BlockCache) -> Option<Exit> {
        self.begin_stretch();
        let exit = self.advance_in_lockstep(blocks);
        if exit.is_none() && !self.finish_stretch(blocks, Ended::Between) {
            return Some(Exit::Diverged);
        }
        exit
    }

    /// From here on the leader is followed.
    fn begin_stretch(&mut self) {
        let Some(mut lockstep) = self.lockstep.take() else { return };
        if lockstep.granted.len() >= MANY_GRANTS {
            self.mmu.data.drop_writes();
        }
        for (view, addr) in lockstep.granted.drain(..) {
            self.mmu.data.drop_write(view, addr);
        }
        lock(&lockstep.before).clear();
        lockstep.tape.erase();
        self.memory.code().outside().watch();
        lockstep.start.take(self);
        lockstep.begun = host_tsc();
        self.lockstep = Some(lockstep);
    }

    /// Has the follower come after; says whether it did.
    fn finish_stretch(&mut self, blocks: &mut BlockCache, ended: Ended) -> bool {
        // Away from the vCPU: what is done from here on is not watched.
        let Some(mut lockstep) = self.lockstep.take() else { return true };
        let mut agrees = lockstep.agrees(self, ended);
        if !agrees {
            let found = lockstep.investigate(self, blocks);
            agrees = !matches!(found, Found::Difference(_));
            let counters = &mut lockstep.counters;
            match found {
                Found::Difference(report) => lockstep.report = Some(report),
                Found::Race => counters.raced = counters.raced.wrapping_add(1),
                Found::Undefined => counters.undefined = counters.undefined.wrapping_add(1),
                Found::Nothing => counters.unsettled = counters.unsettled.wrapping_add(1),
            }
        }
        self.lockstep = Some(lockstep);
        if agrees {
            self.env.settle();
        }
        agrees
    }

    fn stretch_is_long(&self, pages: usize) -> bool {
        self.lockstep.as_ref().is_some_and(|lockstep| {
            lock(&lockstep.before).len() >= pages || lockstep.tape.should_end()
        })
    }

    /// `frame` may be about to be stored to, or to get into the TLB. Says whether stores may
    /// go there unseen from then on.
    pub(crate) fn watch_page(&mut self, access: Access, frame: RamFrame) -> bool {
        let Some(lockstep) = &self.lockstep else { return true };
        let mut before = lock(&lockstep.before);
        if access != Access::Write {
            return before.get(frame).is_some();
        }
        let Some(page) = self.memory.shown(frame) else { return true };
        // SAFETY: a page of RAM, which is mapped as long as the memory is there; all that is
        // made of it are raw pointers.
        unsafe { before.keep(frame, page) };
        if before.len() == MANY_PAGES {
            // Translated code looks up.
            self.handle.raise(Event::CODE_CHANGED);
        }
        true
    }

    /// The TLB lets stores to the page at `addr` go unseen, which is to end with the stretch.
    pub(crate) fn note_grant(&mut self, view: View, addr: u64) {
        if let Some(lockstep) = &mut self.lockstep
            && lockstep.granted.len() < MANY_GRANTS
        {
            lockstep.granted.push((view, addr));
        }
    }
}
