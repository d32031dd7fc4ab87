//! A machine of the lguest platform, for a 32-bit guest, built from its configuration.

use std::sync::Arc;

use softcpu::addr::PAGE_SIZE;
use softcpu::cpuid::{CpuidTable, Topology};

use super::devices::{Devices, Wiring};
use super::lguest_parts::{ConsolePlace, Consoles, Surroundings, one_vcpu, refuse, with_console};
use super::{Built, MachineConfig, MachineError};
use crate::clock::Calibration;
use crate::devices::InterruptLine;
use crate::devices::pci::intx::IntxLines;
use crate::devices::virtio::lguest_bus::{self, LguestBus};
use crate::devices::virtio::{DeviceKind, console};
use crate::engine::supervised::SupervisedThread;
use crate::engine::translation::Translation;
use crate::loader::{
    BootSource, DeviceForm, KernelError, LGUEST_MAX_RAM, device_form, load_lguest,
};
use crate::memory::GuestRam;
use crate::platform::lguest::{
    GuestDevices, InterruptLines, LevelLines, Lguest, LguestConfig, LguestEnvironment, vcpu_state,
};

/// Lines that devices on PCI share: a kernel without an IO-APIC has 16 interrupts, and 0 is
/// the clock's.
const PCI_LINES: u8 = 15;

/// How devices on PCI interrupt: a line each while there are enough, and no messages.
fn pci_wiring(lines: &Arc<InterruptLines>) -> Wiring {
    let sink = Arc::new(LevelLines(Arc::clone(lines)));
    let line = |irq| (irq, InterruptLine::new(Arc::clone(&sink) as _, irq));
    // Slot 15 and the bridge have the first.
    Wiring {
        lines: IntxLines::new(line(PCI_LINES), (1..PCI_LINES).map(line)),
        messages: None,
        // The window's size: several of these kernels, 4.9 among them, look for their console
        // in the wrong place when they hear that it has changed, and oops.
        kept_back: |kind| if kind == DeviceKind::Console { console::SIZE } else { 0 },
    }
}

/// Builds the machine and loads the guest.
pub(super) fn build(config: MachineConfig) -> Result<Built, MachineError> {
    let calibration = Calibration::start();
    one_vcpu(&config)?;
    let mem = u32::try_from(config.memory)
        .ok()
        .filter(|mem| u64::from(*mem) <= LGUEST_MAX_RAM)
        .ok_or_else(|| refuse(&config, KernelError::LguestMemory(config.memory)))?;
    let form = device_form(&config.kernel)?;
    let place = match form {
        DeviceForm::Bus(_) => ConsolePlace::Last,
        DeviceForm::Pci => ConsolePlace::First,
    };
    let Consoles { cores, early, input } =
        with_console(config.devices, &config.io, config.serial_output, place)?;
    let pages = match form {
        DeviceForm::Bus(_) => u64::from(lguest_bus::pages(&cores)?),
        DeviceForm::Pci => 0,
    };
    let limit = config.memory.saturating_add(pages.saturating_mul(PAGE_SIZE));
    let ram = GuestRam::new(limit)?;
    let source = BootSource {
        kernel: &config.kernel,
        initrds: &config.initrds,
        command_line: &config.command_line,
        cpus: std::num::NonZeroU32::MIN,
    };
    let guest = load_lguest(&ram, mem, &source)?;
    let memory = Arc::new(ram.phys_memory()?);
    let frequency = calibration.finish();
    tracing::info!(tsc_khz = frequency.khz(), "machine is loaded");

    let around = Surroundings::new();
    let (guest_devices, devices) = match form {
        DeviceForm::Bus(form) => {
            let bus = LguestBus::new(cores, Arc::clone(ram.mmap()), mem, form, around.line())?;
            let bus = Arc::new(bus);
            (GuestDevices::Bus(Arc::clone(&bus)), Devices::on_lguest_bus(bus, config.io))
        }
        DeviceForm::Pci => {
            let wiring = pci_wiring(&around.lines);
            let (bus, devices) = Devices::on_pci(cores, config.io, &ram, &wiring)?;
            (GuestDevices::Pci(Arc::new(bus)), devices)
        }
    };
    let platform = Lguest::new(LguestConfig {
        memory: Arc::clone(&memory),
        ram: mem,
        // Below the hole, as RAM is and device pages are few.
        limit: u32::try_from(limit).unwrap_or(mem),
        initrd: guest.initrd,
        frequency,
        console: Box::new(early),
        lines: Arc::clone(&around.lines),
        devices: guest_devices.clone(),
        ended: Arc::clone(&around.ended),
    });
    let clock = platform.clock();
    let engine = config.engine.select()?.execution();
    let vcpu = SupervisedThread {
        engine,
        translation: Translation::new(engine, config.translation)?,
        state: vcpu_state(guest.entry),
        cpuid: CpuidTable::for_model(config.cpu_model, Topology { apic_id: 0, cpus: 1 })?,
        memory,
        environment: Box::new(LguestEnvironment::new(
            around.handle.clone(),
            Some(guest_devices),
            Arc::clone(&around.ended),
        )),
        install: Box::new(move |cpu| platform.install(cpu)),
        handle: around.handle.clone(),
        ending: Arc::clone(&around.ending),
        inspector: Arc::clone(&around.inspector),
        watchers: config.watchers,
    };
    Ok(around.build(devices, input, clock, vcpu))
}
