//! The soft engine for a guest with a supervisor: one vCPU, whose thread sleeps while the
//! guest waits, and whose events are the platform's business.

use std::fmt;
use std::sync::Arc;

use softcpu::cpuid::CpuidTable;
use softcpu::{Environment, Event, Exit, PhysMemory, Vcpu, VcpuConfig, VcpuHandle, VcpuState};

use super::dump;
use super::soft::CrashGuard;
use super::translation::Translation;
use super::watch::Watchers;
use crate::machine::ending::{End, Ending};
use crate::machine::inspect::Inspector;
use crate::machine::start_line::Place;
use crate::platform::pc::timers::set_timer_slack;
use crate::sandbox::ThreadKind;

/// Its number: it is the only one.
const VCPU: usize = 0;

/// Makes the platform the vCPU's supervisor.
pub(crate) type Install = Box<dyn FnOnce(&mut Vcpu) + Send>;

/// Everything the vCPU's thread needs.
pub(crate) struct SupervisedThread {
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
    /// What is beside RAM.
    pub(crate) environment: Box<dyn Environment>,
    /// The platform.
    pub(crate) install: Install,
    /// Its attention.
    pub(crate) handle: VcpuHandle,
    /// Where it says that the machine has ended.
    pub(crate) ending: Arc<Ending>,
    /// Who may ask what it is doing.
    pub(crate) inspector: Arc<Inspector>,
    /// Who watches it.
    pub(crate) watchers: Watchers,
}

impl fmt::Debug for SupervisedThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SupervisedThread").field("handle", &self.handle).finish_non_exhaustive()
    }
}

impl SupervisedThread {
    /// The thread's body: until the machine ends.
    pub(crate) fn run(self, place: Place) {
        let _guard = CrashGuard::new(Arc::clone(&self.ending), VCPU);
        set_timer_slack();
        let vcpu = Vcpu::new(VcpuConfig {
            engine: self.engine,
            translation: self.translation.config,
            stubs: Arc::clone(&self.translation.stubs),
            code: self.translation.code.clone(),
            memory: self.memory,
            cpuid: self.cpuid,
            env: self.environment,
            handle: self.handle.clone(),
        });
        let mut vcpu = match vcpu {
            Ok(vcpu) => vcpu,
            Err(reason) => return self.ending.end(End::Failed(reason)),
        };
        vcpu.state = self.state;
        vcpu.state_changed();
        (self.install)(&mut vcpu);
        self.translation.attach(&mut vcpu);
        self.watchers.attach(&mut vcpu, VCPU);
        place.cross(ThreadKind::Vcpu);
        let answer = |vcpu: &mut Vcpu| {
            vcpu.publish_stats();
            self.inspector.answer(VCPU, || dump::registers(vcpu));
        };
        while !self.ending.has_ended() {
            match vcpu.run() {
                Exit::Halt => loop {
                    let wanted = Event::INTERRUPT | Event::STOP | Event::ATTENTION;
                    let events = self.handle.sleep(wanted, None);
                    if events.intersects(Event::INTERRUPT | Event::STOP) {
                        break;
                    }
                    self.handle.take(Event::ATTENTION);
                    answer(&mut vcpu);
                },
                Exit::Attention => answer(&mut vcpu),
                // Whoever stopped it has said why; no guest with a supervisor runs in lockstep.
                Exit::Stopped | Exit::Diverged => {}
                Exit::Failed => self.ending.failed(VCPU, &vcpu),
                Exit::Shutdown => {
                    self.ending.end(End::TripleFault { vcpu: VCPU, rip: vcpu.state.rip });
                }
            }
        }
        answer(&mut vcpu);
    }
}
