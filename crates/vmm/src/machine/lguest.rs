//! A machine of the lguest platform, built from its configuration.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use softcpu::VcpuHandle;
use softcpu::addr::PAGE_SIZE;
use softcpu::cpuid::{CpuidTable, Topology};

use super::devices::{Devices, Wiring};
use super::ending::{End, Ending};
use super::input::Input;
use super::inspect::Inspector;
use super::{Built, MachineConfig, MachineError};
use crate::clock::Calibration;
use crate::devices::InterruptLine;
use crate::devices::pci::intx::IntxLines;
use crate::devices::virtio::lguest_bus::{self, LguestBus};
use crate::devices::virtio::{Console, DeviceKind, IoThreads, VirtioDevice, console};
use crate::engine::supervised::SupervisedThread;
use crate::loader::{
    BootSource, DeviceForm, KernelError, LGUEST_MAX_RAM, LoadError, device_form, load_lguest,
};
use crate::memory::GuestRam;
use crate::platform::lguest::{
    EndSink, GuestDevices, InterruptLines, LevelLines, Lguest, LguestConfig, LguestEnvironment,
    vcpu_state,
};

/// What of the guest's goes to one console: early strings, and the virtio console's output.
#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

/// A guest's devices, a console among them.
pub(super) struct Consoles {
    /// All devices.
    pub(super) cores: Vec<Box<dyn VirtioDevice>>,
    /// Where early strings go.
    pub(super) early: Shared,
    /// Where input comes in.
    pub(super) input: Input,
}

/// Lines that devices on PCI share: a kernel without an IO-APIC has 16 interrupts, and 0 is
/// the clock's.
const PCI_LINES: u8 = 15;

/// Where a console is put among the devices.
#[derive(Clone, Copy, Debug)]
pub(super) enum ConsolePlace {
    /// On PCI, where a kernel's early console looks for it.
    First,
    /// On a bus, where the Launchers of those days had it.
    Last,
}

/// These guests have no other console than a virtio one: if there is none among the
/// devices, one is made that takes the serial port's place.
pub(super) fn with_console(
    mut cores: Vec<Box<dyn VirtioDevice>>,
    io: &Arc<IoThreads>,
    output: Box<dyn Write + Send>,
    place: ConsolePlace,
) -> Result<Consoles, MachineError> {
    let output = Shared(Arc::new(Mutex::new(output)));
    if cores.iter().any(|core| core.kind() == DeviceKind::Console) {
        return Ok(Consoles { cores, early: output, input: Input::None });
    }
    let console =
        Console::new(Arc::clone(io), Box::new(output.clone())).map_err(MachineError::Device)?;
    let input = Input::Console(console.input());
    match place {
        ConsolePlace::First => cores.insert(0, Box::new(console)),
        ConsolePlace::Last => cores.push(Box::new(console)),
    }
    Ok(Consoles { cores, early: output, input })
}

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
    let refuse = |reason| LoadError::Kernel { name: config.kernel.name().to_owned(), reason };
    let calibration = Calibration::start();
    match config.cpus {
        0 => return Err(MachineError::NoCpus),
        1 => {}
        _ => return Err(refuse(KernelError::LguestCpus).into()),
    }
    let mem = u32::try_from(config.memory)
        .ok()
        .filter(|mem| u64::from(*mem) <= LGUEST_MAX_RAM)
        .ok_or_else(|| refuse(KernelError::LguestMemory(config.memory)))?;
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

    let handle = VcpuHandle::new();
    let ending = Ending::new(vec![handle.clone()]);
    let inspector = Arc::new(Inspector::new(vec![handle.clone()]));
    let reports = Arc::clone(&ending);
    let ended: EndSink = Arc::new(move |ended| reports.end(End::Lguest(ended)));
    let lines = Arc::new(InterruptLines::new(handle.clone()));
    let (guest_devices, devices) = match form {
        DeviceForm::Bus(form) => {
            let sink = Arc::clone(&lines);
            let line = move |irq| InterruptLine::new(Arc::clone(&sink) as _, irq);
            let bus = LguestBus::new(cores, Arc::clone(ram.mmap()), mem, form, line)?;
            let bus = Arc::new(bus);
            (GuestDevices::Bus(Arc::clone(&bus)), Devices::on_lguest_bus(bus, config.io))
        }
        DeviceForm::Pci => {
            let wiring = pci_wiring(&lines);
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
        lines,
        devices: guest_devices.clone(),
        ended: Arc::clone(&ended),
    });
    let clock = platform.clock();
    let vcpu = SupervisedThread {
        engine: config.engine.select()?.execution(),
        state: vcpu_state(guest.entry),
        cpuid: CpuidTable::for_model(config.cpu_model, Topology { apic_id: 0, cpus: 1 })?,
        memory,
        environment: Box::new(LguestEnvironment::new(handle.clone(), Some(guest_devices), ended)),
        install: Box::new(move |cpu| platform.install(cpu)),
        handle,
        ending: Arc::clone(&ending),
        inspector: Arc::clone(&inspector),
        trace: config.trace,
    };
    let mut built = Built::new(devices, input, ending, inspector);
    let running = Arc::clone(&clock);
    built.helper("clock", move || running.run());
    built.at_end(move || clock.stop());
    built.helper("vcpu0", move || vcpu.run());
    Ok(built)
}
