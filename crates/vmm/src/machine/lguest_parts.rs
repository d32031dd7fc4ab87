//! What the machines for both kinds of lguest guests have: a console, one vCPU and what is
//! around it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use softcpu::VcpuHandle;

use super::devices::Devices;
use super::ending::{End, Ending};
use super::input::Input;
use super::inspect::Inspector;
use super::{Built, MachineConfig, MachineError};
use crate::devices::InterruptLine;
use crate::devices::virtio::{Console, DeviceKind, IoThreads, VirtioDevice};
use crate::engine::supervised::SupervisedThread;
use crate::loader::{KernelError, LoadError};
use crate::platform::lguest::{Clock, EndSink, InterruptLines};
use crate::sandbox::ThreadKind;

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

/// Neither ABI has a word for a second vCPU.
pub(super) fn one_vcpu(config: &MachineConfig) -> Result<(), MachineError> {
    match config.cpus {
        0 => Err(MachineError::NoCpus),
        1 => Ok(()),
        _ => Err(refuse(config, KernelError::LguestCpus)),
    }
}

/// The guest that `config` names cannot be run as it says, for this reason.
pub(super) fn refuse(config: &MachineConfig, reason: KernelError) -> MachineError {
    LoadError::Kernel { name: config.kernel.name().to_owned(), reason }.into()
}

/// What is around the one vCPU of such a guest.
pub(super) struct Surroundings {
    pub(super) handle: VcpuHandle,
    pub(super) ending: Arc<Ending>,
    pub(super) inspector: Arc<Inspector>,
    /// Where the platform says that the guest has ended.
    pub(super) ended: EndSink,
    pub(super) lines: Arc<InterruptLines>,
}

impl Surroundings {
    pub(super) fn new() -> Self {
        let handle = VcpuHandle::new();
        let ending = Ending::new(vec![handle.clone()]);
        let reports = Arc::clone(&ending);
        Self {
            inspector: Arc::new(Inspector::new(vec![handle.clone()])),
            ended: Arc::new(move |ended| reports.end(End::Lguest(ended))),
            lines: Arc::new(InterruptLines::new(handle.clone())),
            handle,
            ending,
        }
    }

    /// A line that latches.
    pub(super) fn line(&self) -> impl Fn(u8) -> InterruptLine + use<> {
        let sink = Arc::clone(&self.lines);
        move |irq| InterruptLine::new(Arc::clone(&sink) as _, irq)
    }

    /// The machine of it all: a thread for the vCPU, one for the clock.
    pub(super) fn build(
        self,
        devices: Devices,
        input: Input,
        clock: Arc<Clock>,
        vcpu: SupervisedThread,
    ) -> Built {
        let mut built = Built::new(devices, input, self.ending, self.inspector);
        let running = Arc::clone(&clock);
        built.helper("clock", move |place| {
            place.cross(ThreadKind::Timer);
            running.run();
        });
        built.at_end(move || clock.stop());
        built.translator(&vcpu.translation);
        built.helper("vcpu0", move |place| vcpu.run(place));
        built
    }
}
