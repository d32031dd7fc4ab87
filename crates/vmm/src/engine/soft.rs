//! The soft engine: a host thread per vCPU that runs [`Vcpu::run`] over and over.
//!
//! The thread is where a vCPU waits: halted until an event or its own timer's deadline,
//! or parked until a startup message. INIT, startup, kicks and requests for a dump
//! arrive as [`Event::ATTENTION`].

use std::sync::Arc;
use std::time::Instant;

use softcpu::cpuid::CpuidTable;
use softcpu::state::rflags::RFlags;
use softcpu::{Event, Exit, PhysMemory, Vcpu, VcpuConfig, VcpuHandle, VcpuState};

use super::dump;
use super::translation::Translation;
use super::watch::Watchers;
use crate::clock::{TscFrequency, host_tsc};
use crate::devices::Request;
use crate::devices::apic::local::LocalApic;
use crate::machine::ending::{End, Ending};
use crate::machine::inspect::Inspector;
use crate::machine::start_line::Place;
use crate::platform::pc::Pc;
use crate::platform::pc::kvm::steal::StealTime;
use crate::platform::pc::timers::{Timers, set_timer_slack};
use crate::platform::pc::vcpu::PcVcpu;
use crate::sandbox::ThreadKind;

/// The vCPU that starts by itself.
const BOOT_VCPU: usize = 0;

/// Everything a vCPU's thread needs.
#[derive(Debug)]
pub(crate) struct VcpuThread {
    /// Its number.
    pub(crate) index: usize,
    /// What runs its code.
    pub(crate) engine: softcpu::Engine,
    /// How that is translated.
    pub(crate) translation: Translation,
    /// Its registers at the start.
    pub(crate) state: VcpuState,
    /// What CPUID answers.
    pub(crate) cpuid: CpuidTable,
    /// RAM.
    pub(crate) memory: Arc<PhysMemory>,
    /// The platform.
    pub(crate) pc: Arc<Pc>,
    /// Who waits for timers while it runs.
    pub(crate) timers: Arc<Timers>,
    /// How fast the TSC counts.
    pub(crate) frequency: TscFrequency,
    /// Its attention.
    pub(crate) handle: VcpuHandle,
    /// Where it says that the machine has ended.
    pub(crate) ending: Arc<Ending>,
    /// Who may ask what it is doing.
    pub(crate) inspector: Arc<Inspector>,
    /// Who watches it.
    pub(crate) watchers: Watchers,
}

/// What a vCPU does with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// After INIT: waits for a startup message.
    WaitForStartup,
    /// Runs guest code.
    Running,
}

/// A vCPU on its thread.
struct Runner {
    vcpu: Box<Vcpu>,
    phase: Phase,
    thread: Links,
    steal: Arc<StealTime>,
}

/// What stays of [`VcpuThread`] once the vCPU is made.
struct Links {
    index: usize,
    memory: Arc<PhysMemory>,
    pc: Arc<Pc>,
    timers: Arc<Timers>,
    frequency: TscFrequency,
    handle: VcpuHandle,
    ending: Arc<Ending>,
    inspector: Arc<Inspector>,
}

/// Says that the engine has failed if the thread unwinds: a bug of ours must end the
/// machine, not leave it running with a vCPU missing.
pub(super) struct CrashGuard(Arc<Ending>, usize);

impl CrashGuard {
    /// For the thread of vCPU number `vcpu`.
    pub(super) const fn new(ending: Arc<Ending>, vcpu: usize) -> Self {
        Self(ending, vcpu)
    }
}

impl Drop for CrashGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(End::Crashed { vcpu: self.1 });
        }
    }
}

impl VcpuThread {
    /// The thread's body: until the machine ends.
    pub(crate) fn run(self, place: Place) {
        let _guard = CrashGuard::new(Arc::clone(&self.ending), self.index);
        set_timer_slack();
        let ending = Arc::clone(&self.ending);
        match self.start() {
            Ok(mut runner) => {
                place.cross(ThreadKind::Vcpu);
                runner.run();
            }
            Err(reason) => ending.end(End::Failed(reason)),
        }
    }

    fn start(self) -> std::io::Result<Runner> {
        let steal = Arc::new(StealTime::default());
        let offset = self.state.msr.tsc_offset;
        let env = PcVcpu::new(Arc::clone(&self.pc), self.index, offset, Arc::clone(&steal));
        let mut vcpu = Vcpu::new(VcpuConfig {
            engine: self.engine,
            translation: self.translation.config,
            stubs: Arc::clone(&self.translation.stubs),
            code: self.translation.code.clone(),
            memory: Arc::clone(&self.memory),
            cpuid: self.cpuid,
            env: Box::new(env),
            handle: self.handle.clone(),
        })?;
        vcpu.state = self.state;
        vcpu.state_changed();
        self.translation.attach(&mut vcpu);
        self.watchers.attach(&mut vcpu, self.index);
        let phase = if self.index == BOOT_VCPU { Phase::Running } else { Phase::WaitForStartup };
        let thread = Links {
            index: self.index,
            memory: self.memory,
            pc: self.pc,
            timers: self.timers,
            frequency: self.frequency,
            handle: self.handle,
            ending: self.ending,
            inspector: self.inspector,
        };
        Ok(Runner { vcpu, phase, thread, steal })
    }
}

impl Runner {
    fn run(&mut self) {
        while !self.thread.ending.has_ended() {
            match self.phase {
                Phase::WaitForStartup => {
                    let events = self.thread.handle.sleep(Event::ATTENTION | Event::STOP, None);
                    self.thread.handle.take(events & Event::ATTENTION);
                    let _ = self.attend();
                }
                Phase::Running => match self.vcpu.run() {
                    Exit::Halt => self.halt(),
                    Exit::Attention => {
                        let _ = self.attend();
                    }
                    Exit::Stopped => {}
                    Exit::Failed => self.thread.ending.failed(self.thread.index, &self.vcpu),
                    Exit::Diverged => {
                        let report = self.vcpu.divergence().unwrap_or_default().to_owned();
                        self.thread.ending.end(End::Diverged(report));
                    }
                    Exit::Shutdown => {
                        let (vcpu, rip) = (self.thread.index, self.vcpu.state.rip);
                        tracing::debug!(
                            vcpu,
                            registers = dump::registers(&self.vcpu),
                            "triple fault"
                        );
                        self.thread.ending.end(End::TripleFault { vcpu, rip });
                    }
                },
            }
        }
        self.vcpu.publish_stats();
        if let Some(counters) = self.vcpu.lockstep_counters() {
            tracing::info!(?counters, "lockstep");
            if counters.unsettled != 0 {
                tracing::warn!(
                    stretches = counters.unsettled,
                    "lockstep: some differed, and took too long to repeat: the translator is wrong \
                     somewhere"
                );
            }
        }
        self.thread.inspector.answer(self.thread.index, || self.describe());
    }

    fn local(&self) -> Option<&LocalApic> {
        self.thread.pc.controller().local(self.thread.index)
    }

    /// INIT, startup, and questions. Says whether the vCPU was reset, which also ends a
    /// halt: INIT and startup may well have been seen together.
    fn attend(&mut self) -> bool {
        self.vcpu.publish_stats();
        self.thread.inspector.answer(self.thread.index, || self.describe());
        let Some(local) = self.local() else { return false };
        let startup = local.take_startup();
        if startup.init {
            if self.thread.index == BOOT_VCPU {
                // It would start at the reset vector, where there is no firmware: that
                // is a reset of the machine by another name.
                self.thread.ending.request(Request::Reset);
                return true;
            }
            local.reset();
            self.vcpu.init();
            self.phase = Phase::WaitForStartup;
        }
        if let Some(vector) = startup.vector
            && self.phase == Phase::WaitForStartup
        {
            tracing::debug!(vcpu = self.thread.index, vector, "starts");
            self.vcpu.startup(vector);
            self.phase = Phase::Running;
        }
        startup.init
    }

    /// `hlt`: sleeps until something happens that ends it.
    fn halt(&mut self) {
        // The guest's TLB flushes need not wake us; what they ask for is done below.
        self.steal.set_preempted(&self.thread.memory);
        self.sleep();
        self.thread.timers.give_back(self.thread.index);
        if self.steal.clear_preempted(&self.thread.memory) {
            self.thread.handle.raise(Event::FLUSH_TLB);
        }
    }

    fn sleep(&mut self) {
        let mut wanted = Event::NMI | Event::STOP | Event::ATTENTION;
        if self.vcpu.state.rflags.contains(RFlags::IF) {
            wanted |= Event::INTERRUPT;
        }
        while !self.thread.ending.has_ended() {
            let Some(local) = self.local() else { return };
            if local.take_kick() {
                return;
            }
            let until = self
                .thread
                .timers
                .take_over(self.thread.index)
                .map(|deadline| self.instant(deadline));
            let events = self.thread.handle.sleep(wanted, until);
            if events.intersects(Event::NMI | Event::STOP) {
                return;
            } else if events.contains(Event::ATTENTION) {
                self.thread.handle.take(Event::ATTENTION);
                if self.attend() {
                    return;
                }
            } else if events.contains(Event::INTERRUPT) {
                // Taken first, looked at second: what comes in between raises it anew.
                self.thread.handle.take(Event::INTERRUPT);
                if local.is_deliverable() {
                    self.thread.handle.raise(Event::INTERRUPT);
                    return;
                }
            } else {
                local.timer_expired(host_tsc());
            }
        }
    }

    /// When the host's TSC will show `deadline`.
    fn instant(&self, deadline: u64) -> Instant {
        let left = self.thread.frequency.duration(deadline.saturating_sub(host_tsc()));
        let now = Instant::now();
        // A deadline in another century: any late moment will do, the sleep is repeated.
        let late = std::time::Duration::from_secs(3600);
        now.checked_add(left).or_else(|| now.checked_add(late)).unwrap_or(now)
    }

    fn describe(&self) -> String {
        let phase = match self.phase {
            Phase::WaitForStartup => "waits for startup",
            Phase::Running => "running or halted",
        };
        let apic = self.local().map(ToString::to_string).unwrap_or_default();
        format!("vcpu {} {phase}\n{}{apic}\n", self.thread.index, dump::registers(&self.vcpu))
    }
}
