//! The host side of the 64-bit ABI: guests in long mode, whose specification is
//! `docs/lguest-abi.md` and whose numbers and layouts are [`lguest_abi::long`]'s.
//!
//! The idea is that of the 32-bit platform beside it: the guest's kernel runs in ring 1,
//! and every event of its vCPU comes here ([`softcpu::supervisor`]). It has gates where that
//! one had an IDT, and the CPU walks its page tables. What the CPU would answer with an
//! exception is answered with that exception; what breaks the ABI's own rules is a
//! [`LongDeath`].
//!
//! One file each: hypercalls and the ring in `calls`, `traps`, `interrupts`, `paging`,
//! `memory` as the guest names it, the `start`. Everything runs on the vCPU's thread but
//! [`InterruptLines`] and [`Clock`].

use std::fmt;
use std::io::Write;
use std::sync::Arc;

use lguest_abi::long::call::GateKind;
use lguest_abi::long::shared_data::Greeting;
use lguest_abi::long::{Phys, Virt};
use softcpu::state::segment::SegReg;
use softcpu::{PhysMemory, Supervisor, Trap, Vcpu, Verdict};

use super::{Clock, EndSink, Ended, InterruptLines};
use crate::devices::virtio::long_bus::LongBus;
use crate::platform::pc::kvm::clock::Epoch;

mod calls;
mod death;
#[doc(hidden)]
pub mod fuzz;
mod interrupts;
mod memory;
mod paging;
mod start;
mod traps;

pub use calls::FEATURES;
pub use death::LongDeath;
pub use start::{cpuid_leaves, vcpu_state};

use memory::Ram;

/// Vectors there are.
const VECTORS: usize = 256;

/// What the platform is built from.
pub struct LongConfig {
    /// RAM, and the bus above it.
    pub memory: Arc<PhysMemory>,
    /// How much of it is RAM in the guest's eyes, bytes.
    pub ram: u64,
    /// How many bytes of bus follow.
    pub bus_len: u64,
    /// When the guest's clock was 0.
    pub epoch: Epoch,
    /// Where CONSOLE prints to.
    pub console: Box<dyn Write + Send>,
    /// The lines that interrupts come by.
    pub lines: Arc<InterruptLines>,
    /// The devices.
    pub bus: Arc<LongBus>,
    /// Who hears of the end.
    pub ended: EndSink,
}

impl fmt::Debug for LongConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LongConfig").field("ram", &self.ram).finish_non_exhaustive()
    }
}

/// A vector's handler.
#[derive(Clone, Copy, Debug)]
struct Gate {
    handler: Virt,
    kind: GateKind,
}

/// What is known of a guest once it has called LGUEST_INIT.
#[derive(Clone, Copy, Debug)]
struct Session {
    data: Phys,
    greeting: Greeting,
    /// Slots of the ring carried out, ever. The guest sees a copy.
    head: u32,
}

/// The platform, as the supervisor of its one vCPU.
pub struct LongGuest {
    ram: Ram,
    bus_len: u64,
    epoch: Epoch,
    gates: Box<[Option<Gate>; VECTORS]>,
    /// IRQs whose vectors have gates.
    gated: u64,
    /// SET_STACK's.
    stack: Virt,
    /// SET_SYSCALL's.
    syscall: Option<Virt>,
    session: Option<Session>,
    halted: bool,
    lines: Arc<InterruptLines>,
    clock: Arc<Clock>,
    console: Box<dyn Write + Send>,
    bus: Arc<LongBus>,
    ended: EndSink,
}

impl fmt::Debug for LongGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LongGuest")
            .field("session", &self.session)
            .field("halted", &self.halted)
            .finish_non_exhaustive()
    }
}

impl LongGuest {
    /// The platform for a guest that has not started.
    #[must_use]
    pub fn new(config: LongConfig) -> Self {
        let lines = config.lines;
        Self {
            ram: Ram::new(config.memory, config.ram),
            bus_len: config.bus_len,
            epoch: config.epoch,
            gates: Box::new([None; VECTORS]),
            gated: 0,
            stack: Virt(0),
            syscall: None,
            session: None,
            halted: false,
            clock: Arc::new(Clock::new(Arc::clone(&lines))),
            lines,
            console: config.console,
            bus: config.bus,
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
        cpu.hold_descriptors(&start::GDT);
        cpu.supervise(Box::new(self));
    }

    fn handle(&mut self, cpu: &mut Vcpu, trap: Trap) -> Result<Verdict, LongDeath> {
        let verdict = match trap {
            Trap::Exception(exception) => self.exception(cpu, exception)?,
            Trap::Software { vector, at, checked } => {
                self.software_interrupt(cpu, vector, at, checked)?
            }
            Trap::Syscall { at } => self.system_call(cpu, at)?,
            Trap::Hypercall { at } => self.invalid_opcode(cpu, at)?,
            Trap::Interrupt => Verdict::Resume,
        };
        if verdict == Verdict::Stop { Ok(verdict) } else { self.deliver_interrupts(cpu) }
    }

    fn describe(&self, cpu: &Vcpu, death: &LongDeath) -> String {
        let rip = cpu.state.rip;
        let ring = cpu.state.segment(SegReg::Ss).dpl();
        let when = if self.session.is_some() { "" } else { " before LGUEST_INIT" };
        format!("{death}, at rip {rip:#x} in ring {ring}{when}")
    }
}

impl Supervisor for LongGuest {
    fn trap(&mut self, cpu: &mut Vcpu, trap: Trap) -> Verdict {
        match self.handle(cpu, trap) {
            Ok(verdict) => verdict,
            Err(death) => {
                (self.ended)(Ended::Died(self.describe(cpu, &death)));
                Verdict::Stop
            }
        }
    }
}
