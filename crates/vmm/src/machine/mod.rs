//! The Machine: RAM, platform, devices and vCPUs, from configuration to outcome.
//!
//! [`Machine::new`] builds and loads everything, so that whatever the user got wrong is
//! known before a thread starts; [`Machine::run`] runs it to its end. A [`Controller`]
//! reaches into it from other threads meanwhile. Called by the Launcher and by tests.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use softcpu::cpuid::{CpuModel, CpuidError, CpuidTable, Topology};
use softcpu::{VcpuHandle, VcpuState};

use crate::clock::{Calibration, TscFrequency};
use crate::devices::apic::controller::InterruptController;
use crate::devices::apic::io::IoApic;
use crate::devices::apic::local::{LocalApic, LocalApicConfig};
use crate::devices::serial::SerialInput;
use crate::engine::Engine;
use crate::engine::soft::VcpuThread;
use crate::loader::{self, BootSource, set_firmware_msrs};
use crate::memory::GuestRam;
use crate::platform::pc::kvm::clock::Epoch;
use crate::platform::pc::kvm::cpuid;
use crate::platform::pc::timers::Timers;
use crate::platform::pc::{Pc, PcConfig};

mod config;
mod controller;
mod devices;
pub(crate) mod ending;
mod error;
pub(crate) mod inspect;

pub use config::MachineConfig;
pub use controller::Controller;
pub use ending::Outcome;
pub use error::MachineError;

use devices::Devices;
use ending::Ending;
use inspect::Inspector;

/// How long vCPU threads may take to notice that the machine has ended. One that is
/// stuck in the host (its console is not read) is left behind.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// A machine, loaded and ready to run.
#[derive(Debug)]
pub struct Machine {
    engine: Engine,
    timeout: Option<Duration>,
    vcpus: Vec<VcpuThread>,
    pc: Arc<Pc>,
    controller: Arc<InterruptController>,
    timers: Arc<Timers>,
    devices: Devices,
    ending: Arc<Ending>,
    inspector: Arc<Inspector>,
}

/// What is shared between building steps.
struct Parts {
    handles: Vec<VcpuHandle>,
    timers: Arc<Timers>,
    controller: Arc<InterruptController>,
    tables: Vec<CpuidTable>,
}

impl Machine {
    /// Builds the machine and loads the guest.
    ///
    /// # Errors
    /// [`MachineError`]: what the configuration asks for cannot be had.
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        let engine = config.engine.select()?;
        let calibration = Calibration::start();
        let cpus = NonZeroU32::new(config.cpus).ok_or(MachineError::NoCpus)?;
        let ram = GuestRam::new(config.memory)?;
        let entry = load(&config, &ram, cpus)?;
        let memory = Arc::new(ram.phys_memory()?);

        let frequency = calibration.finish();
        tracing::info!(%engine, cpus, tsc_khz = frequency.khz(), "machine is loaded");
        let parts = Parts::new(config.cpu_model, cpus, frequency)?;
        let ending = Ending::new(parts.handles.clone());
        let inspector = Arc::new(Inspector::new(parts.handles.clone()));
        let epoch = Epoch::now(frequency);
        let (pci, devices) = Devices::on_bus(config.devices, config.io, &ram, &parts.controller)?;
        let requests = Arc::clone(&ending);
        let pc = Pc::new(PcConfig {
            controller: Arc::clone(&parts.controller),
            memory: Arc::clone(&memory),
            epoch,
            pci,
            serial_output: config.serial_output,
            debug_exit: config.debug_exit,
            requests: Box::new(move |request| requests.request(request)),
        });

        let mut states = vec![entry.vcpu_state()];
        states.resize_with(parts.handles.len(), || {
            let mut state = VcpuState::at_reset();
            set_firmware_msrs(&mut state);
            state
        });
        let seeds = states.into_iter().zip(parts.handles).zip(parts.tables).enumerate();
        let vcpus = seeds.map(|(index, ((mut state, handle), cpuid))| {
            // The guest's TSC starts at zero, like its other clocks.
            state.msr.tsc_offset = epoch.tsc.wrapping_neg();
            VcpuThread {
                index,
                state,
                cpuid,
                memory: Arc::clone(&memory),
                pc: Arc::clone(&pc),
                timers: Arc::clone(&parts.timers),
                frequency,
                handle,
                ending: Arc::clone(&ending),
                inspector: Arc::clone(&inspector),
                trace: config.trace.clone(),
            }
        });
        Ok(Self {
            engine,
            timeout: config.timeout,
            vcpus: vcpus.collect(),
            pc,
            controller: parts.controller,
            timers: parts.timers,
            devices,
            ending,
            inspector,
        })
    }

    /// The engine that runs the vCPUs.
    #[must_use]
    pub const fn engine(&self) -> Engine {
        self.engine
    }

    /// The machine as other threads may reach it.
    #[must_use]
    pub fn controller(&self) -> Controller {
        Controller {
            ending: Arc::clone(&self.ending),
            inspector: Arc::clone(&self.inspector),
            serial: self.pc.serial_input(),
        }
    }

    /// Runs the machine until it ends.
    ///
    /// # Errors
    /// The host refuses a thread or memory for the engine, or the engine itself failed.
    pub fn run(self) -> Result<Outcome, MachineError> {
        let serial = self.pc.serial_input();
        let deadline = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let devices = self.devices;
        let mut threads =
            Threads { running: Vec::new(), timers: Arc::clone(&self.timers), serial, devices };
        let (timers, controller) = (self.timers, self.controller);
        let started =
            threads.spawn("timers".into(), move || timers.run(&controller)).and_then(|()| {
                let mut vcpus = self.vcpus.into_iter();
                vcpus.try_for_each(|vcpu| {
                    threads.spawn(format!("vcpu{}", vcpu.index), move || vcpu.run())
                })
            });
        if let Err(reason) = started {
            self.ending.stop();
            return Err(MachineError::Thread(reason));
        }
        self.ending.wait(deadline)
    }
}

/// Puts the kernel and its initrds into RAM.
fn load(
    config: &MachineConfig,
    ram: &GuestRam,
    cpus: NonZeroU32,
) -> Result<loader::EntryPoint, MachineError> {
    let MachineConfig { kernel, initrds, command_line, .. } = config;
    let source = BootSource { kernel, initrds, command_line, cpus };
    Ok(loader::load(ram, &source)?.entry)
}

impl Parts {
    fn new(model: CpuModel, cpus: NonZeroU32, frequency: TscFrequency) -> Result<Self, CpuidError> {
        let count = cpus.get() as usize;
        let handles: Vec<VcpuHandle> =
            std::iter::repeat_with(VcpuHandle::new).take(count).collect();
        let timers = Arc::new(Timers::new(count, frequency));
        let tables = (0..cpus.get())
            .map(|id| cpuid_table(model, id, cpus, frequency))
            .collect::<Result<Vec<_>, _>>()?;
        let local = |((id, handle), table): ((u32, &VcpuHandle), &CpuidTable)| {
            LocalApic::new(LocalApicConfig {
                id,
                vcpu: id as usize,
                phys_bits: physical_address_bits(table),
                frequency,
                handle: handle.clone(),
                deadlines: timers.clone(),
            })
        };
        let locals = (0..).zip(&handles).zip(&tables).map(local).collect();
        let controller = InterruptController::new(locals, IoApic::default());
        Ok(Self { handles, timers, controller, tables })
    }
}

/// The CPU model's table, with what the platform adds.
fn cpuid_table(
    model: CpuModel,
    apic_id: u32,
    cpus: NonZeroU32,
    frequency: TscFrequency,
) -> Result<CpuidTable, CpuidError> {
    let mut table = CpuidTable::for_model(model, Topology { apic_id, cpus: cpus.get() })?;
    for (leaf, registers) in cpuid::leaves(frequency) {
        table.insert(leaf, None, registers);
    }
    Ok(table)
}

/// The width of a guest-physical address: leaf 0x80000008, EAX bits 7..0.
fn physical_address_bits(table: &CpuidTable) -> u8 {
    let [eax, ..] = table.get(0x8000_0008, 0);
    eax as u8
}

/// The machine's threads. Dropped when it has ended: waits for them, but not for ever.
struct Threads {
    running: Vec<JoinHandle<()>>,
    timers: Arc<Timers>,
    serial: SerialInput,
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
        self.timers.stop();
        self.serial.close();
        let patience = Instant::now() + STOP_PATIENCE;
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
