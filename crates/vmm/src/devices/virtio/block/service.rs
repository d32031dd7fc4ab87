//! Serves one request: does what it asks for, and writes how it ended.
//!
//! Called by the workers, several at a time. Whatever goes wrong on the host is an I/O
//! error for the guest and a line in the log, and life goes on.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::config::MAX_SERIAL;
use super::error_log::{ErrorLog, Operation};
use super::image::Image;
use super::request::{Limits, Request, Segment, Status, parse};
use crate::devices::virtio::chain::{Chain, ChainError};

/// The largest request, in bytes, that may be served at once: a thread that has other
/// devices to serve copies it in passing.
const SMALL: u64 = 16 << 10;

/// What an activated disk serves requests with.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) image: Arc<Image>,
    pub(super) limits: Limits,
    pub(super) serial: Option<String>,
    pub(super) log: Arc<ErrorLog>,
    /// The driver flushes by itself. Otherwise each write is safe before it is answered
    /// (virtio 1.2, 5.2.6.2).
    pub(super) writeback: AtomicBool,
}

impl Service {
    /// Serves `chain` and writes its status. Returns how many bytes were written to it.
    ///
    /// # Errors
    /// There is no place for the status: the driver broke the rules.
    pub(super) fn serve(&self, chain: &Chain) -> Result<u32, ChainError> {
        let served = catch_unwind(AssertUnwindSafe(|| {
            parse(chain, &self.limits).and_then(|request| self.perform(chain, &request))
        }));
        let (status, data) = match served {
            Ok(Ok(data)) => (Status::Ok, data),
            Ok(Err(status)) => (status, 0),
            Err(_) => {
                let path = self.image.path().display();
                tracing::error!("{path}: a request panicked; this is a bug in lguest");
                (Status::IoError, 0)
            }
        };
        answer(chain, status, data)
    }

    /// Serves `chain` if that needs no waiting, which is so for small requests to what the
    /// host's page cache has. `None`: it is still to be served.
    ///
    /// Handing a request to another thread takes longer than copying a page.
    pub(super) fn serve_at_once(&self, chain: &Chain) -> Option<Result<u32, ChainError>> {
        let data = match parse(chain, &self.limits).ok()? {
            Request::Read { offset, len } if len <= SMALL => {
                let memory = chain.slices(true, 0, len).ok()?;
                self.image.read_at_once(&memory, offset).then_some(len)
            }
            Request::Write { offset, len }
                if len <= SMALL && self.writeback.load(Ordering::Acquire) =>
            {
                let memory = chain.slices(false, self.limits.header_len(), len).ok()?;
                self.image.write_at_once(&memory, offset).then_some(0)
            }
            _ => None,
        }?;
        Some(answer(chain, Status::Ok, data))
    }

    /// Returns how many bytes of data were written to the guest.
    fn perform(&self, chain: &Chain, request: &Request) -> Result<u64, Status> {
        match request {
            Request::Read { offset, len } => {
                let memory = chain.slices(true, 0, *len).map_err(|_| Status::IoError)?;
                let done = self.image.read(&memory, *offset);
                self.outcome(Operation::Read, *offset, done)?;
                return Ok(*len);
            }
            Request::Write { offset, len } => {
                let memory = chain
                    .slices(false, self.limits.header_len(), *len)
                    .map_err(|_| Status::IoError)?;
                let done = self.image.write(&memory, *offset);
                self.outcome(Operation::Write, *offset, done)?;
                self.write_through()?;
            }
            Request::Flush => self.outcome(Operation::Flush, 0, self.image.flush())?,
            Request::Identify { room } => return self.identify(chain, *room),
            Request::Discard(segments) => {
                for Segment { offset, len, .. } in segments {
                    let done = self.image.discard(*offset, *len);
                    self.outcome(Operation::Discard, *offset, done)?;
                }
                self.write_through()?;
            }
            Request::WriteZeroes(segments) => {
                for Segment { offset, len, unmap } in segments {
                    let done = self.image.write_zeroes(*offset, *len, *unmap);
                    self.outcome(Operation::WriteZeroes, *offset, done)?;
                }
                self.write_through()?;
            }
        }
        Ok(0)
    }

    fn identify(&self, chain: &Chain, room: u64) -> Result<u64, Status> {
        let mut name = [0_u8; MAX_SERIAL];
        let serial = self.serial.as_deref().unwrap_or_default().as_bytes();
        for (to, from) in name.iter_mut().zip(serial) {
            *to = *from;
        }
        let len = room.min(MAX_SERIAL as u64);
        let mut left: &[u8] = &name;
        for slice in chain.slices(true, 0, len).map_err(|_| Status::IoError)? {
            slice.copy_from(left);
            left = left.get(slice.len()..).unwrap_or_default();
        }
        Ok(len)
    }

    fn write_through(&self) -> Result<(), Status> {
        if self.writeback.load(Ordering::Acquire) {
            return Ok(());
        }
        self.outcome(Operation::Flush, 0, self.image.flush())
    }

    fn outcome(
        &self,
        operation: Operation,
        offset: u64,
        done: io::Result<()>,
    ) -> Result<(), Status> {
        done.map_err(|error| {
            self.log.report(operation, offset, &error);
            Status::IoError
        })
    }
}

/// Writes the status, after `data` bytes of data. Returns how many bytes were written.
fn answer(chain: &Chain, status: Status, data: u64) -> Result<u32, ChainError> {
    let status_at = chain.writable().checked_sub(1).ok_or(ChainError::Endless)?;
    for slice in chain.slices(true, status_at, 1)? {
        slice.copy_from(&[status as u8]);
    }
    // The status comes last. If data that belongs before it is missing, only what precedes
    // the gap may be counted (virtio 1.2, 2.7.8.2).
    let written = if data == status_at { data.saturating_add(1) } else { data };
    Ok(u32::try_from(written).unwrap_or(u32::MAX))
}
