//! A machine for a 64-bit guest of the lguest platform, built from its configuration.

use std::sync::Arc;

use lguest_abi::long::Phys;
use softcpu::cpuid::{CpuidTable, Topology};

use super::devices::Devices;
use super::lguest_parts::{ConsolePlace, Consoles, Surroundings, one_vcpu, with_console};
use super::{Built, MachineConfig, MachineError};
use crate::clock::Calibration;
use crate::devices::virtio::long_bus::{self, LongBus};
use crate::engine::supervised::SupervisedThread;
use crate::engine::translation::Translation;
use crate::loader::{BootSource, LongTold, load_long};
use crate::memory::GuestRam;
use crate::platform::lguest::LguestEnvironment;
use crate::platform::lguest::long::{FEATURES, LongConfig, LongGuest, cpuid_leaves, vcpu_state};
use crate::platform::pc::kvm::clock::Epoch;

/// Builds the machine and loads the guest.
pub(super) fn build(config: MachineConfig) -> Result<Built, MachineError> {
    let calibration = Calibration::start();
    one_vcpu(&config)?;
    let Consoles { cores, early, input } =
        with_console(config.devices, &config.io, config.serial_output, ConsolePlace::Last)?;
    let bus_len = long_bus::bytes(&cores)?;
    let ram = GuestRam::without_hole(config.memory.saturating_add(bus_len))?;
    let source = BootSource {
        kernel: &config.kernel,
        initrds: &config.initrds,
        command_line: &config.command_line,
        cpus: std::num::NonZeroU32::MIN,
    };
    let mut seed = [0; 32];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| MachineError::Device(error.into()))?;
    let frequency = calibration.finish();
    let told = LongTold {
        memory: config.memory,
        bus_len,
        features: FEATURES,
        tsc_khz: frequency.khz().into(),
        seed,
    };
    let guest = load_long(&ram, &source, told)?;
    let memory = Arc::new(ram.phys_memory()?);
    tracing::info!(tsc_khz = frequency.khz(), "machine is loaded");

    let around = Surroundings::new();
    let bus = LongBus::new(cores, Arc::clone(ram.mmap()), config.memory, around.line())?;
    let bus = Arc::new(bus);
    let epoch = Epoch::now(frequency);
    let platform = LongGuest::new(LongConfig {
        memory: Arc::clone(&memory),
        ram: config.memory,
        bus_len,
        epoch,
        console: Box::new(early),
        lines: Arc::clone(&around.lines),
        bus: Arc::clone(&bus),
        ended: Arc::clone(&around.ended),
    });
    let clock = platform.clock();
    let mut cpuid = CpuidTable::for_model(config.cpu_model, Topology { apic_id: 0, cpus: 1 })?;
    for (leaf, registers) in cpuid_leaves() {
        cpuid.insert(leaf, None, registers);
    }
    let mut state = vcpu_state(guest.entry, Phys(guest.tables), guest.start_info, &cpuid);
    // The guest's TSC starts at zero, like its clock.
    state.msr.tsc_offset = epoch.tsc.wrapping_neg();
    let engine = config.engine.select()?.execution();
    let vcpu = SupervisedThread {
        engine,
        translation: Translation::new(engine, config.translation)?,
        state,
        cpuid,
        memory,
        environment: Box::new(LguestEnvironment::new(
            around.handle.clone(),
            None,
            Arc::clone(&around.ended),
        )),
        install: Box::new(move |cpu| platform.install(cpu)),
        handle: around.handle.clone(),
        ending: Arc::clone(&around.ending),
        inspector: Arc::clone(&around.inspector),
        watchers: config.watchers,
    };
    Ok(around.build(Devices::on_long_bus(bus, config.io), input, clock, vcpu))
}
