//! From the options to the devices on the guest's bus.
//!
//! Everything the user may have got wrong about them (a file that is not there, an image
//! in use) comes up here, before there is a machine.

use std::sync::Arc;

use vmm::devices::virtio::block::{Block, DiskContents, DiskError};
use vmm::devices::virtio::net::{Net, NetBackend, NetError};
use vmm::devices::virtio::{Console, Entropy, IoThreads, VirtioDevice};

use crate::Error;
use crate::cli::RunOptions;
use crate::sandbox::Needs;

/// The most queues a disk gets; more vCPUs share them.
const MAX_DISK_QUEUES: u32 = 4;

/// The most pairs of queues a network card gets.
const MAX_NET_PAIRS: u32 = 4;

/// Starts the threads that do devices' work.
///
/// # Errors
/// The host refuses one.
pub(crate) fn start_io(options: &RunOptions) -> Result<Arc<IoThreads>, Error> {
    IoThreads::start(options.io.threads)
        .map_err(|error| Error::Host(format!("the host refuses an I/O thread: {error}")))
}

/// The devices of a guest, opened.
pub(crate) struct Devices {
    /// In the order in which the guest finds them.
    pub(crate) all: Vec<Box<dyn VirtioDevice>>,
    /// What is on the first disk, and its name.
    pub(crate) first_disk: Option<(DiskContents, String)>,
    /// What they need of the host while the guest runs.
    pub(crate) needs: Needs,
}

/// Opens all devices.
///
/// # Errors
/// One of them cannot be had.
pub(crate) fn open(
    options: &RunOptions,
    console: Option<Console>,
    io: &Arc<IoThreads>,
) -> Result<Devices, Error> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    let mut first_disk = None;
    let mut needs = Needs { disk: !options.disk.is_empty(), ..Needs::default() };
    // Network cards first: their slots, and so their names, stay when disks come and go.
    for net in &options.net {
        let pairs = options.cpus.min(MAX_NET_PAIRS) as u16;
        let card = Net::open(net, Arc::clone(io), pairs).map_err(|error| match error {
            NetError::Host { .. } => Error::Host(error.to_string()),
            error => Error::Input(error.to_string()),
        })?;
        tracing::info!(net = %net, "a network card");
        needs.children.extend(card.child());
        needs.tap |= matches!(net.backend, NetBackend::Tap { .. });
        needs.unix |= matches!(net.backend, NetBackend::Unix { .. });
        devices.push(Box::new(card));
    }
    for disk in &options.disk {
        let queues = options.cpus.min(MAX_DISK_QUEUES) as usize;
        let block = Block::open(disk, Arc::clone(io), queues).map_err(|error| match error {
            DiskError::Thread(_) => Error::Host(error.to_string()),
            error => Error::Input(error.to_string()),
        })?;
        tracing::info!(disk = %disk, bytes = block.size(), "a disk");
        first_disk.get_or_insert_with(|| (block.contents(), disk.path.display().to_string()));
        devices.push(Box::new(block));
    }
    if let Some(console) = console {
        devices.push(Box::new(console));
    }
    // Always there: a guest that boots without entropy waits for it, or does worse.
    devices.push(Box::new(Entropy::new(Arc::clone(io))));
    Ok(Devices { all: devices, first_disk, needs })
}
