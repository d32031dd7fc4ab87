//! Between the run loop and translated code: when a block is translated, the way in and out,
//! and the calls back for what it has interpreted.

use std::io;
use std::sync::atomic::AtomicU32;

use iced_x86::InstructionInfoFactory;

use super::cache::{Counters, Entry, Translator};
use super::copy::Copier;
use super::thunks::Exit;
use crate::decode::cache::Block as Decoded;
use crate::decode::op::Op;
use crate::vcpu::{Abort, Vcpu};

/// Runs of a block after which it is translated.
pub(crate) const THRESHOLD: u32 = 24;

/// What translated code that is to be left soon takes for the events raised.
static ALWAYS: AtomicU32 = AtomicU32::new(u32::MAX);

impl Vcpu {
    /// What the translator did so far; `None` without one.
    #[must_use]
    pub fn translator_counters(&self) -> Option<Counters> {
        self.translator.as_ref().map(|translator| translator.counters())
    }

    /// Has blocks translated after `runs` runs, whatever the vCPU was made with.
    ///
    /// # Errors
    /// When the host refuses code memory.
    #[doc(hidden)]
    pub fn translate_after(&mut self, runs: u32) -> io::Result<()> {
        if self.translator.is_none() {
            self.translator = Some(Translator::new()?);
        }
        self.threshold = runs;
        Ok(())
    }

    /// The host code for `block`, at whose RIP the vCPU is, if it is to be entered. Counts
    /// a run, and translates when there were enough.
    pub(crate) fn translated(&mut self, block: &Decoded) -> Option<Entry> {
        let translator = self.translator.as_mut()?;
        if translator.seen != self.memory.code().hits() {
            translator.seen = self.memory.code().hits();
            let memory = &self.memory;
            translator.drop_stale(|frame| memory.code().version(frame));
        }
        if translator.refused.take() == Some(block.rip) {
            return None;
        }
        let known = block.entry.get().filter(|known| known.generation == translator.generation);
        if known.is_some() {
            return known;
        }
        let runs = block.runs.get().saturating_add(1);
        block.runs.set(runs);
        if runs < self.threshold || block.tail.is_some() {
            return None;
        }
        // What another vCPU may still change unseen is compared with memory at every run.
        let settled = |epoch| self.memory.code().settled(&self.observer, epoch);
        if block.unsettled.as_ref().is_some_and(|unsettled| !settled(unsettled.epoch)) {
            return None;
        }
        let entry = self.translate(block);
        block.runs.set(0);
        block.entry.set(entry);
        entry
    }

    #[cold]
    fn translate(&mut self, block: &Decoded) -> Option<Entry> {
        let (host, _) = self.fetch_page(block.linear).ok().flatten()?;
        #[cfg_attr(not(test), expect(unused_mut, reason = "tests plant mistakes"))]
        let mut instructions = crate::decode::build::again(block, host);
        // What was read must be what the block was decoded from.
        if self.memory.code().version(block.frame) != block.version {
            return None;
        }
        let alike = instructions.iter().zip(&block.ops).all(|(instruction, op)| {
            instruction.ip() == op.rip && instruction.code() as u16 == op.code
        });
        if !alike || instructions.is_empty() {
            return None;
        }
        let translator = self.translator.as_mut()?;
        let mut factory = InstructionInfoFactory::new();
        let mut copier = Copier { features: self.cpuid.features(), factory: &mut factory };
        #[cfg_attr(not(test), expect(unused_mut, reason = "as above"))]
        let mut ops = block.ops.clone();
        #[cfg(test)]
        if let Some(mistake) = translator.mistake {
            instructions.iter_mut().zip(&mut ops).for_each(|(it, op)| mistake(it, op));
        }
        if translator.make_room() {
            self.mmu.jumps.clear();
        }
        translator.place(&instructions, ops, &mut copier, block.frame, block.version)
    }

    /// Runs translated code from `entry`, which stands for the code at RIP.
    pub(crate) fn run_translated(&mut self, entry: Entry) -> Result<(), Abort> {
        let rip = self.state.rip;
        let user = self.mmu.is_user();
        let shared = self.mmu.code.is_global(user, rip);
        self.mmu.jumps.enter_context(self.mmu.data.space(), user);
        if !self.alone {
            self.mmu.jumps.insert(rip, entry.address, user, shared);
        }
        self.flags_to_context();
        self.sync_context();
        self.context.vcpu = std::ptr::from_mut(self) as u64;
        let events = if self.brief { &raw const ALWAYS } else { self.handle.events_address() };
        self.context.events = events as u64;
        let Some(translator) = self.translator.as_mut() else { return Err(Abort::EndBlock) };
        if !self.alone {
            translator.connect(rip, entry.address);
        }
        translator.counters.entered = translator.counters.entered.wrapping_add(1);
        // SAFETY: the thunk is a function of this convention, made when the translator was.
        let enter = unsafe {
            std::mem::transmute::<u64, unsafe extern "sysv64" fn(u64) -> u64>(
                translator.thunks.enter,
            )
        };
        // SAFETY: the base was set to this vCPU by `Vcpu::set_base`, on this thread. Translated
        // code touches the vCPU's own fields through it, guest RAM where the TLB says that it
        // may, and calls back with the pointer that is in the context, which is derived from
        // this exclusive borrow; nothing else uses the borrow until it returns.
        let reason = unsafe { enter(entry.address) };
        self.flags_from_context();
        self.code_hit = false;
        let link = self.context.link;
        let Some(translator) = self.translator.as_mut() else { return Err(Abort::EndBlock) };
        if reason == Exit::Link as u64 {
            let number = link as u32;
            if let Some(target) = translator.target(number) {
                self.state.rip = target;
            }
            translator.pending = Some(number);
        } else if reason == Exit::Abort as u64 {
            return Err(translator.abort);
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
        }
    }

    /// Runs `op` for translated code, which keeps the flags elsewhere.
    fn execute(&mut self, op: &Op) -> Result<(), Exit> {
        self.flags_from_context();
        self.state.rip = op.rip;
        let outcome = (op.run)(self, op);
        self.flags_to_context();
        let Err(abort) = outcome else { return Ok(()) };
        if abort == Abort::Fault {
            self.faulted_at(op);
        }
        if let Some(translator) = &mut self.translator {
            translator.abort = abort;
        }
        Err(Exit::Abort)
    }

    /// Runs `op` within a block. An error says that the block must be left.
    fn interpret(&mut self, op: &Op) -> Result<(), Exit> {
        if let Some(translator) = &mut self.translator {
            translator.counters.interpreted = translator.counters.interpreted.wrapping_add(1);
        }
        let (allowed, mappings) = (self.context.allowed, self.mmu.version());
        self.execute(op)?;
        self.sync_context();
        // The code of this block, the mapping it lies in or what it may use has changed.
        if self.code_hit || self.mmu.version() != mappings || allowed & !self.context.allowed != 0 {
            self.state.rip = op.next_rip();
            return Err(Exit::Next);
        }
        Ok(())
    }
}

/// What the thunk calls for an op within a block: zero to go on.
///
/// # Safety
/// `cpu` and `op` are what [`Vcpu::run_translated`] and the translator put there.
pub(super) unsafe extern "sysv64" fn interpret(cpu: *mut Vcpu, op: *const Op) -> u64 {
    // SAFETY: the vCPU is borrowed exclusively by `run_translated`, which waits for the code
    // that calls this; the op lives as long as that code.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    cpu.interpret(op).map_or_else(|exit| exit as u64, |()| 0)
}

/// The same for the last op of a block, which sets RIP.
///
/// # Safety
/// As [`interpret`].
pub(super) unsafe extern "sysv64" fn interpret_last(cpu: *mut Vcpu, op: *const Op) -> u64 {
    // SAFETY: as above.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    // Where it went is in RIP.
    cpu.execute(op).map_or_else(|exit| exit, |()| Exit::Next) as u64
}
