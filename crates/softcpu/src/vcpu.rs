//! A vCPU: state, caches and the loop that runs guest code.
//!
//! [`Vcpu::run`] executes guest code until something needs the machine: the guest
//! halts, shuts down, or another thread raised an event. It is called on the vCPU's
//! own thread, again and again, by the `vmm` crate.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::addr::GuestVirtAddr;
use crate::cpuid::CpuidTable;
use crate::decode::cache::BlockCache;
use crate::decode::op::Op;
use crate::env::Environment;
use crate::exception::{Exception, PageFaultCode};
use crate::handle::{Event, VcpuHandle};
use crate::interp::BURST;
use crate::lockstep::tape::Tape;
use crate::lockstep::{self, Lockstep};
use crate::memory::PhysMemory;
use crate::memory::code_map::Observer;
use crate::mmu::{Mmu, PagingMode};
use crate::native::{NativeCache, Stubs};
use crate::state::rflags::RFlags;
use crate::state::{CodeSize, VcpuState};
use crate::stats::Meter;
use crate::trace::Tracer;
use crate::translate::context::Context;
use crate::translate::mode::CodeSegments;
use crate::translate::{self, BadTranslation, CodeCache, Translator};

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest executed `hlt`: nothing to do until an interrupt, NMI or other event.
    Halt,
    /// A triple fault: the CPU has shut down and only a reset revives it.
    Shutdown,
    /// [`Event::STOP`] was raised (and taken).
    Stopped,
    /// The translator and the interpreter differ, under [`Engine::Lockstep`]: see
    /// [`Vcpu::divergence`].
    Diverged,
    /// [`Event::ATTENTION`] was raised (and taken): INIT, SIPI or whatever the machine
    /// wants of this thread.
    Attention,
    /// The engine has found a bug of its own: [`Vcpu::failure`] says which. The vCPU must
    /// not run again.
    Failed,
}

/// Why an instruction did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Abort {
    /// An exception is recorded in the vCPU (by `Vcpu::raise`); RIP stays at the instruction.
    Fault,
    /// The instruction completed and set RIP itself, but the block must end here: the
    /// mode, the mapping or the code changed under it.
    EndBlock,
    /// The instruction completed (RIP is past it) and `run` returns what it left in the vCPU.
    Exit,
}

/// What every instruction handler returns.
pub type Step = Result<(), Abort>;

/// Interrupts that are held off for one instruction (SDM vol. 3, 6.8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Shadow {
    /// Nothing is held off.
    #[default]
    None,
    /// After `sti` with IF clear before: external interrupts wait for one instruction.
    Sti,
    /// After a load of SS: external interrupts, NMI and debug traps wait for one instruction.
    MovSs,
}

/// What runs a vCPU's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Engine {
    /// The interpreter alone, which is the definition of every instruction.
    Interpreter,
    /// The translator for 64- and 32-bit code that turns out hot, the interpreter for the rest.
    #[default]
    Translator,
    /// The translator for such code that is not quite cold, checked by the interpreter
    /// ([`crate::lockstep`]). CPUID offers neither RDRAND nor RDSEED then: what they answer
    /// cannot be had twice.
    Lockstep,
}

/// What a vCPU is made of.
pub struct VcpuConfig {
    /// The RAM it shares with its siblings.
    pub memory: Arc<PhysMemory>,
    /// What CPUID answers.
    pub cpuid: CpuidTable,
    /// The rest of the machine.
    pub env: Box<dyn Environment>,
    /// What runs its code.
    pub engine: Engine,
    /// How its code is translated, if it is.
    pub translation: translate::Config,
    /// What is generated to run instructions on the host: the same for all vCPUs of a machine.
    pub stubs: Arc<Stubs>,
    /// The code memory that it shares with them, if it translates. Without it, it has its own.
    pub code: Option<Arc<CodeCache>>,
    /// How others get its attention; made first, because the environment wants it too.
    pub handle: VcpuHandle,
}

impl fmt::Debug for VcpuConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuConfig").field("memory", &self.memory).finish_non_exhaustive()
    }
}

/// Counters of what the engine did; cheap enough to be always on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Blocks entered.
    pub blocks: u64,
    /// Operations begun (instructions, plus the few synthetic ones that end a block).
    pub ops: u64,
    /// Blocks decoded.
    pub decoded: u64,
    /// Accesses to memory that the TLB's fast path did not do: misses, and what crosses
    /// pages, goes to devices or stores to pages with code on them.
    pub slow_accesses: u64,
    /// Page walks for loads and stores that missed the TLB.
    pub walks: u64,
    /// Page walks for fetches of code.
    pub fetch_walks: u64,
    /// Misses that a global page's entry of another address space did for.
    pub retagged: u64,
    /// Times an event was looked after.
    pub events: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// External interrupts delivered.
    pub interrupts: u64,
}

/// One virtual CPU.
pub struct Vcpu {
    /// The architectural registers.
    pub state: VcpuState,
    /// TLB and paging mode.
    pub(crate) mmu: Mmu,
    /// What CS makes of code, looked up once per change.
    pub(crate) code_size: CodeSize,
    /// Where code was run, by number: what translations are made for.
    pub(crate) code_segments: CodeSegments,
    /// Decoded blocks; elsewhere while guest code runs.
    pub(crate) blocks: BlockCache,
    /// Generated stubs.
    pub(crate) native: NativeCache,
    /// The exception of the last [`Abort::Fault`].
    pub(crate) fault: Exception,
    /// The exit of the last [`Abort::Exit`].
    pub(crate) exit: Exit,
    /// One-instruction hold on interrupts.
    pub(crate) shadow: Shadow,
    /// NMIs are blocked until the next `iret`.
    pub(crate) nmi_blocked: bool,
    /// A store hit code of the block that is being run: it must end.
    pub(crate) code_hit: bool,
    /// Events worth looking up for, given IF and the shadow.
    pub(crate) event_mask: u32,
    pub(crate) memory: Arc<PhysMemory>,
    pub(crate) observer: Arc<Observer>,
    pub(crate) cpuid: CpuidTable,
    pub(crate) env: Box<dyn Environment>,
    pub(crate) handle: VcpuHandle,
    pub(crate) counters: Counters,
    /// How long everything takes.
    pub(crate) meter: Meter,
    /// Whoever watches.
    pub(crate) tracer: Option<Box<dyn Tracer>>,
    /// What system instructions keep besides the architectural registers.
    pub(crate) system: crate::system::SystemExtras,
    /// Whoever takes events in place of the IDT.
    pub(crate) supervision: crate::supervisor::Supervision,
    /// What translated code reads and writes besides the state.
    pub(crate) context: Context,
    pub(crate) translator: Option<Translator>,
    /// Runs of a block after which it is translated.
    pub(crate) threshold: u32,
    /// Translated code is to be left where it looks for events, whether there are any or not.
    pub(crate) brief: bool,
    /// Translated code is to be left after every block.
    pub(crate) alone: bool,
    /// Elements that a repeated string instruction does at once.
    pub(crate) burst: u64,
    /// Who comes after, to check.
    pub(crate) lockstep: Option<Box<Lockstep>>,
    /// What the machine and the clock answered, if that is recorded or replayed.
    pub(crate) tape: Option<Tape>,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("state", &self.state)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Vcpu {
    /// A vCPU at reset.
    ///
    /// # Errors
    /// When the host refuses the memory for generated code, or the vCPU cannot share what it is to
    /// share.
    pub fn new(config: VcpuConfig) -> io::Result<Box<Self>> {
        let observer = config.memory.code().enrol(config.handle.clone());
        let (mut cpuid, mut env, mut lockstep) = (config.cpuid, config.env, None);
        let (mut threshold, mut translation) = (translate::THRESHOLD, config.translation);
        if config.engine == Engine::Lockstep {
            cpuid = cpuid.without_random();
            let (follower, taped) = Lockstep::new(
                &config.memory,
                &cpuid,
                env,
                config.handle.clone(),
                config.translation,
                &config.stubs,
            )?;
            (env, lockstep, threshold) = (taped, Some(Box::new(follower)), lockstep::THRESHOLD);
            translation.turns = lockstep::TURNS;
        }
        if !config.stubs.serve(cpuid.features()) {
            return Err(io::Error::other("vCPUs that share stubs must have the same features"));
        }
        let mut vcpu = Box::new(Self {
            state: VcpuState::at_reset(),
            mmu: Mmu::new(),
            code_size: CodeSize::Bits16,
            code_segments: CodeSegments::default(),
            blocks: BlockCache::new(),
            native: NativeCache::new(config.stubs)?,
            fault: Exception::invalid_opcode(),
            exit: Exit::Stopped,
            shadow: Shadow::None,
            nmi_blocked: false,
            code_hit: false,
            event_mask: 0,
            memory: config.memory,
            observer,
            cpuid,
            env,
            handle: config.handle,
            counters: Counters::default(),
            meter: Meter::start(),
            tracer: None,
            system: crate::system::SystemExtras::default(),
            supervision: crate::supervisor::Supervision::default(),
            context: Context::new(),
            translator: None,
            threshold,
            brief: false,
            alone: false,
            burst: BURST,
            tape: lockstep.as_ref().map(|lockstep| lockstep.tape()),
            lockstep,
        });
        if config.engine != Engine::Interpreter {
            vcpu.use_translator(translation, config.code)?;
        }
        vcpu.state_changed();
        Ok(vcpu)
    }

    /// How other threads get this vCPU's attention.
    #[must_use]
    pub fn handle(&self) -> &VcpuHandle {
        &self.handle
    }

    /// What the engine has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Why [`Vcpu::run`] returned [`Exit::Failed`].
    #[must_use]
    pub fn failure(&self) -> Option<&BadTranslation> {
        self.translator.as_ref()?.failure()
    }

    /// Must be called after [`Vcpu::state`] was changed from outside: everything
    /// derived from it is made anew.
    pub fn state_changed(&mut self) {
        self.mmu.flush_all();
        self.mode_changed();
        // PAE paging walks from registers that are loaded with CR3. A table that does
        // not hold is left to the guest's first access, which faults.
        if self.mmu.mode == PagingMode::Pae {
            self.mmu.pdpte = self.read_pdptes(self.state.cr3).unwrap_or_default();
        }
        self.update_event_mask();
    }

    /// RESET or INIT: registers as at power-on. INIT keeps what the manual says it
    /// keeps (SDM vol. 3, table 9-1): TSC, MTRRs, x87 and vector state.
    pub fn init(&mut self) {
        let fresh = VcpuState::at_reset();
        let old = std::mem::replace(&mut self.state, fresh);
        self.state.vec = old.vec;
        self.state.mxcsr = old.mxcsr;
        self.state.fpu = old.fpu;
        self.state.xcr0 = old.xcr0;
        self.state.msr = old.msr;
        self.state.gpr[2] = u64::from(self.cpuid.signature());
        self.shadow = Shadow::None;
        self.nmi_blocked = false;
        self.state_changed();
    }

    /// A startup IPI: real mode at `vector << 12`.
    pub fn startup(&mut self, vector: u8) {
        use crate::state::segment::{SegReg, Segment};
        let mut cs = Segment::real_mode(u16::from(vector) << 8);
        cs.access = Segment::code_at_reset().access;
        *self.state.segment_mut(SegReg::Cs) = cs;
        self.state.rip = 0;
        self.state_changed();
    }

    /// Records `exception` as what the current instruction ends in.
    #[cold]
    pub(crate) fn raise(&mut self, exception: Exception) -> Abort {
        self.fault = exception;
        Abort::Fault
    }

    /// `#GP(code)`.
    #[cold]
    pub(crate) fn gp(&mut self, code: u32) -> Abort {
        self.raise(Exception::general_protection(code))
    }

    /// `#UD`.
    #[cold]
    pub(crate) fn ud(&mut self) -> Abort {
        self.raise(Exception::invalid_opcode())
    }

    /// `#PF`.
    #[cold]
    pub(crate) fn page_fault(&mut self, addr: GuestVirtAddr, code: PageFaultCode) -> Abort {
        self.raise(Exception::page_fault(addr, code))
    }

    /// Ends the run with `exit` once this instruction, `op`, is done.
    pub(crate) fn leave(&mut self, op: &Op, exit: Exit) -> Abort {
        self.state.rip = op.next_rip();
        self.exit = exit;
        Abort::Exit
    }

    /// Replaces RFLAGS and whatever follows from it. Every write of IF, TF, VM or AC
    /// goes through here.
    pub(crate) fn set_rflags(&mut self, flags: RFlags) {
        self.state.rflags = flags;
        self.mmu.set_alignment_override(flags.contains(RFlags::AC));
        self.update_event_mask();
    }

    /// Recomputes which events interrupt guest code.
    pub(crate) fn update_event_mask(&mut self) {
        let mut mask = Event::all();
        if !self.state.rflags.contains(RFlags::IF) || self.shadow != Shadow::None {
            mask.remove(Event::INTERRUPT);
        }
        // The manuals let a processor hold NMIs off after `sti` too. It must if `sti; hlt` is
        // to be one step: the handler's `iret` would open a gap between the two.
        if self.nmi_blocked || self.shadow != Shadow::None {
            mask.remove(Event::NMI);
        }
        self.event_mask = mask.bits();
    }

    /// CS, SS, a control register or EFER changed: paging mode, privilege and code
    /// size are looked at again.
    pub(crate) fn mode_changed(&mut self) {
        let user = self.state.cpl() == 3;
        self.code_size = self.state.code_size();
        self.code_segment_changed();
        self.mmu.set_mode(&self.state, user);
    }
}
