//! A PC, built from its configuration.

use std::num::NonZeroU32;
use std::sync::Arc;

use softcpu::cpuid::{CpuModel, CpuidError, CpuidTable, Topology};
use softcpu::{VcpuHandle, VcpuState};

use super::devices::{Devices, Wiring};
use super::ending::Ending;
use super::input::Input;
use super::inspect::Inspector;
use super::{Built, MachineConfig, MachineError};
use crate::clock::{Calibration, TscFrequency};
use crate::devices::apic::controller::InterruptController;
use crate::devices::apic::io::IoApic;
use crate::devices::apic::local::{LocalApic, LocalApicConfig};
use crate::engine::soft::VcpuThread;
use crate::engine::translation::Translation;
use crate::loader::{self, BootSource, set_firmware_msrs};
use crate::memory::GuestRam;
use crate::platform::pc::kvm::clock::Epoch;
use crate::platform::pc::kvm::cpuid;
use crate::platform::pc::timers::Timers;
use crate::platform::pc::{Pc, PcConfig};
use crate::sandbox::ThreadKind;

/// What is shared between building steps.
struct Parts {
    handles: Vec<VcpuHandle>,
    timers: Arc<Timers>,
    controller: Arc<InterruptController>,
    tables: Vec<CpuidTable>,
}

/// Builds the machine and loads the guest.
pub(super) fn build(config: MachineConfig) -> Result<Built, MachineError> {
    let engine = config.engine.select()?.execution();
    let translation = Translation::new(engine, config.translation)?;
    let calibration = Calibration::start();
    let cpus = NonZeroU32::new(config.cpus).ok_or(MachineError::NoCpus)?;
    let ram = GuestRam::shared(config.memory)?;
    let entry = load(&config, &ram, cpus)?;
    let memory = Arc::new(ram.phys_memory()?);

    let frequency = calibration.finish();
    tracing::info!(cpus, tsc_khz = frequency.khz(), "machine is loaded");
    let parts = Parts::new(config.cpu_model, cpus, frequency)?;
    let ending = Ending::new(parts.handles.clone());
    let inspector = Arc::new(Inspector::new(parts.handles.clone()));
    let epoch = Epoch::now(frequency);
    let (pci, devices) =
        Devices::on_pci(config.devices, config.io, &ram, &Wiring::pc(&parts.controller))?;
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
    let input = Input::Serial(pc.serial_input());
    let mut built = Built::new(devices, input, ending, inspector);
    let timers = Arc::clone(&parts.timers);
    let controller = Arc::clone(&parts.controller);
    built.helper("timers", move |place| {
        place.cross(ThreadKind::Timer);
        timers.run(&controller);
    });
    let timers = Arc::clone(&parts.timers);
    built.at_end(move || timers.stop());
    built.translator(&translation);
    built.memory(&memory);
    let seeds = states.into_iter().zip(parts.handles).zip(parts.tables).enumerate();
    for (index, ((mut state, handle), cpuid)) in seeds {
        // The guest's TSC starts at zero, like its other clocks.
        state.msr.tsc_offset = epoch.tsc.wrapping_neg();
        let vcpu = VcpuThread {
            index,
            engine,
            translation: translation.clone(),
            state,
            cpuid,
            memory: Arc::clone(&memory),
            pc: Arc::clone(&pc),
            timers: Arc::clone(&parts.timers),
            frequency,
            handle,
            ending: Arc::clone(&built.ending),
            inspector: Arc::clone(&built.inspector),
            watchers: config.watchers.clone(),
        };
        built.helper(&format!("vcpu{index}"), move |place| vcpu.run(place));
    }
    Ok(built)
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
