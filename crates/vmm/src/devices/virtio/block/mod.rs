//! Block device (virtio 1.2, 5.2): a disk whose image is a file or block device here.
//!
//! ```text
//!   queue 0 .. n      one handler each, on the I/O threads: takes requests,
//!      |              serves what needs no waiting
//!      |
//!   line of jobs      a few threads per disk that may wait: serve the rest
//!      |
//!   image             raw or qcow2, any number of requests at once
//!      |
//!   file              locked against other guests
//! ```
//!
//! **What is safe when.** A write is answered when the host's kernel has it (raw), or has
//! its data (qcow2, which keeps some metadata here until it is flushed). A flush is answered
//! when all that was answered before is on the host's disk; that survives the end of this
//! process and of the host. If the driver does not promise to flush, each write is flushed
//! before it is answered. A reset or the end of the machine finishes what is in flight,
//! and flushes.

#![allow(clippy::module_name_repetitions, reason = "the field's names")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use zerocopy::IntoBytes;

mod config;
mod config_space;
mod contents;
mod error;
mod error_log;
#[doc(hidden)]
pub mod fuzz;
mod host_file;
mod image;
mod lock;
mod pool;
mod qcow2_header;
mod request;
mod served_queue;
mod service;
#[cfg(test)]
mod tests;

pub use config::{DiskConfig, DiskConfigError, DiskFormat, MAX_SERIAL};
pub use contents::DiskContents;
pub use error::DiskError;

use super::io_threads::Attached;
use super::{ActivateError, Activation, DeviceKind, IoThreads, VirtioDevice, read_config_bytes};
use config_space::ConfigSpace;
use error_log::{ErrorLog, Operation};
use image::Image;
use pool::Pool;
use request::Limits;
use served_queue::{Handler, ServedQueue};
use service::Service;

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// The most queues: more than that many vCPUs share them.
const MAX_QUEUES: usize = 16;
/// Requests in flight at the host: enough to keep an SSD busy, few enough for many disks.
const WORKERS: std::ops::RangeInclusive<usize> = 4..=16;

/// A disk.
#[derive(Debug)]
pub struct Block {
    image: Arc<Image>,
    serial: Option<String>,
    log: Arc<ErrorLog>,
    io: Arc<IoThreads>,
    queue_sizes: Vec<u16>,
    /// What the driver wrote to `writeback`, if it did.
    writeback: Option<bool>,
    running: Option<Running>,
    /// Who waits for the host's I/O.
    pool: Pool,
}

/// What there is between activation and reset. Ends with [`Running::stop`].
#[derive(Debug)]
struct Running {
    handlers: Vec<Attached>,
    service: Arc<Service>,
}

impl Block {
    /// Opens and locks an image, for a disk of `queues` queues (16 at most) whose
    /// notifications are handled on `io`.
    ///
    /// # Errors
    /// [`DiskError`]: one line that says what to do.
    pub fn open(config: &DiskConfig, io: Arc<IoThreads>, queues: usize) -> Result<Self, DiskError> {
        let image = Image::open(config)?;
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = workers.clamp(*WORKERS.start(), *WORKERS.end());
        let pool = Pool::start(workers, &io).map_err(DiskError::Thread)?;
        Ok(Self::new(image, config.serial.clone(), io, pool, queues))
    }

    fn new(
        image: Image,
        serial: Option<String>,
        io: Arc<IoThreads>,
        pool: Pool,
        queues: usize,
    ) -> Self {
        Self {
            pool,
            log: Arc::new(ErrorLog::new(image.path().to_owned())),
            image: Arc::new(image),
            serial,
            io,
            queue_sizes: vec![QUEUE_SIZE; queues.clamp(1, MAX_QUEUES)],
            writeback: None,
            running: None,
        }
    }

    /// What is on the disk, for whoever boots from it.
    #[must_use]
    pub fn contents(&self) -> DiskContents {
        DiskContents(Arc::clone(&self.image))
    }

    /// Where the image is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.image.path()
    }

    /// The size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// How writes are answered once both sides agreed on `features`: as the driver chose,
    /// or else by whether it can flush (virtio 1.2, 5.2.5.2).
    fn starts_in_writeback(&self, features: u64) -> bool {
        let flushes = features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        let chooses = features & (1 << VIRTIO_BLK_F_CONFIG_WCE) != 0;
        self.writeback.filter(|_| chooses).unwrap_or(flushes)
    }

    fn service(&self, features: u64) -> Arc<Service> {
        let limits = Limits { size: self.image.size(), readonly: self.image.readonly(), features };
        Arc::new(Service {
            image: Arc::clone(&self.image),
            limits,
            serial: self.serial.clone(),
            log: Arc::clone(&self.log),
            writeback: AtomicBool::new(self.starts_in_writeback(features)),
        })
    }

    fn config_space(&self) -> ConfigSpace {
        let writeback = match &self.running {
            Some(running) => running.service.writeback.load(Ordering::Acquire),
            None => self.writeback.unwrap_or(true),
        };
        ConfigSpace::new(&self.image, self.queue_sizes.len(), writeback)
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
        ];
        if self.queue_sizes.len() > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.image.readonly() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |features, bit| features | (1 << bit))
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(self.config_space().as_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only `writeback` can be written, and only one byte is one write to it.
        let (true, &[value]) = (offset == ConfigSpace::WRITEBACK, data) else { return };
        let writeback = value != 0;
        match &self.running {
            None => self.writeback = Some(writeback),
            Some(Running { service, .. }) => {
                if service.limits.features & (1 << VIRTIO_BLK_F_CONFIG_WCE) != 0 {
                    // What was answered before is flushed with the next write.
                    service.writeback.store(writeback, Ordering::Release);
                }
            }
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        let first = activation.take_queue(0).ok_or(ActivateError::MissingQueue(0))?;
        let service = self.service(activation.features);
        let mut running = Running { handlers: Vec::new(), service };
        for queue in std::iter::once(first).chain(activation.queues) {
            let queue = ServedQueue::new(queue, Arc::clone(&activation.signal));
            let jobs = Arc::clone(self.pool.jobs());
            let handler = Handler::new(queue, jobs, Arc::clone(&running.service));
            match self.io.attach(Box::new(handler)) {
                Ok(attached) => running.handlers.push(attached),
                Err(error) => {
                    running.stop(&self.pool);
                    return Err(error.into());
                }
            }
        }
        self.running = Some(running);
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.writeback = None;
    }
}

impl Block {
    /// Finishes what is in flight, and flushes.
    fn stop(&mut self) {
        let Some(running) = self.running.take() else { return };
        running.stop(&self.pool);
        if let Err(error) = self.image.flush_if_dirty() {
            self.log.report(Operation::Flush, 0, &error);
        }
    }
}

impl Running {
    /// Takes the handlers away, so that nothing new begins, and waits for the rest.
    fn stop(self, pool: &Pool) {
        for handler in self.handlers {
            if let Err(error) = handler.detach() {
                tracing::debug!(%error, "a disk's handler is gone already");
            }
        }
        pool.finish();
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.stop();
    }
}
