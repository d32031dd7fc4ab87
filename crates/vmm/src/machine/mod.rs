//! The Machine: RAM, platform, devices and vCPUs, from configuration to outcome.
//!
//! [`Machine::new`] builds and loads everything, so that whatever the user got wrong is
//! known before a thread starts; [`Machine::run`] runs it to its end. A [`Controller`]
//! reaches into it from other threads meanwhile. What it is built as is decided by the
//! platform: `pc`, or one of the two of `lguest`. Called by the Launcher and by tests.

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use softcpu::PhysMemory;

use crate::engine::translation::{self, Translation};
use crate::engine::{Engine, EngineError};
use crate::loader::{KernelError, LoadError, PlatformKind, platform_of};
use crate::sandbox::{Sandbox, ThreadKind};

mod config;
mod controller;
mod devices;
pub(crate) mod ending;
mod error;
mod input;
pub(crate) mod inspect;
mod lguest;
mod lguest_long;
mod lguest_parts;
mod pc;
pub(crate) mod start_line;

pub use config::{MachineConfig, PlatformChoice};
pub use controller::Controller;
pub use ending::Outcome;
pub use error::MachineError;

use devices::Devices;
use ending::Ending;
use input::Input;
use inspect::Inspector;
use start_line::{Place, Starter};

/// How long vCPU threads may take to notice that the machine has ended. One that is
/// stuck in the host (its console is not read) is left behind.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// A machine, loaded and ready to run.
pub struct Machine {
    engine: Engine,
    platform: PlatformKind,
    timeout: Option<Duration>,
    sandbox: Option<Arc<dyn Sandbox>>,
    built: Built,
}

type Body = Box<dyn FnOnce(Place) + Send>;
type AtEnd = Box<dyn Fn() + Send>;

/// What a platform is built as: threads, and what ends with them.
struct Built {
    bodies: Vec<(String, Body)>,
    at_end: Vec<AtEnd>,
    devices: Devices,
    input: Input,
    ending: Arc<Ending>,
    inspector: Arc<Inspector>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("engine", &self.engine)
            .field("platform", &self.platform)
            .field("built", &self.built)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Built {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads: Vec<_> = self.bodies.iter().map(|(name, _)| name).collect();
        f.debug_struct("Built").field("threads", &threads).finish_non_exhaustive()
    }
}

impl Built {
    fn new(devices: Devices, input: Input, ending: Arc<Ending>, inspector: Arc<Inspector>) -> Self {
        Self { bodies: Vec::new(), at_end: Vec::new(), devices, input, ending, inspector }
    }

    /// A thread of the machine, which crosses the start line when it is ready. They are
    /// started in this order.
    fn helper(&mut self, name: &str, body: impl FnOnce(Place) + Send + 'static) {
        self.bodies.push((name.to_owned(), Box::new(body)));
    }

    /// The thread that translates beside the vCPUs, if there is to be one.
    fn translator(&mut self, translation: &Translation) {
        if let Some(workshop) = translation.workshop() {
            let closing = Arc::clone(&workshop);
            self.helper("translator", move |place| translation::work(&workshop, place));
            self.at_end(move || closing.close());
        }
    }

    /// The thread that prepares `memory` ahead of the vCPUs, if the host has a processor for it.
    fn memory(&mut self, memory: &Arc<PhysMemory>) {
        let Some(shared) = memory.shared().filter(|_| translation::can_spare()) else { return };
        let (memory, shared) = (Arc::clone(memory), Arc::clone(shared));
        self.helper("memory", move |place| {
            place.cross(ThreadKind::Memory);
            memory.work_ahead();
        });
        self.at_end(move || shared.close_ahead());
    }

    /// What makes a thread end that does not look whether the machine has.
    fn at_end(&mut self, stop: impl Fn() + Send + 'static) {
        self.at_end.push(Box::new(stop));
    }
}

/// What `kernel` is run on if the user leaves it open.
fn choose(config: &MachineConfig) -> Result<PlatformKind, MachineError> {
    let found = || platform_of(&config.kernel);
    Ok(match config.platform {
        PlatformChoice::Auto => found()?,
        PlatformChoice::Pc => PlatformKind::Pc,
        PlatformChoice::Lguest => {
            let found = found()?;
            if found != PlatformKind::Pc {
                return Ok(found);
            }
            let (name, reason) = (config.kernel.name().to_owned(), KernelError::NotLguest);
            return Err(LoadError::Kernel { name, reason }.into());
        }
    })
}

/// Lockstep is for a PC with one vCPU.
fn check_lockstep(platform: PlatformKind, cpus: u32) -> Result<(), EngineError> {
    if platform != PlatformKind::Pc {
        return Err(EngineError::LockstepPlatform);
    }
    if cpus != 1 {
        return Err(EngineError::LockstepCpus);
    }
    Ok(())
}

impl Machine {
    /// Builds the machine and loads the guest.
    ///
    /// # Errors
    /// [`MachineError`]: what the configuration asks for cannot be had.
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        let engine = config.engine.select()?;
        let platform = choose(&config)?;
        if engine == Engine::Lockstep {
            check_lockstep(platform, config.cpus)?;
        }
        tracing::info!(%platform, %engine, "building the machine");
        let (timeout, sandbox) = (config.timeout, config.sandbox.clone());
        let built = match platform {
            PlatformKind::Pc => pc::build(config)?,
            PlatformKind::Lguest => lguest::build(config)?,
            PlatformKind::LguestLong => lguest_long::build(config)?,
        };
        Ok(Self { engine, platform, timeout, sandbox, built })
    }

    /// The engine that runs the vCPUs.
    #[must_use]
    pub const fn engine(&self) -> Engine {
        self.engine
    }

    /// What the guest runs on.
    #[must_use]
    pub const fn platform(&self) -> PlatformKind {
        self.platform
    }

    /// The machine as other threads may reach it.
    #[must_use]
    pub fn controller(&self) -> Controller {
        Controller {
            ending: Arc::clone(&self.built.ending),
            inspector: Arc::clone(&self.built.inspector),
            input: self.built.input.clone(),
        }
    }

    /// Runs the machine until it ends.
    ///
    /// # Errors
    /// The host refuses a thread, the sandbox or memory for the engine, or the engine itself
    /// failed.
    pub fn run(self) -> Result<Outcome, MachineError> {
        let deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let Built { bodies, at_end, devices, input, ending, .. } = self.built;
        let mut threads = Threads { running: Vec::new(), at_end, input, devices };
        let mut starter = Starter::new(self.sandbox);
        let started = bodies
            .into_iter()
            .zip(std::iter::from_fn(|| starter.place()))
            .try_for_each(|((name, body), place)| threads.spawn(name, move || body(place)))
            .map_err(MachineError::Thread)
            .and_then(|()| {
                let devices = |sandbox| threads.devices.confine(sandbox);
                starter.start(devices).map_err(MachineError::Sandbox)
            });
        if let Err(error) = started {
            ending.stop();
            return Err(error);
        }
        ending.wait(deadline)
    }
}

/// The machine's threads. Dropped when it has ended: waits for them, but not for ever.
struct Threads {
    running: Vec<JoinHandle<()>>,
    at_end: Vec<AtEnd>,
    input: Input,
    devices: Devices,
}

impl Threads {
    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        self.running.push(std::thread::Builder::new().name(name).spawn(body)?);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.at_end.iter().for_each(|stop| stop());
        self.input.close();
        let now = Instant::now();
        let patience = now.checked_add(STOP_PATIENCE).unwrap_or(now);
        while Instant::now() < patience && !self.running.iter().all(JoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(1));
        }
        for thread in self.running.drain(..) {
            if thread.is_finished() {
                // A thread that panicked has said so by `End::Crashed`.
                let _ = thread.join();
            } else {
                tracing::warn!(thread = thread.thread().name(), "does not stop and is left behind");
            }
        }
        // No vCPU asks for anything any more: what is in flight is all there is.
        self.devices.shut_down();
    }
}
