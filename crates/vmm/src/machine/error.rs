//! Why there is no machine, or none any more.

use crate::devices::pci::bus::BusFull;
use crate::devices::virtio::lguest_bus::BusError;
use crate::engine::EngineError;
use crate::loader::LoadError;
use crate::memory::MemoryError;

/// What can go wrong with a machine, apart from what its guest does.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The engine cannot be had.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The host cannot execute the CPU model.
    #[error(transparent)]
    Cpu(#[from] softcpu::cpuid::CpuidError),
    /// A machine without vCPUs.
    #[error("a machine needs a CPU: give --cpus 1 or more")]
    NoCpus,
    /// The memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// More devices than the bus has room for.
    #[error(transparent)]
    Bus(#[from] BusFull),
    /// Devices that the lguest bus cannot carry.
    #[error(transparent)]
    LguestBus(#[from] BusError),
    /// The host refuses what a device needs.
    #[error("the host refuses a descriptor for a device: {0}")]
    Device(#[source] std::io::Error),
    /// The guest cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The host refuses a thread.
    #[error("the host refuses a thread for the machine: {0}")]
    Thread(#[source] std::io::Error),
    /// The host refuses the sandbox, and the guest is not to run without.
    #[error(transparent)]
    Sandbox(std::io::Error),
    /// The host refuses what the engine needs for a vCPU.
    #[error("the host refuses memory for generated code: {0}")]
    Vcpu(#[source] std::io::Error),
    /// `--verify-translations` has found one that must not be run: a bug of ours.
    #[error("vCPU {vcpu} stopped: {reason}; this is a bug in lguest, and the guest was not harmed")]
    Translation {
        /// Which vCPU's.
        vcpu: usize,
        /// What is wrong with it.
        reason: softcpu::translate::BadTranslation,
    },
    /// A vCPU's thread panicked: a bug of ours.
    #[error("the engine failed on vCPU {0}; this is a bug in lguest")]
    Crashed(usize),
}

impl MachineError {
    /// Whether the user can mend it (exit status 2), as against the host or ourselves.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        matches!(
            self,
            Self::Engine(_)
                | Self::Cpu(_)
                | Self::NoCpus
                | Self::Memory(_)
                | Self::Bus(_)
                | Self::LguestBus(BusError::Full)
                | Self::Load(_)
                | Self::Sandbox(_)
        )
    }
}
