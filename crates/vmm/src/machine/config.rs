//! What a machine is made from.

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use softcpu::cpuid::CpuModel;

use crate::devices::virtio::{IoThreads, VirtioDevice};
use crate::engine::EngineChoice;
use crate::engine::watch::Watchers;
use crate::loader::Image;
use crate::sandbox::Sandbox;

/// What the guest is to believe it runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlatformChoice {
    /// What its kernel is for.
    #[default]
    Auto,
    /// A PC.
    Pc,
    /// The lguest platform.
    Lguest,
}

/// Everything the user decides about a machine.
pub struct MachineConfig {
    /// Guest RAM, bytes.
    pub memory: u64,
    /// How many vCPUs.
    pub cpus: u32,
    /// Which CPU they claim to be.
    pub cpu_model: CpuModel,
    /// Which engine is wanted.
    pub engine: EngineChoice,
    /// What the guest is to run on.
    pub platform: PlatformChoice,
    /// The kernel.
    pub kernel: Image,
    /// The initrds, in order.
    pub initrds: Vec<Image>,
    /// The kernel command line, whole.
    pub command_line: String,
    /// Where the serial port's output goes. Written to from vCPU threads, byte by byte:
    /// whoever is slow should buffer.
    pub serial_output: Box<dyn Write + Send>,
    /// The devices on its bus, in this order.
    pub devices: Vec<Box<dyn VirtioDevice>>,
    /// The threads that do their work. The machine stops them when it ends.
    pub io: Arc<IoThreads>,
    /// Whether the guest may end the machine by the debug-exit port.
    pub debug_exit: bool,
    /// After how long the machine is stopped.
    pub timeout: Option<Duration>,
    /// What confines the process before the guest's first instruction.
    pub sandbox: Option<Arc<dyn Sandbox>>,
    /// How code is translated.
    pub translation: softcpu::translate::Config,
    /// Who watches the vCPUs.
    pub watchers: Watchers,
}

impl fmt::Debug for MachineConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineConfig")
            .field("memory", &self.memory)
            .field("cpus", &self.cpus)
            .field("engine", &self.engine)
            .field("platform", &self.platform)
            .field("kernel", &self.kernel.name())
            .field("initrds", &self.initrds.len())
            .field("command_line", &self.command_line)
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}
