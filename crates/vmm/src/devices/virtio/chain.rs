//! One request: a descriptor chain, checked before a device looks at it.
//!
//! `virtio-queue` walks chains and bounds the walk; where the driver broke a rule it
//! merely stops early. A device must not take half a request for a whole one, so the
//! chain is walked once here: it must end by itself, have its readable parts before its
//! writable ones, and lie in RAM altogether (virtio 1.2, 2.7.5 and 2.7.4.2).

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Reader, Writer};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::memory::{CodeWatchSlice, GuestMemory};

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It loops, leaves its table, nests indirect tables, or is longer than 4 GiB.
    #[error("a descriptor chain has no end")]
    Endless,
    /// A readable descriptor stands behind a writable one.
    #[error("a descriptor chain has a readable part behind a writable one")]
    Order,
    /// Not all of it is RAM.
    #[error("a descriptor at {0:#x} does not point to RAM")]
    NotRam(u64),
}

/// A stretch of guest memory that a device reads a request from.
pub type ChainReader<'a> = Reader<'a, CodeWatchSlice<'a>>;
/// A stretch of guest memory that a device writes an answer to.
pub type ChainWriter<'a> = Writer<'a, CodeWatchSlice<'a>>;
/// A contiguous piece of guest memory on the host.
pub type ChainSlice<'a> = VolatileSlice<'a, CodeWatchSlice<'a>>;

/// A checked request. It can wait, and be answered from any thread.
#[derive(Clone, Debug)]
pub struct Chain {
    chain: DescriptorChain<Arc<GuestMemory>>,
    memory: Arc<GuestMemory>,
    readable: u64,
    writable: u64,
}

impl Chain {
    /// Checks `chain`.
    ///
    /// # Errors
    /// [`ChainError`]: the driver broke a rule.
    pub fn new(
        chain: DescriptorChain<Arc<GuestMemory>>,
        memory: Arc<GuestMemory>,
    ) -> Result<Self, ChainError> {
        let (mut readable, mut writable) = (0_u64, 0_u64);
        let mut ended = false;
        for descriptor in chain.clone() {
            check_memory(&memory, &descriptor)?;
            let len = u64::from(descriptor.len());
            if descriptor.is_write_only() {
                writable = writable.saturating_add(len);
            } else if writable != 0 {
                return Err(ChainError::Order);
            } else {
                readable = readable.saturating_add(len);
            }
            ended = !descriptor.has_next();
        }
        if !ended {
            return Err(ChainError::Endless);
        }
        Ok(Self { chain, memory, readable, writable })
    }

    /// The number by which the driver knows the request.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.chain.head_index()
    }

    /// How many bytes the device may read.
    #[must_use]
    pub const fn readable(&self) -> u64 {
        self.readable
    }

    /// How many bytes the device may write.
    #[must_use]
    pub const fn writable(&self) -> u64 {
        self.writable
    }

    /// The request's bytes, from the first on.
    ///
    /// # Errors
    /// The driver changed the chain since it was checked.
    pub fn reader(&self) -> Result<ChainReader<'_>, ChainError> {
        self.chain.clone().reader(&self.memory).map_err(|_| ChainError::Endless)
    }

    /// The answer's bytes, from the first on.
    ///
    /// # Errors
    /// The driver changed the chain since it was checked.
    pub fn writer(&self) -> Result<ChainWriter<'_>, ChainError> {
        self.chain.clone().writer(&self.memory).map_err(|_| ChainError::Endless)
    }

    /// The host memory behind `len` bytes of the readable (or, if `writable`, of the
    /// writable) part, from its byte number `skip` on, in pieces, for the host's vectored
    /// I/O. Whoever lets the host write there marks each slice's bitmap afterwards.
    ///
    /// # Errors
    /// [`ChainError`]: the part is not that long, or the driver changed it.
    pub fn slices(
        &self,
        writable: bool,
        skip: u64,
        len: u64,
    ) -> Result<Vec<ChainSlice<'_>>, ChainError> {
        let (mut skip, mut left) = (skip, len);
        let mut slices = Vec::new();
        for descriptor in self.chain.clone() {
            if descriptor.is_write_only() != writable {
                continue;
            }
            let here = u64::from(descriptor.len());
            let start = skip.min(here);
            skip = skip.saturating_sub(start);
            let take = here.saturating_sub(start).min(left);
            left = left.saturating_sub(take);
            let address = descriptor.addr();
            let not_ram = ChainError::NotRam(address.0);
            let from = address.0.checked_add(start).ok_or(not_ram)?;
            let count = usize::try_from(take).map_err(|_| not_ram)?;
            let pieces = GuestMemoryBackend::get_slices(
                self.memory.as_ref(),
                vm_memory::GuestAddress(from),
                count,
            );
            for slice in pieces {
                slices.push(slice.map_err(|_| not_ram)?);
            }
            if left == 0 {
                return Ok(slices);
            }
        }
        if left == 0 { Ok(slices) } else { Err(ChainError::Endless) }
    }
}

fn check_memory(memory: &GuestMemory, descriptor: &Descriptor) -> Result<(), ChainError> {
    let len = descriptor.len() as usize;
    if len == 0 || GuestMemoryBackend::check_range(memory, descriptor.addr(), len) {
        return Ok(());
    }
    Err(ChainError::NotRam(descriptor.addr().0))
}
