//! Virtio console: one port, which Linux calls hvc0 (virtio 1.2, 5.3).
//!
//! Three parties meet here. The guest has two queues and the configuration space; the
//! launcher has a [`ConsoleInput`] for what is typed and a [`ConsoleHandle`] for the
//! window's size; and a writer gets what the guest prints (`output`). The queues are
//! served by a `worker` on an I/O thread.
//!
//! Several ports (MULTIPORT) are not offered: one console is what is wanted, and drivers
//! are not of one mind about the order of columns and rows in its control messages.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::io_threads::Attached;
use super::{ActivateError, Activation, DeviceKind, IoThreads, VirtioDevice, read_config_bytes};

mod input;
mod output;
#[cfg(test)]
mod tests;
mod worker;

pub use input::ConsoleInput;
use output::Output;
pub(super) use worker::Worker;

/// Feature: columns and rows are in the configuration (`VIRTIO_CONSOLE_F_SIZE`).
pub const SIZE: u64 = 1 << 0;
/// Feature: bytes may be written to the configuration (`VIRTIO_CONSOLE_F_EMERG_WRITE`).
pub const EMERG_WRITE: u64 = 1 << 2;

/// Queues (virtio 1.2, 5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// The most requests in each.
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// How long output that nobody takes holds up the machine's end.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Where `emerg_wr` lies in the configuration (virtio 1.2, 5.3.4).
const EMERGENCY: u64 = 8;

/// What the device, its worker and the launcher share.
#[derive(Clone, Debug)]
pub(super) struct Port {
    input: ConsoleInput,
    output: Output,
    /// Columns in the lower half, rows in the upper: they change together.
    size: Arc<AtomicU32>,
    /// Something is new for the worker: input, room for output, or the size.
    wake: Arc<EventFd>,
    /// Something has changed in the configuration.
    resized: Arc<EventFd>,
}

impl Port {
    pub(super) fn new() -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self {
            input: ConsoleInput::new(Arc::clone(&wake)),
            output: Output::new(Arc::clone(&wake)),
            size: Arc::default(),
            resized: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            wake,
        })
    }

    /// The configuration space (virtio 1.2, 5.3.4).
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.size.load(Ordering::Relaxed).to_le_bytes();
        // One port; and what was written in an emergency is not read.
        let (ports, emergency) = (1_u32.to_le_bytes(), [0_u8; 4]);
        read_config_bytes(&[size, ports, emergency].concat(), offset, data);
    }

    /// A byte of output from a driver that has no queues. If the buffer is full it is
    /// lost: this runs on a vCPU, which cannot wait for a slow terminal.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        if offset == EMERGENCY
            && let Some(byte) = data.first()
            && self.output.room() > 0
        {
            self.output.append(&[*byte]);
        }
    }

    /// Takes what would be written out, in the place of the thread that writes.
    pub(super) fn take_output(&self) -> usize {
        if self.output.room() == output::BUFFER {
            return 0;
        }
        self.output.take().map_or(0, |bytes| bytes.len())
    }

    pub(super) fn handle(&self) -> ConsoleHandle {
        ConsoleHandle { port: self.clone() }
    }
}

/// What the launcher may do to the console, beside typing. Clones are the same.
#[derive(Clone, Debug)]
pub struct ConsoleHandle {
    port: Port,
}

impl ConsoleHandle {
    /// The window has `cols` columns and `rows` rows now.
    pub fn resize(&self, cols: u16, rows: u16) {
        let size = u32::from(rows) << 16 | u32::from(cols);
        if self.port.size.swap(size, Ordering::Relaxed) != size {
            // The worker tells the driver, if there is one. Full counters wake as well.
            let _ = self.port.resized.write(1);
            let _ = self.port.wake.write(1);
        }
    }

    /// Where input goes in.
    #[must_use]
    pub fn input(&self) -> ConsoleInput {
        self.port.input.clone()
    }

    /// Waits until what the guest has printed is written out, for `limit` at most.
    pub fn drain(&self, limit: Duration) {
        self.port.output.drain(limit);
    }
}

/// The device.
pub struct Console {
    io: Arc<IoThreads>,
    port: Port,
    running: Option<Attached>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("running", &self.running).finish_non_exhaustive()
    }
}

impl Console {
    /// A console that is served by one of `io` and prints to `output`, which may be slow.
    ///
    /// # Errors
    /// The host refuses a thread or a descriptor.
    pub fn new(io: Arc<IoThreads>, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let port = Port::new()?;
        port.output.write_to(output)?;
        Ok(Self { io, port, running: None })
    }

    /// The launcher's side.
    #[must_use]
    pub fn handle(&self) -> ConsoleHandle {
        self.port.handle()
    }

    /// Where input goes in.
    #[must_use]
    pub fn input(&self) -> ConsoleInput {
        self.port.input.clone()
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        SIZE | EMERG_WRITE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.port.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.port.write_config(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        let worker = Worker::new(self.port.clone(), activation)?;
        self.running = Some(self.io.attach(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(running) = self.running.take()
            && let Err(error) = running.detach()
        {
            tracing::debug!(%error, "the console's thread was gone before it");
        }
    }

    /// The last words wait for a slow terminal, but not for one that has stopped.
    fn shut_down(&mut self) {
        self.reset();
        self.port.output.drain(LAST_WORDS);
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reset();
        self.port.input.close();
        self.port.output.close();
    }
}
