//! The `lguest` platform: the host side of the paravirtual ABI that Linux had from 2.6.23
//! to 4.13, for 32-bit guests of the bands V1a to V6.
//!
//! The guest's kernel runs in ring 1 of a CPU whose events all come here
//! ([`softcpu::supervisor`]): traps are reflected into the handlers that the guest named,
//! interrupts delivered by its flag in shared memory, hypercalls carried out. The guest has
//! no IDT, TSS or GDT of its own; its page tables are real, and walked by the CPU.
//!
//! One file each: what the guest shares (`shared_data`), hypercalls and the ring,
//! `traps`, `interrupts`, `paging`, `segments`, the instructions that are `emulate`d, the
//! `clock`, the early `console`. A guest that breaks the rules dies of a [`Death`], which
//! is reported and stops its vCPU; nothing it does is an error of ours. Everything runs on
//! the vCPU's thread but [`InterruptLines`] and [`Clock`].

use std::fmt;
use std::io::Write;
use std::sync::Arc;

use lguest_abi::ring::Cursor;
use lguest_abi::segments::{Gate, IDT_ENTRIES};
use lguest_abi::shared_data::StaticFields;
use lguest_abi::{Band, Paging, Virt};
use softcpu::state::segment::SegReg;
use softcpu::{PhysMemory, Supervisor, Trap, Vcpu, Verdict};

use crate::clock::TscFrequency;
use crate::devices::pci::PciBus;
use crate::devices::virtio::lguest_bus::LguestBus;

mod clock;
mod console;
mod death;
mod emulate;
mod environment;
#[doc(hidden)]
pub mod fuzz;
mod guest_memory;
mod hypercalls;
mod init;
mod interrupts;
mod lines;
pub mod long;
mod paging;
mod segments;
mod shared_data;
mod start;
mod traps;

pub use clock::Clock;
pub use death::Death;
pub use environment::LguestEnvironment;
pub use lines::{InterruptLines, LevelLines};
pub use start::vcpu_state;

use console::EarlyConsole;
use guest_memory::GuestMemory;
use segments::Gdt;
use shared_data::SharedData;

/// How a guest ends itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It powered off.
    PoweredOff,
    /// It wants to be started again, for this reason.
    Restart(String),
    /// A test or program ended, with this exit status.
    Exited(u8),
    /// Its kernel panicked, with these words.
    Panicked(String),
    /// It broke the rules; what it did, and where.
    Died(String),
}

/// Who hears how the guest ends. Called on its vCPU's thread.
pub type EndSink = Arc<dyn Fn(Ended) + Send + Sync>;

/// Where the guest finds its devices.
#[derive(Clone, Debug)]
pub enum GuestDevices {
    /// In a page of descriptors, V1 to V5.
    Bus(Arc<LguestBus>),
    /// On PCI, V6.
    Pci(Arc<PciBus>),
}

/// What the platform is built from.
pub struct LguestConfig {
    /// RAM, and the pages of devices above it.
    pub memory: Arc<PhysMemory>,
    /// How much of it is RAM in the guest's eyes, bytes.
    pub ram: u32,
    /// Where guest-physical memory ends, device pages included.
    pub limit: u32,
    /// How long the initrd is that lies at RAM's end.
    pub initrd: u32,
    /// How fast the TSC counts.
    pub frequency: TscFrequency,
    /// Where the early console prints to.
    pub console: Box<dyn Write + Send>,
    /// The lines that interrupts come by.
    pub lines: Arc<InterruptLines>,
    /// The devices.
    pub devices: GuestDevices,
    /// Who hears of the end.
    pub ended: EndSink,
}

impl fmt::Debug for LguestConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LguestConfig")
            .field("ram", &self.ram)
            .field("limit", &self.limit)
            .field("initrd", &self.initrd)
            .finish_non_exhaustive()
    }
}

/// The stack for traps from ring 3.
#[derive(Clone, Copy, Debug, Default)]
struct KernelStack {
    ss: u16,
    esp: Virt,
}

/// What is known of a guest once it has called LGUEST_INIT.
#[derive(Clone, Debug)]
struct Session {
    band: Band,
    data: SharedData,
    fields: StaticFields,
    cursor: Cursor,
    /// The format of its page tables, as far as is known.
    paging: Paging,
    /// It has not named page tables of its own yet.
    on_first_tables: bool,
}

/// The platform, as the supervisor of its one vCPU.
pub struct Lguest {
    memory: GuestMemory,
    ram: u32,
    initrd: u32,
    frequency: TscFrequency,
    gdt: Gdt,
    idt: Box<[Option<Gate>; IDT_ENTRIES]>,
    stack: KernelStack,
    session: Option<Session>,
    halted: bool,
    /// It halted with its interrupts off: for good.
    stopped: bool,
    /// How often in a row an interrupt was found that could not be delivered.
    retries: u32,
    lines: Arc<InterruptLines>,
    clock: Arc<Clock>,
    console: EarlyConsole,
    devices: GuestDevices,
    ended: EndSink,
}

impl fmt::Debug for Lguest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lguest")
            .field("session", &self.session)
            .field("halted", &self.halted)
            .finish_non_exhaustive()
    }
}

impl Lguest {
    /// The platform for a guest that has not started.
    #[must_use]
    pub fn new(config: LguestConfig) -> Self {
        let lines = config.lines;
        Self {
            memory: GuestMemory::new(config.memory, config.limit.into()),
            ram: config.ram,
            initrd: config.initrd,
            frequency: config.frequency,
            gdt: Gdt::new(),
            idt: Box::new([None; IDT_ENTRIES]),
            stack: KernelStack::default(),
            session: None,
            halted: false,
            stopped: false,
            retries: 0,
            clock: Arc::new(Clock::new(Arc::clone(&lines))),
            lines,
            console: EarlyConsole::new(config.console),
            devices: config.devices,
            ended: config.ended,
        }
    }

    /// The clock, which needs a thread.
    #[must_use]
    pub fn clock(&self) -> Arc<Clock> {
        Arc::clone(&self.clock)
    }

    /// Makes this the supervisor of `cpu`, whose state is that of [`vcpu_state`].
    pub fn install(self, cpu: &mut Vcpu) {
        cpu.hold_descriptors(self.gdt.entries());
        cpu.refuse_flags(paging::REFUSED);
        cpu.supervise(Box::new(self));
    }

    fn handle(&mut self, cpu: &mut Vcpu, trap: Trap) -> Result<Verdict, Death> {
        let verdict = match trap {
            Trap::Exception(exception) => self.exception(cpu, exception)?,
            Trap::Software { vector, at, checked } => {
                self.software_interrupt(cpu, vector, at, checked)?
            }
            Trap::Hypercall { at } => self.vmcall(cpu, at)?,
            Trap::Syscall { at } => self.no_such_instruction(cpu, at)?,
            Trap::Interrupt => Verdict::Resume,
        };
        // As in the old host's loop, every way into the guest delivers what it may.
        if verdict == Verdict::Stop { Ok(verdict) } else { self.deliver_interrupts(cpu) }
    }

    fn describe(&self, cpu: &Vcpu, death: Death) -> String {
        let eip = cpu.state.rip;
        let ring = cpu.state.segment(SegReg::Ss).dpl();
        match &self.session {
            Some(session) => {
                format!("{death}, at eip {eip:#x} in ring {ring}, a guest of band {}", session.band)
            }
            None => format!("{death}, at eip {eip:#x} before LGUEST_INIT"),
        }
    }
}

impl Supervisor for Lguest {
    fn trap(&mut self, cpu: &mut Vcpu, trap: Trap) -> Verdict {
        match self.handle(cpu, trap) {
            Ok(verdict) => verdict,
            Err(death) => {
                (self.ended)(Ended::Died(self.describe(cpu, death)));
                Verdict::Stop
            }
        }
    }
}
