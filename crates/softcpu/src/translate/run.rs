//! Between the run loop and translated code: when a block is translated, the way in and out,
//! and the calls back for what it has interpreted.

use std::io;
use std::sync::atomic::AtomicU32;

use super::cache::{Counters, Entry, Evicted, Translator};
use super::config::Config;
use super::faults;
use super::frames::Sought;
use super::jumps;
use super::mode::Mode;
use super::regions::LARGEST;
use super::route::{Route, Router};
use super::thunks::Exit;
use super::trace::Trace;
use crate::decode::cache::{Block as Decoded, BlockCache};
use crate::decode::op::Op;
use crate::memory::ram::RamFrame;
use crate::mmu::View;
use crate::state::rflags::RFlags;
use crate::system::tsc::host_tsc;
use crate::trace;
use crate::vcpu::{Abort, Shadow, Vcpu};

/// What there is for a block that is about to run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Translation {
    /// Nothing: it is interpreted.
    None,
    /// It has run so often that it is to be translated.
    Wanted,
    /// This.
    Known(Entry),
}

/// More than what `trace` becomes takes.
fn room_for(trace: &Trace) -> usize {
    trace.steps.len().saturating_add(4).saturating_mul(MOST_OF_A_STEP).min(LARGEST)
}

/// Runs of a block after which it is translated.
pub(crate) const THRESHOLD: u32 = 6;

/// Bytes that a step becomes at most, what is behind the rest included.
const MOST_OF_A_STEP: usize = 384;

/// What translated code that is to be left soon takes for the events raised.
static ALWAYS: AtomicU32 = AtomicU32::new(u32::MAX);

impl Vcpu {
    /// What the translator did so far; `None` without one.
    #[must_use]
    pub fn translator_counters(&self) -> Option<Counters> {
        let mirror = &self.mmu.mirror.counters;
        self.translator.as_ref().map(|translator| Counters {
            mirrored: mirror.shown,
            mirror_faults: mirror.faults,
            mirror_refused: mirror.refused,
            mirror_owners: mirror.owners,
            ..translator.counters()
        })
    }

    /// Has blocks translated after `runs` runs, whatever the vCPU was made with.
    ///
    /// # Errors
    /// When the host refuses code memory.
    #[doc(hidden)]
    pub fn translate_after(&mut self, runs: u32, config: Config) -> io::Result<()> {
        if self.translator.is_none() {
            self.translator = Some(Translator::new(config)?);
            self.prepare_mirror(config.mirror_after);
        }
        self.threshold = runs;
        Ok(())
    }

    /// The host code for `block`, at whose RIP the vCPU is, if it is to be entered. Counts
    /// a run.
    pub(crate) fn translated(&mut self, block: &Decoded) -> Translation {
        let Some(mode) = self.translation_mode() else { return Translation::None };
        self.drop_stale();
        let Some(translator) = self.translator.as_mut() else { return Translation::None };
        if translator.refused.take() == Some(block.rip) {
            return Translation::None;
        }
        let known = block.entry.get().filter(|known| translator.holds(*known, mode));
        if let Some(entry) = known {
            if self.invalidate_if_due() {
                // What is entered then is the way out.
                self.drop_stale();
            }
            return Translation::Known(entry);
        }
        if block.entry.get().is_some_and(|lost| !translator.regions.has(lost)) {
            // What comes back is what is hot now. All at once it might not even fit.
            block.entry.set(None);
            block.set_runs(0);
        }
        if block.is_hollow() {
            return Translation::None;
        }
        let runs = block.count_run();
        // An instruction that wraps at 4 GiB has its second page where nobody would look for it.
        let wraps = block.tail().is_some_and(|tail| tail.page < block.linear);
        let hot = translator.patience.runs(self.threshold);
        let wanted = if block.is_ordered() { Translator::may_wait(hot) } else { hot };
        if runs < wanted || wraps {
            return Translation::None;
        }
        // What another vCPU may still change unseen is compared with memory at every run.
        let settled = |epoch| self.memory.code().settled(&self.observer, epoch);
        if block.unsettled().is_some_and(|unsettled| !settled(unsettled.epoch)) {
            return Translation::None;
        }
        Translation::Wanted
    }

    /// Makes sure that no code is entered whose guest's code has changed.
    #[inline(always)]
    pub(super) fn drop_stale(&mut self) {
        let Some(translator) = self.translator.as_mut() else { return };
        if translator.seen != self.memory.code().hits() {
            let since = host_tsc();
            let (memory, tracer) = (&self.memory, &mut self.tracer);
            translator.drop_stale(memory.code(), |rip| {
                if let Some(tracer) = tracer {
                    tracer.event(trace::Event::Dropped { rip });
                }
            });
            self.meter.dropping.add_since(since);
        }
    }

    /// Makes sure that there is room for `bytes` of translated code. None may be running.
    pub(super) fn make_room(&mut self, bytes: usize) {
        let since = host_tsc();
        let Some(translator) = &mut self.translator else { return };
        if let Some(evicted) = translator.make_room(bytes) {
            if evicted.turned {
                translator.patience.filled(since, self.meter.translating.all);
            }
            self.forget_evicted(evicted);
            self.meter.evicting.add_since(since);
        }
    }

    /// Nobody may jump to what was evicted; and whoever watches is told of it.
    fn forget_evicted(&mut self, evicted: Evicted) {
        self.mmu.jumps.forget_code(&evicted.hosts);
        if let Some(tracer) = &mut self.tracer {
            let Evicted { hosts, blocks, .. } = evicted;
            let len = hosts.end.wrapping_sub(hosts.start);
            tracer.event(trace::Event::Evicted { host: hosts.start, len, blocks });
        }
    }

    /// A translation for `sought`, if there was one of the same code before: this very one, a clone
    /// of one for another address, or one that was made for another vCPU. Whoever translated that
    /// had looked that no other vCPU can change the code unseen, and as long as the frame's version
    /// stands none can.
    pub(crate) fn translated_before(&mut self, sought: Sought) -> Option<Entry> {
        let Sought { rip, version, .. } = sought;
        self.drop_stale();
        let translator = self.translator.as_mut()?;
        let Some(number) = translator.find(sought) else { return self.take_from_shelf(sought) };
        if let Some(entry) = translator.entry_at(number, rip) {
            return Some(entry);
        }
        let room = translator.room_for_clone(number, rip)?;
        self.make_room(room);
        let translator = self.translator.as_mut()?;
        // It may have been what made room.
        let number = translator.find(sought)?;
        let entry = translator.clone_to(number, version, rip)?;
        self.tell_of_newest(entry);
        Some(entry)
    }

    /// Tells whoever watches of the translation that was placed last.
    pub(super) fn tell_of_newest(&mut self, entry: Entry) {
        if let Some(tracer) = &mut self.tracer
            && let Some(translator) = &self.translator
            && let Some((newest, code)) = translator.newest()
        {
            tracer.event(trace::Event::Translated {
                rip: newest.rip,
                user: self.mmu.is_user(),
                instructions: newest.instructions.into(),
                host: entry.address,
                code,
            });
        }
    }

    /// Translates the block in `slot`, and what the guest goes on with from there; or orders
    /// that, and has nothing yet.
    #[cold]
    pub(crate) fn translate(&mut self, blocks: &BlockCache, slot: usize) -> Option<Entry> {
        let head = blocks.get(slot)?;
        let mode = self.translation_mode()?;
        let Decoded { rip, frame, version, .. } = *head;
        // Other vCPUs could not run it: it is interpreted, and not looked at again at each run.
        if blocks.ops(head).iter().any(Op::names_own_stub) {
            head.set_runs(0);
            return None;
        }
        if head.tail().is_none()
            && let Some(entry) = self.translated_before(Sought { rip, frame, version, mode })
        {
            head.entry.set(Some(entry));
            return Some(entry);
        }
        #[cfg_attr(not(test), expect(unused_mut, reason = "tests plant mistakes"))]
        let mut trace = self.trace_to_translate(blocks, head, mode)?;
        #[cfg(test)]
        self.plant_mistake(&mut trace);
        self.make_room(room_for(&trace));
        let mirrors = self.mirrors();
        let translator = self.translator.as_mut()?;
        let entry = translator.place(&trace, head.frame, head.version, head.tail(), mirrors);
        translator.bench.put_back(trace);
        head.set_runs(if entry.is_some() { head.runs() } else { 0 });
        head.entry.set(entry);
        let entry = entry?;
        self.tell_of_newest(entry);
        Some(entry)
    }

    #[cfg(test)]
    fn plant_mistake(&mut self, trace: &mut Trace) {
        if let Some(translator) = &mut self.translator
            && let Some(mistake) = translator.mistake
        {
            for (step, op) in trace.steps.iter_mut().zip(&mut trace.ops) {
                mistake(&mut step.instruction, op);
                let features = self.cpuid.features();
                let shapes = translator.bench.shapes(features);
                step.shape = shapes.of(&mut step.instruction, features);
            }
        }
    }

    /// Finds the `route` that begins with `head`, in `mode`. `None` if its code has changed.
    pub(super) fn find_route(
        &mut self,
        blocks: &BlockCache,
        head: &Decoded,
        mode: Mode,
        route: &mut Route,
    ) -> Option<()> {
        let (host, _) = self.fetch_page(head.linear).ok().flatten()?;
        let tail_host = match head.tail() {
            Some(tail) => Some(self.fetch_page(tail.page).ok().flatten()?.0),
            None => None,
        };
        let code = self.memory.code();
        let translator = self.translator.as_ref()?;
        Router {
            blocks,
            warm: self.threshold / 4,
            hot: translator.wish(head.frame, head.rip, mode).hot,
            vectors: if self.mmu.is_user() { self.context.allowed as u8 } else { 0 },
            mode,
            segment: self.code_segment(),
            is_there: &|entry| translator.regions.has(entry),
            settled: &|epoch| code.settled(&self.observer, epoch),
        }
        .find(head, (host, tail_host), route);
        // What was copied must be what the blocks were decoded from.
        let stands = code.version(head.frame) == head.version
            && head.tail().is_none_or(|tail| code.version(tail.frame) == tail.version);
        stands.then_some(())
    }

    /// Runs translated code from `entry`, which stands for the code at RIP.
    pub(crate) fn run_translated(&mut self, entry: Entry) -> Result<(), Abort> {
        let rip = self.state.rip;
        let user = self.mmu.is_user();
        let linear = self.code_segment().linear(rip);
        let second = jumps::second_page(linear).filter(|_| entry.crosses);
        let shared = self.mmu.code.is_global(user, linear)
            && second.is_none_or(|page| self.mmu.code.is_global(user, page));
        self.mmu.jumps.enter_context(self.mmu.data.space(View::User), user, entry.mode);
        if !self.alone {
            self.mmu.jumps.insert(rip, entry.address, (linear, second), user, shared);
        }
        self.mmu.mirror.settle();
        self.flags_to_context();
        self.sync_context();
        self.context.vcpu = std::ptr::from_mut(self) as u64;
        self.context.taped = u64::from(self.tape.is_some());
        let events = if self.brief { &raw const ALWAYS } else { self.handle.events_address() };
        self.context.events = events as u64;
        let Some(translator) = self.translator.as_mut() else { return Err(Abort::EndBlock) };
        if !self.alone {
            translator.connect(rip, entry, self.mmu.version());
        }
        translator.counters.entered = translator.counters.entered.wrapping_add(1);
        // SAFETY: the thunk is a function of this convention, made when the translator was.
        let enter = unsafe {
            std::mem::transmute::<u64, unsafe extern "sysv64" fn(u64) -> u64>(
                translator.thunks.enter,
            )
        };
        let (start, end) = translator.bounds();
        let _running = faults::Guard::new(self.context.vcpu as *mut Self, start, end);
        // SAFETY: the base was set to this vCPU by `Vcpu::set_base`, on this thread. Translated
        // code touches the vCPU's own fields through it, guest RAM where the TLB says that it
        // may, and calls back with the pointer that is in the context, which is derived from
        // this exclusive borrow; nothing else uses the borrow until it returns.
        let reason = if self.meter.detail.is_none() {
            // SAFETY: as above.
            unsafe { enter(entry.address) }
        } else {
            let since = host_tsc();
            // SAFETY: as above.
            let reason = unsafe { enter(entry.address) };
            self.meter.in_translated(since);
            reason
        };
        self.flags_from_context();
        self.code_hit = false;
        let link = self.context.link;
        let waiting = self.handle.pending().bits() & self.event_mask != 0;
        let Some(translator) = self.translator.as_mut() else { return Err(Abort::EndBlock) };
        translator.counters.left(reason, waiting);
        if reason == Exit::Link as u64 {
            let number = link as u32;
            if let Some(target) = translator.target(number) {
                self.state.rip = target;
            }
            translator.pending = Some((number, self.mmu.version()));
        } else if reason == Exit::Machine as u64 {
            return Err(Abort::Exit);
        } else if reason == Exit::Fault as u64 {
            return Err(Abort::Fault);
        } else if reason == Exit::Interpret as u64 {
            translator.refused = Some(self.state.rip);
        }
        Ok(())
    }

    /// Points the host thread's GS, which nothing else in the process uses, to this vCPU.
    pub(crate) fn set_base(&self) {
        const ARCH_SET_GS: libc::c_int = 0x1001;
        if self.translator.is_some() {
            let base = std::ptr::from_ref(self) as u64;
            // SAFETY: sets a segment base that neither the C library nor Rust's uses.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
            if self.mmu.mirror.is_ready() {
                faults::prepare_thread();
            }
        }
    }

    /// Runs `op` for translated code, which keeps the flags elsewhere. An error says that
    /// another op comes next, at RIP, or that the machine is wanted.
    fn execute(&mut self, op: &Op) -> Result<(), Exit> {
        self.flags_from_context();
        self.state.rip = op.rip;
        let outcome = if self.meter.detail.is_none() {
            (op.run)(self, op)
        } else {
            let since = host_tsc();
            let outcome = (op.run)(self, op);
            self.meter.called_back(since, op.code);
            outcome
        };
        let outcome = match outcome {
            Ok(()) => Ok(()),
            Err(Abort::EndBlock) => Err(Exit::Next),
            Err(Abort::Fault) => {
                self.faulted_at(op);
                if self.brief || self.lockstep.is_some() {
                    // Whoever watches wants to see it before it is delivered.
                    self.flags_to_context();
                    return Err(Exit::Fault);
                }
                match self.take_fault() {
                    None => Err(Exit::Next),
                    Some(exit) => {
                        self.exit = exit;
                        Err(Exit::Machine)
                    }
                }
            }
            Err(Abort::Exit) => Err(Exit::Machine),
        };
        self.flags_to_context();
        outcome
    }

    /// Runs `op` within a block. An error says that the block must be left.
    fn interpret(&mut self, op: &Op) -> Result<(), Exit> {
        if let Some(translator) = &mut self.translator {
            translator.counters.interpreted = translator.counters.interpreted.wrapping_add(1);
        }
        let (allowed, mappings) = (self.context.allowed, self.mmu.version());
        if (self.context.mirror_misses as i64) < 0 {
            self.missed_mirror(op);
        }
        let gs_asked = self.mmu.gs_pages.take_asked();
        self.execute(op)?;
        self.sync_context();
        if gs_asked {
            self.missed_gs_page(op);
        }
        self.invalidate_if_due();
        // The code of this block, the mapping it lies in or what it may use has changed.
        if self.code_hit || self.mmu.version() != mappings || allowed & !self.context.allowed != 0 {
            self.state.rip = op.next_rip();
            return Err(Exit::Next);
        }
        Ok(())
    }

    /// Tells the translator of the trace that was just left for RIP, which is in the same page:
    /// the frame, where it begins, and RIP.
    fn left_trace(&mut self, tell: impl FnOnce(&mut Translator, (RamFrame, Mode), u64, u64)) {
        let (from, here) = (self.context.spare, self.state.rip);
        // It is still the mode that the trace was made for.
        let known = self.mmu.code.lookup(self.mmu.is_user(), self.code_segment().linear(from));
        if let Some(frame) = known.map(|it| it.frame)
            && let Some(mode) = self.translation_mode()
            && let Some(translator) = &mut self.translator
        {
            tell(translator, (frame, mode), from, here);
        }
    }

    /// Where translated code goes on at RIP, if it may without coming by the run loop.
    fn go_on(&mut self) -> Option<u64> {
        self.catch_up_with_ac();
        self.invalidate_if_due();
        let translator = self.translator.as_ref()?;
        if self.brief
            || self.code_hit
            || translator.seen != self.memory.code().hits()
            || self.state.rflags.contains(RFlags::TF)
            || self.debug_active()
            || self.traces_blocks()
        {
            return None;
        }
        let (space, user) = (self.mmu.data.space(View::User), self.mmu.is_user());
        let mode = self.translation_mode()?;
        self.mmu.jumps.enter_context(space, user, mode);
        let host = self.mmu.jumps.find(self.state.rip)?;
        let waits = self.handle.pending().bits() & self.event_mask != 0;
        if waits || self.shadow != Shadow::None && self.holds_off() {
            return None;
        }
        self.sync_context();
        Some(host)
    }
}

/// What the thunk calls for an op within a block: zero to go on, a block to go on with, or
/// why to leave.
///
/// # Safety
/// `cpu` and `op` are what [`Vcpu::run_translated`] and the translator put there.
pub(super) unsafe extern "sysv64" fn interpret(cpu: *mut Vcpu, op: *const Op) -> u64 {
    // SAFETY: the vCPU is borrowed exclusively by `run_translated`, which waits for the code
    // that calls this; the op lives as long as that code.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    match cpu.interpret(op) {
        Ok(()) => 0,
        Err(Exit::Next) => cpu.go_on().unwrap_or(Exit::Next as u64),
        Err(exit) => exit as u64,
    }
}

/// The same for the last op of a block, which sets RIP.
///
/// # Safety
/// As [`interpret`].
pub(super) unsafe extern "sysv64" fn interpret_last(cpu: *mut Vcpu, op: *const Op) -> u64 {
    // SAFETY: as above.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    match cpu.execute(op) {
        Ok(()) | Err(Exit::Next) => cpu.go_on().unwrap_or(Exit::Next as u64),
        Err(exit) => exit as u64,
    }
}

/// What the thunk calls when a jump has not found its target: a block to go on with, or why
/// to leave.
///
/// # Safety
/// `cpu` is what [`Vcpu::run_translated`] put there.
pub(super) unsafe extern "sysv64" fn go_on(cpu: *mut Vcpu) -> u64 {
    // SAFETY: as above.
    let cpu = unsafe { &mut *cpu };
    cpu.go_on().unwrap_or(Exit::Next as u64)
}

/// The same where a trace was left because what it checks at once cannot be.
///
/// # Safety
/// As [`go_on`].
pub(super) unsafe extern "sysv64" fn go_on_behind_split(cpu: *mut Vcpu) -> u64 {
    // SAFETY: as above.
    let cpu = unsafe { &mut *cpu };
    cpu.left_trace(|translator, of, from, here| {
        translator.split(of, from, here, host_tsc());
    });
    cpu.go_on().unwrap_or(Exit::Next as u64)
}

/// The same where a trace was left because it is hot.
///
/// # Safety
/// As [`go_on`].
pub(super) unsafe extern "sysv64" fn go_on_in_hot(cpu: *mut Vcpu) -> u64 {
    // SAFETY: as above.
    let cpu = unsafe { &mut *cpu };
    if !cpu.waits_for_mirror() {
        cpu.left_trace(Translator::heated);
    }
    cpu.context.heat = cpu.translator.as_ref().map_or(u64::MAX, Translator::turns);
    cpu.go_on().unwrap_or(Exit::Next as u64)
}
