//! The run loop: events, finding a block, running it, delivering what it raised.

use crate::decode::cache::{Block, BlockCache, Rare};
use crate::decode::op::{Op, OpFlags};
use crate::handle::Event;
use crate::memory::ram::RamFrame;
use crate::state::CodeSize;
use crate::state::rflags::RFlags;
use crate::state::segment::SegReg;
use crate::supervisor::Trap;
use crate::system::tsc::host_tsc;
use crate::trace;
use crate::translate::{Sought, Translation};
use crate::vcpu::{Abort, Exit, Shadow, Vcpu};

impl Vcpu {
    /// Runs guest code until something needs the machine.
    pub fn run(&mut self) -> Exit {
        self.meter.resume();
        self.enter_guest();
        self.set_base();
        let exit = if self.lockstep.is_some() {
            self.with_blocks(Self::run_in_lockstep)
        } else {
            self.with_blocks(Self::run_blocks)
        };
        self.leave_guest();
        self.meter.pause(exit);
        self.publish_stats_if_due();
        exit
    }

    /// From here on stores to code must be seen: catches up with what other vCPUs decoded.
    fn enter_guest(&mut self) {
        let memory = std::sync::Arc::clone(&self.memory);
        let observer = std::sync::Arc::clone(&self.observer);
        let code = memory.code();
        code.enter(&observer, || {
            self.mmu.drop_writes(code.epoch(), |frame| code.is_marked(frame));
        });
        self.enter_code();
    }

    /// No code is run until it is entered again.
    fn leave_guest(&self) {
        self.memory.code().leave(&self.observer);
        self.leave_code();
    }

    /// Takes the decoded blocks out of the vCPU while it runs: instructions then may
    /// change all of it while the block they belong to is looked at.
    pub(crate) fn with_blocks<T>(
        &mut self,
        run: impl FnOnce(&mut Self, &mut BlockCache) -> T,
    ) -> T {
        let mut blocks = std::mem::take(&mut self.blocks);
        let result = run(self, &mut blocks);
        self.blocks = blocks;
        result
    }

    fn run_blocks(&mut self, blocks: &mut BlockCache) -> Exit {
        loop {
            if let Some(exit) = self.advance(blocks, false) {
                return exit;
            }
        }
    }

    /// Runs exactly one instruction (or takes one event): for lockstep comparison and
    /// debuggers. `None` means that the guest just goes on.
    pub fn single_step(&mut self) -> Option<Exit> {
        self.enter_guest();
        let exit = self.with_blocks(|cpu, blocks| cpu.advance(blocks, true));
        self.env.settle();
        self.leave_guest();
        exit
    }

    /// Runs one block, or takes one event: what [`Vcpu::run`] does until it returns, for
    /// whoever must not wait that long. Translated code goes on to its next look for events.
    #[doc(hidden)]
    pub fn run_one_block(&mut self) -> Option<Exit> {
        self.enter_guest();
        self.brief = true;
        self.set_base();
        let exit = if self.lockstep.is_some() {
            self.with_blocks(Self::run_one_block_in_lockstep)
        } else {
            self.with_blocks(|cpu, blocks| cpu.advance(blocks, false))
        };
        self.brief = false;
        self.leave_guest();
        exit
    }

    #[inline(always)]
    fn advance(&mut self, blocks: &mut BlockCache, single: bool) -> Option<Exit> {
        if self.handle.pending().bits() & self.event_mask != 0
            && let Some(exit) = self.service_events()
        {
            return Some(exit);
        }
        let outcome = if single { self.step(blocks) } else { self.run_some(blocks) };
        match outcome {
            Ok(()) | Err(Abort::EndBlock) => None,
            Err(Abort::Exit) => Some(self.exit),
            Err(Abort::Fault) => self.take_fault(),
        }
    }

    /// Runs one block, or one instruction if it must be run alone.
    #[inline(always)]
    pub(crate) fn run_some(&mut self, blocks: &mut BlockCache) -> Result<(), Abort> {
        if self.stepping() { self.step(blocks) } else { self.run_block(blocks) }
    }

    /// Puts RIP back to the instruction that faulted.
    #[cold]
    pub(crate) fn faulted_at(&mut self, op: &Op) {
        self.state.rip = op.rip;
        if op.flags.contains(OpFlags::STACK) {
            self.fault = self.fault.on_stack();
        }
    }

    /// Delivers the recorded exception.
    pub(crate) fn take_fault(&mut self) -> Option<Exit> {
        let exception = self.fault;
        self.counters.exceptions = self.counters.exceptions.wrapping_add(1);
        if let Some(tracer) = &mut self.tracer {
            tracer.event(trace::Event::Exception { state: &self.state, exception });
        }
        if self.supervised() {
            return self.hand_over(Trap::Exception(exception));
        }
        self.deliver_exception(exception).is_err().then_some(Exit::Shutdown)
    }

    /// Takes the events that may be taken now.
    #[cold]
    pub(crate) fn service_events(&mut self) -> Option<Exit> {
        self.counters.events = self.counters.events.wrapping_add(1);
        self.publish_stats_if_due();
        let pending = self.handle.pending();
        if pending.contains(Event::CODE_PAGES) {
            self.handle.take(Event::CODE_PAGES);
            self.enter_guest();
        }
        if self.handle.take(Event::CODE_CHANGED) != Event::empty() {
            self.catch_up();
        }
        if pending.contains(Event::FLUSH_TLB) {
            self.handle.take(Event::FLUSH_TLB);
            self.mmu.flush_all();
        }
        if pending.contains(Event::STOP) {
            self.handle.take(Event::STOP);
            return Some(Exit::Stopped);
        }
        if pending.contains(Event::ATTENTION) {
            self.handle.take(Event::ATTENTION);
            return Some(Exit::Attention);
        }
        let allowed = Event::from_bits_truncate(self.event_mask);
        if pending.contains(Event::NMI) && allowed.contains(Event::NMI) {
            self.handle.take(Event::NMI);
            if self.deliver_nmi().is_err() {
                return Some(Exit::Shutdown);
            }
        } else if pending.contains(Event::INTERRUPT) && allowed.contains(Event::INTERRUPT) {
            // Cleared first: an interrupt that arrives while we acknowledge raises it again.
            self.handle.take(Event::INTERRUPT);
            if self.supervised() {
                return self.hand_over(Trap::Interrupt);
            }
            if let Some(vector) = self.env.acknowledge_interrupt() {
                self.counters.interrupts = self.counters.interrupts.wrapping_add(1);
                if let Some(tracer) = &mut self.tracer {
                    tracer.event(trace::Event::Interrupt { state: &self.state, vector });
                }
                if self.deliver_interrupt(vector).is_err() {
                    return Some(Exit::Shutdown);
                }
            }
        }
        None
    }

    /// Whether the next instruction must be run alone: single step, an interrupt that is held
    /// off for one instruction, or breakpoints in force.
    #[inline(always)]
    pub(crate) fn stepping(&mut self) -> bool {
        self.state.rflags.contains(RFlags::TF)
            || self.debug_active()
            || self.shadow != Shadow::None && self.holds_off()
    }

    /// Whether what the shadow of `sti` or of a load of SS holds off is waiting. If it is not,
    /// the shadow is over: nobody looks for events before the next instruction has run.
    #[cold]
    pub(crate) fn holds_off(&mut self) -> bool {
        let held = std::mem::take(&mut self.shadow);
        self.update_event_mask();
        if held != Shadow::MovSs && self.handle.pending().bits() & self.event_mask == 0 {
            return false;
        }
        self.shadow = held;
        self.update_event_mask();
        true
    }

    /// Finds (or makes) the block at RIP, to be interpreted, and its ops.
    #[inline(always)]
    pub(crate) fn find_block<'a>(
        &mut self,
        blocks: &'a mut BlockCache,
    ) -> Result<(&'a Block, &'a [Op]), Abort> {
        self.find::<false>(blocks)
    }

    /// The same, or if `HOLLOW` one that is there for its translation only.
    #[inline(always)]
    fn find<'a, const HOLLOW: bool>(
        &mut self,
        blocks: &'a mut BlockCache,
    ) -> Result<(&'a Block, &'a [Op]), Abort> {
        let rip = self.state.rip;
        let linear = if self.code_size == CodeSize::Bits64 {
            rip
        } else {
            let cs = self.state.segment(SegReg::Cs);
            if rip > u64::from(cs.limit) {
                return Err(self.gp(0));
            }
            cs.base.wrapping_add(rip) & 0xffff_ffff
        };
        let Some((host, frame)) = self.fetch_page(linear)? else { return Err(self.gp(0)) };
        let slot = BlockCache::slot(linear);
        let mut good = |block: &Block| {
            block.linear == linear
                && block.frame == frame
                && block.rip == rip
                && block.size == self.code_size
                && block.version == self.memory.code().version(frame)
                && (HOLLOW || !block.is_hollow())
                && block.rare.as_ref().is_none_or(|rare| self.recheck(block, rare, host))
        };
        let found = blocks.get(slot).is_some_and(&mut good)
            || blocks.bring_back(slot, linear, frame) && blocks.get(slot).is_some_and(&mut good);
        if !found {
            let hollow = if HOLLOW { self.hollow(linear, frame)? } else { None };
            let since = host_tsc();
            if blocks.make_room() {
                self.meter.sweeping.add_since(since);
            }
            match hollow {
                Some(hollow) => blocks.put_hollow(slot, hollow),
                None => {
                    let block = self.make_block(blocks, rip, linear, host, frame)?;
                    blocks.put(slot, block);
                }
            }
        }
        // There is one now, whichever way it came.
        let block = blocks.get(slot).ok_or(Abort::EndBlock)?;
        block.used.set(found);
        Ok((block, blocks.ops(block)))
    }

    /// A block of nothing but a translation, if the code was translated before. RIP must be a
    /// linear address for it.
    fn hollow(&mut self, linear: u64, frame: RamFrame) -> Result<Option<Block>, Abort> {
        let mode = self.translation_mode().filter(|mode| mode.is_movable());
        let Some(mode) = mode else { return Ok(None) };
        let since = host_tsc();
        let version = self.memory.code().version(frame);
        let entry = self.translated_before(Sought { rip: linear, frame, version, mode });
        self.meter.translating.add_since(since);
        self.check_translations()?;
        let size = self.code_size;
        Ok(entry.map(|entry| Block::hollow(linear, size, frame, version, entry, self.threshold)))
    }

    /// Makes the block at RIP, of one for the same code at another address if there is one.
    fn make_block(
        &mut self,
        blocks: &mut BlockCache,
        rip: u64,
        linear: u64,
        host: u64,
        frame: RamFrame,
    ) -> Result<Block, Abort> {
        let since = host_tsc();
        let block = match self.twin(blocks, linear, frame) {
            Some(block) => block,
            None => self.build_block(blocks, rip, linear, host, frame)?,
        };
        if let Some(hollow) = blocks.get(BlockCache::slot(linear)).filter(|old| {
            old.is_hollow()
                && (old.linear, old.size) == (linear, block.size)
                && (old.frame, old.version) == (frame, block.version)
        }) {
            // Its translation stays with it.
            block.entry.set(hollow.entry.get());
            block.set_runs(hollow.runs());
        }
        self.meter.decoding.add_since(since);
        self.code_hit = false;
        Ok(block)
    }

    /// The block at `linear`, made of one for the same code at another address.
    fn twin(&self, blocks: &mut BlockCache, linear: u64, frame: RamFrame) -> Option<Block> {
        let twin = blocks.twin(linear, frame)?;
        let good = twin.version == self.memory.code().version(frame)
            && twin.size == self.code_size
            && self.code_size == CodeSize::Bits64
            && twin.tail().is_none()
            && twin.unsettled().is_none_or(|unsettled| {
                self.memory.code().settled(&self.observer, unsettled.epoch)
            });
        if good { blocks.moved(linear, frame) } else { None }
    }

    /// The checks that few blocks need: the second page, and bytes that another vCPU
    /// may still be able to change unseen.
    #[cold]
    fn recheck(&mut self, block: &Block, rare: &Rare, host: u64) -> bool {
        let mut tail_host = 0;
        if let Some(tail) = rare.tail {
            match self.fetch_page(tail.page) {
                Ok(Some((host, frame)))
                    if frame == tail.frame && self.memory.code().version(frame) == tail.version =>
                {
                    tail_host = host;
                }
                // Rebuilding the block raises whatever fetching it raises.
                _ => return false,
            }
        }
        match &rare.unsettled {
            Some(unsettled) if !self.memory.code().settled(&self.observer, unsettled.epoch) => {
                block.unchanged(host, tail_host)
            }
            _ => true,
        }
    }

    #[inline(always)]
    fn run_block(&mut self, blocks: &mut BlockCache) -> Result<(), Abort> {
        if self.has_deliveries() {
            self.take_deliveries(blocks);
            self.check_translations()?;
        }
        let ops = if self.traces_blocks() {
            let (_, ops) = self.find_block(blocks)?;
            self.trace_block(ops.len());
            ops
        } else {
            let (block, ops) = self.find::<true>(blocks)?;
            match self.translated(block) {
                Translation::None if block.is_hollow() => self.find_block(blocks)?.1,
                Translation::None => ops,
                Translation::Known(entry) => return self.run_translated(entry),
                Translation::Wanted => {
                    let slot = BlockCache::slot(block.linear);
                    let since = host_tsc();
                    let entry = self.translate(blocks, slot);
                    self.meter.translating.add_since(since);
                    self.check_translations()?;
                    if let Some(entry) = entry {
                        return self.run_translated(entry);
                    }
                    blocks.ops(blocks.get(slot).ok_or(Abort::EndBlock)?)
                }
            }
        };
        self.counters.blocks = self.counters.blocks.wrapping_add(1);
        let mut outcome = Ok(());
        let mut done = 0_usize;
        for op in ops {
            done = done.wrapping_add(1);
            if let Err(abort) = (op.run)(self, op) {
                if abort == Abort::Fault {
                    self.faulted_at(op);
                }
                outcome = Err(abort);
                break;
            }
            if self.code_hit {
                // The store may have hit the rest of this very block.
                if done < ops.len() {
                    self.state.rip = op.next_rip();
                }
                break;
            }
        }
        self.code_hit = false;
        self.counters.ops = self.counters.ops.wrapping_add(done as u64);
        outcome
    }

    /// Leaves if a translation was found to be wrong.
    fn check_translations(&mut self) -> Result<(), Abort> {
        if self.failure().is_some() {
            self.exit = Exit::Failed;
            return Err(Abort::Exit);
        }
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn traces_blocks(&self) -> bool {
        self.tracer.as_ref().is_some_and(|tracer| tracer.wants_blocks())
    }

    #[cold]
    fn trace_block(&mut self, instructions: usize) {
        if let Some(tracer) = &mut self.tracer {
            tracer.event(trace::Event::Block { state: &self.state, instructions });
        }
    }

    /// Runs one instruction, with the traps that follow it.
    #[cold]
    pub(crate) fn step(&mut self, blocks: &mut BlockCache) -> Result<(), Abort> {
        let trap = self.state.rflags.contains(RFlags::TF);
        let held = std::mem::take(&mut self.shadow);
        self.update_event_mask();
        if held != Shadow::MovSs {
            // Left over from an instruction that faulted: those do not trap.
            self.system.data_breakpoints = 0;
        }
        self.check_code_breakpoint(self.state.rip)?;
        let (_, ops) = self.find_block(blocks)?;
        if self.traces_blocks() {
            self.trace_block(1);
        }
        let outcome = match ops.first() {
            Some(op) => {
                self.counters.ops = self.counters.ops.wrapping_add(1);
                let outcome = (op.run)(self, op);
                match outcome {
                    Err(Abort::Fault) => self.faulted_at(op),
                    Ok(()) if ops.len() > 1 => self.state.rip = op.next_rip(),
                    _ => {}
                }
                outcome
            }
            None => Ok(()),
        };
        self.code_hit = false;
        if outcome != Err(Abort::Fault) {
            self.after_step(trap)?;
        }
        outcome
    }
}
