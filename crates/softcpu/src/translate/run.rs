//! Between the run loop and translated code: when a block is translated, the way in and out,
//! and the calls back for what it has interpreted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use super::code_cache::CodeCache;
use super::config::Config;
use super::counters::Counters;
use super::faults;
use super::jumps;
use super::mode::{CodeSegments, Mode};
use super::thunks::Exit;
use super::translations::Entry;
use super::translator::Translator;
use crate::decode::cache::Block;
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

/// Runs of a block after which it is translated.
pub(crate) const THRESHOLD: u32 = 6;

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

    /// Has code translated as `config` says, into `code` or else memory of its own.
    ///
    /// # Errors
    /// When the host refuses code memory, or `code` is another machine's.
    pub(crate) fn use_translator(
        &mut self,
        config: Config,
        code: Option<Arc<CodeCache>>,
    ) -> io::Result<()> {
        let translator = Translator::new(config, code, self.native.shared(), self.handle.clone())?;
        self.code_segments = CodeSegments::of(&translator.code);
        self.code_segment_changed();
        self.translator = Some(translator);
        self.prepare_mirror(config.mirror_after);
        Ok(())
    }

    /// Has blocks translated after `runs` runs, whatever the vCPU was made with.
    ///
    /// # Errors
    /// When the host refuses code memory.
    #[doc(hidden)]
    pub fn translate_after(
        &mut self,
        runs: u32,
        config: Config,
        code: Option<Arc<CodeCache>>,
    ) -> io::Result<()> {
        if self.translator.is_none() {
            self.use_translator(config, code)?;
        }
        self.threshold = runs;
        Ok(())
    }

    /// The host code for `block`, at whose RIP the vCPU is, if it is to be entered. Counts
    /// a run.
    pub(crate) fn translated(&mut self, block: &Block) -> Translation {
        let Some(mode) = self.translation_mode() else { return Translation::None };
        self.catch_up();
        let Some(translator) = self.translator.as_mut() else { return Translation::None };
        if translator.refused.take() == Some(block.rip) {
            return Translation::None;
        }
        if translator.closed.take() == Some(block.rip)
            && block.entry.get().is_some_and(|entry| translator.code.lock().is_closed(entry))
        {
            block.entry.set(None);
        }
        let known = |translator: &Translator| {
            block.entry.get().filter(|known| translator.holds(*known, mode))
        };
        if let Some(entry) = known(translator) {
            if !self.invalidate_if_due() {
                return Translation::Known(entry);
            }
            self.catch_up();
            // What is entered then is the way out; but this vCPU has said once more that it is
            // elsewhere, so what was given up since it looked may be filled again.
            if let Some(entry) = self.translator.as_ref().and_then(known) {
                return Translation::Known(entry);
            }
        }
        let Some(translator) = self.translator.as_mut() else { return Translation::None };
        if block.entry.get().is_some_and(|lost| !translator.code.has(lost)) {
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

    /// Makes sure that no code is entered whose guest's code has changed, and that this vCPU knows
    /// what has become of other code. It must be in its run loop.
    #[inline(always)]
    pub(crate) fn catch_up(&mut self) {
        if let Some(translator) = &self.translator
            && !translator.is_current(self.memory.code())
        {
            self.catch_up_now();
        }
    }

    #[cold]
    fn catch_up_now(&mut self) {
        let since = host_tsc();
        let Some(translator) = self.translator.as_mut() else { return };
        let (map, tracer, mmu) = (self.memory.code(), &mut self.tracer, &mut self.mmu);
        let Translator { code, observer, progress, maker, patience, pending, .. } = translator;
        if !code.is_up_to_date(map) {
            code.drop_stale(map, |rip| {
                maker.counters.invalidated = maker.counters.invalidated.wrapping_add(1);
                if let Some(tracer) = tracer {
                    tracer.event(trace::Event::Dropped { rip });
                }
            });
        }
        let translating = self.meter.translating.all;
        code.catch_up(observer, progress, |evicted| {
            // Nobody may jump to what was evicted.
            *pending = None;
            match evicted {
                Some(evicted) => mmu.jumps.forget_code(&evicted.hosts),
                None => mmu.jumps.clear(),
            }
            if evicted.is_none_or(|evicted| evicted.turned) {
                patience.filled(since, translating);
            }
        });
        self.meter.dropping.add_since(since);
    }

    /// From here on this vCPU runs code.
    pub(crate) fn enter_code(&mut self) {
        if let Some(translator) = &self.translator {
            translator.code.enter(&translator.observer, translator.progress);
        }
        self.catch_up();
    }

    /// It runs none until it enters again.
    pub(crate) fn leave_code(&self) {
        if let Some(translator) = &self.translator {
            translator.code.leave(&translator.observer);
        }
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
        translator.maker.counters.entered = translator.maker.counters.entered.wrapping_add(1);
        // SAFETY: the thunk is a function of this convention, made when the translator was.
        let enter = unsafe {
            std::mem::transmute::<u64, unsafe extern "sysv64" fn(u64) -> u64>(
                translator.code.thunks.enter,
            )
        };
        let code = translator.code.bounds();
        let _running = faults::Guard::new(self.context.vcpu as *mut Self, code.start, code.end);
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
        translator.maker.counters.left(reason, waiting);
        if reason == Exit::Link as u64 {
            let number = link as u32;
            if let Some(target) = translator.code.lock().target(number) {
                self.state.rip = target;
            }
            translator.pending = Some((number, self.mmu.version()));
        } else if reason == Exit::Machine as u64 {
            return Err(Abort::Exit);
        } else if reason == Exit::Fault as u64 {
            return Err(Abort::Fault);
        } else if reason == Exit::Interpret as u64 {
            translator.refused = Some(self.state.rip);
        } else if reason == Exit::Closed as u64 {
            translator.closed = Some(self.state.rip);
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
            translator.maker.counters.interpreted =
                translator.maker.counters.interpreted.wrapping_add(1);
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
    pub(super) fn left_trace(
        &mut self,
        tell: impl FnOnce(&mut Translator, (RamFrame, Mode), u64, u64),
    ) {
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
            || !translator.is_current(self.memory.code())
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
    cpu.note_split();
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
