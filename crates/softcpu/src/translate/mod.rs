//! The translator: guest code as host code.
//!
//! Same architecture on both sides, so most instructions are copied as they are, their
//! registers renamed (`registers`) and their memory operand checked against the data TLB
//! in line (`access`). Blocks are the interpreter's own, decoded and validated by it;
//! those that turn out hot are translated (`block`) and entered from then on. Whatever a
//! block does not do itself it has the interpreter do, one instruction at a time, through
//! thunks that keep every register (`thunks`): the interpreter stays the definition.
//!
//! Each vCPU has its own code memory, so code is only ever changed by the thread that runs
//! it. A block is entered from another in its page by a direct jump, from anywhere by a look
//! into the jump cache (`jumps`), and else by the run loop. When the code under it
//! changes, its first instruction is replaced by a jump out.

mod access;
mod assembler;
mod block;
pub(crate) mod context;
mod copy;
mod fields;
pub(crate) mod jumps;
mod registers;
mod thunks;
mod verify;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::AtomicU32;

use iced_x86::{Instruction, InstructionInfoFactory};

use crate::code_memory::CodeMemory;
use crate::decode::cache::Block as Decoded;
use crate::decode::op::Op;
use crate::memory::ram::RamFrame;
use crate::vcpu::{Abort, Vcpu};

use copy::Copier;
use thunks::{Exit, Thunks};

/// Code memory per vCPU, bytes. Pages are taken from the host as they fill.
const CAPACITY: usize = 64 << 20;
/// Runs of a block after which it is translated.
pub(crate) const THRESHOLD: u32 = 24;
/// Blocks start on a boundary that the host's fetch unit likes.
const ALIGN: usize = 16;

/// What translated code that is to be left soon takes for the events raised.
static ALWAYS: AtomicU32 = AtomicU32::new(u32::MAX);

/// A translated block, as the interpreter's block remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Which filling of the code memory it is in.
    generation: u32,
    /// Where it is executed.
    address: u64,
}

/// A translated block.
#[derive(Debug)]
struct Placed {
    /// Where in the code memory it is.
    offset: usize,
    /// Where in its code it leaves to be looked up again.
    stale: usize,
    /// What it calls the interpreter with.
    _ops: Box<[Op]>,
}

/// A jump in code memory that may go straight to another block.
#[derive(Clone, Copy, Debug)]
struct Link {
    /// Where its distance is.
    offset: usize,
    target: u64,
    from: u32,
}

/// All translated code of one vCPU.
#[derive(Debug)]
pub(crate) struct Translator {
    memory: CodeMemory,
    thunks: Thunks,
    /// Bytes used, and how many of them are thunks.
    used: usize,
    fixed: usize,
    generation: u32,
    blocks: Vec<Placed>,
    links: Vec<Link>,
    /// Blocks by the frame their code is in, and the version they hold for.
    frames: HashMap<RamFrame, (u32, Vec<u32>)>,
    /// Blocks that are stale: nothing may be linked from them any more.
    stale: Vec<bool>,
    /// The link that the last block was left by.
    pending: Option<u32>,
    /// What the last interpreted op ended in.
    abort: Abort,
    /// The code map's count of hits that [`Translator::frames`] is up to date with.
    seen: u64,
    /// The block at this address must be interpreted this time.
    refused: Option<u64>,
    counters: Counters,
}

/// What the translator did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Blocks translated.
    pub translated: u64,
    /// Bytes of host code made for them.
    pub bytes: u64,
    /// Times translated code was entered from the run loop.
    pub entered: u64,
    /// Instructions that translated code had interpreted.
    pub interpreted: u64,
    /// Blocks that became stale.
    pub invalidated: u64,
    /// Times the code memory was full, and emptied.
    pub emptied: u64,
}

impl Translator {
    /// # Errors
    /// When the host refuses code memory.
    pub(crate) fn new() -> io::Result<Self> {
        let mut memory = CodeMemory::new(CAPACITY)?;
        let base = memory.address(0) as u64;
        let (code, thunks) =
            thunks::make(base).map_err(|_| io::Error::other("the thunks do not assemble"))?;
        if !memory.write(0, &code) {
            return Err(io::Error::other("the thunks do not fit"));
        }
        Ok(Self {
            memory,
            thunks,
            used: code.len(),
            fixed: code.len(),
            generation: 0,
            blocks: Vec::new(),
            links: Vec::new(),
            frames: HashMap::new(),
            stale: Vec::new(),
            pending: None,
            abort: Abort::EndBlock,
            seen: 0,
            refused: None,
            counters: Counters::default(),
        })
    }

    /// What it did so far.
    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Empties the code memory.
    fn empty(&mut self) {
        self.used = self.fixed;
        self.generation = self.generation.wrapping_add(1);
        self.blocks.clear();
        self.links.clear();
        self.frames.clear();
        self.stale.clear();
        self.pending = None;
        self.counters.emptied = self.counters.emptied.wrapping_add(1);
    }

    /// Places `ops`, decoded from `instructions`, whose code is in `frame` at `version`.
    /// `None` when the code memory is full or the block is none for us.
    fn place(
        &mut self,
        instructions: &[Instruction],
        ops: Box<[Op]>,
        copier: &mut Copier<'_>,
        frame: RamFrame,
        version: u32,
    ) -> Option<Entry> {
        let offset = self.used.checked_next_multiple_of(ALIGN)?;
        let address = self.memory.address(offset) as u64;
        let first_link = u32::try_from(self.links.len()).ok()?;
        let made =
            block::translate(instructions, &ops, copier, &self.thunks, address, first_link).ok()?;
        if cfg!(debug_assertions)
            && let Err(violation) = verify::verify(&made.code, address, &self.thunks)
        {
            debug_assert!(false, "{violation}");
        }
        if !self.memory.write(offset, &made.code) {
            return None;
        }
        self.used = offset.saturating_add(made.code.len());
        self.counters.translated = self.counters.translated.wrapping_add(1);
        self.counters.bytes = self.counters.bytes.wrapping_add(made.code.len() as u64);
        let number = u32::try_from(self.blocks.len()).ok()?;
        self.links.extend(made.links.iter().map(|link| Link {
            offset: offset.saturating_add(link.at),
            target: link.target,
            from: number,
        }));
        self.blocks.push(Placed { offset, stale: made.stale, _ops: ops });
        self.stale.push(false);
        let (known, blocks) = self.frames.entry(frame).or_insert((version, Vec::new()));
        if *known != version {
            // The others are stale, and about to be found out.
            return None;
        }
        blocks.push(number);
        Some(Entry { generation: self.generation, address })
    }

    /// Writes the jump distance at `offset`, so that it goes to `to`.
    fn aim(&mut self, offset: usize, to: u64) {
        let next = (self.memory.address(offset) as u64).wrapping_add(4);
        let written = self.memory.write(offset, &(to.wrapping_sub(next) as u32).to_le_bytes());
        debug_assert!(written, "links are inside the code memory");
    }

    /// The link by which the last block was left, if it may go straight to its target.
    fn connect(&mut self, rip: u64, to: u64) {
        let Some(number) = self.pending.take() else { return };
        let Some(link) = self.links.get(number as usize).copied() else { return };
        let alive = self.stale.get(link.from as usize).is_some_and(|stale| !stale);
        if link.target == rip && alive {
            self.aim(link.offset, to);
        }
    }

    /// Makes sure that no block is entered whose code has changed.
    fn drop_stale(&mut self, version: impl Fn(RamFrame) -> u32) {
        let changed: Vec<RamFrame> = self
            .frames
            .iter()
            .filter(|(frame, (known, _))| version(**frame) != *known)
            .map(|(frame, _)| *frame)
            .collect();
        for frame in changed {
            let Some((_, blocks)) = self.frames.remove(&frame) else { continue };
            for number in blocks {
                let Some(placed) = self.blocks.get(number as usize) else { continue };
                let (offset, stale) = (placed.offset, placed.stale);
                let distance = (stale as u32).wrapping_sub(5);
                let written = self.memory.write(offset, &[0xe9]);
                debug_assert!(written, "blocks are inside the code memory");
                let written = self.memory.write(offset.saturating_add(1), &distance.to_le_bytes());
                debug_assert!(written, "blocks are inside the code memory");
                if let Some(stale) = self.stale.get_mut(number as usize) {
                    *stale = true;
                }
                self.counters.invalidated = self.counters.invalidated.wrapping_add(1);
            }
        }
    }
}

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
        let instructions = crate::decode::build::again(block, host);
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
        let ops = block.ops.clone();
        // Room for the largest block there can be.
        if translator.used.saturating_add(1 << 16) > translator.memory.capacity() {
            translator.empty();
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
        self.mmu.jumps.insert(rip, entry.address, user, shared);
        self.flags_to_context();
        self.sync_context();
        self.context.vcpu = std::ptr::from_mut(self) as u64;
        let events = if self.brief { &raw const ALWAYS } else { self.handle.events_address() };
        self.context.events = events as u64;
        let Some(translator) = self.translator.as_mut() else { return Err(Abort::EndBlock) };
        translator.connect(rip, entry.address);
        translator.counters.entered = translator.counters.entered.wrapping_add(1);
        // SAFETY: the thunk is a function of this convention, made when the translator was.
        let enter = unsafe {
            std::mem::transmute::<u64, unsafe extern "sysv64" fn(u64, u64) -> u64>(
                translator.thunks.enter,
            )
        };
        // SAFETY: the base was set to this vCPU by `Vcpu::set_base`, on this thread. Translated
        // code touches the vCPU's own fields through it, guest RAM where the TLB says that it
        // may, and calls back with the pointer that is in the context, which is derived from
        // this exclusive borrow; nothing else uses the borrow until it returns.
        let reason = unsafe { enter(entry.address, entry.address) };
        self.flags_from_context();
        self.code_hit = false;
        let link = self.context.link;
        let Some(translator) = self.translator.as_mut() else { return Err(Abort::EndBlock) };
        if reason == Exit::Link as u64 {
            let number = link as u32;
            if let Some(link) = translator.links.get(number as usize) {
                self.state.rip = link.target;
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

    /// Runs `op` for translated code. Says whether that must be left.
    fn interpret(&mut self, op: &Op) -> Option<Exit> {
        self.flags_from_context();
        self.state.rip = op.rip;
        let (allowed, context) = (self.context.allowed, self.mmu.version());
        if let Some(translator) = &mut self.translator {
            translator.counters.interpreted = translator.counters.interpreted.wrapping_add(1);
        }
        let outcome = (op.run)(self, op);
        self.flags_to_context();
        if let Err(abort) = outcome {
            if abort == Abort::Fault {
                self.faulted_at(op);
            }
            if let Some(translator) = &mut self.translator {
                translator.abort = abort;
            }
            return Some(Exit::Abort);
        }
        self.sync_context();
        // The code of this block, the mapping it lies in or what it may use has changed.
        if self.code_hit || self.mmu.version() != context || allowed & !self.context.allowed != 0 {
            self.state.rip = op.next_rip();
            return Some(Exit::Next);
        }
        None
    }
}

/// What the thunk calls for an op within a block: zero to go on.
///
/// # Safety
/// `cpu` and `op` are what [`Vcpu::run_translated`] and the translator put there.
unsafe extern "sysv64" fn interpret(cpu: *mut Vcpu, op: *const Op) -> u64 {
    // SAFETY: the vCPU is borrowed exclusively by `run_translated`, which waits for the code
    // that calls this; the op lives as long as that code.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    cpu.interpret(op).map_or(0, |exit| exit as u64)
}

/// The same for the last op of a block, which sets RIP.
///
/// # Safety
/// As [`interpret`].
unsafe extern "sysv64" fn interpret_last(cpu: *mut Vcpu, op: *const Op) -> u64 {
    // SAFETY: as above.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    cpu.interpret_last(op) as u64
}

impl Vcpu {
    fn interpret_last(&mut self, op: &Op) -> Exit {
        self.flags_from_context();
        self.state.rip = op.rip;
        let outcome = (op.run)(self, op);
        self.flags_to_context();
        match outcome {
            Ok(()) => Exit::Next,
            Err(abort) => {
                if abort == Abort::Fault {
                    self.faulted_at(op);
                }
                if let Some(translator) = &mut self.translator {
                    translator.abort = abort;
                }
                Exit::Abort
            }
        }
    }
}
