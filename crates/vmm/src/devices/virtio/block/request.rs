//! Requests as the driver writes them (virtio 1.2, 5.2.6), and what they mean.
//!
//! Nothing here touches the disk: a request comes out that lies on the disk and is allowed,
//! or the status to answer with.

use std::io::Read;

use lguest_abi::bus::tagged::BLOCK_HEADER_BYTES;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::image::SECTOR;
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::feature;

/// How many stretches one request may discard or zero.
pub(super) const MAX_SEGMENTS: u32 = 32;
/// How long such a stretch may be, in sectors: what a slow disk writes in seconds.
pub(super) const MAX_SEGMENT_SECTORS: u32 = 1 << 21;

/// How a request ended (virtio 1.2, 5.2.6): the byte the driver finds at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// `struct virtio_blk_req` up to the data.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) kind: U32,
    pub(super) reserved: U32,
    pub(super) sector: U64,
}

/// Its length in bytes.
const HEADER: u64 = size_of::<Header>() as u64;

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RawSegment {
    pub(super) sector: U64,
    pub(super) sectors: U32,
    pub(super) flags: U32,
}

/// A stretch of the disk to discard or zero, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) unmap: bool,
}

/// What the driver wants. Offsets and lengths are bytes, and lie on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read { offset: u64, len: u64 },
    Write { offset: u64, len: u64 },
    Flush,
    Identify { room: u64 },
    Discard(Vec<Segment>),
    WriteZeroes(Vec<Segment>),
}

/// What is allowed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The size of the disk in bytes.
    pub(super) size: u64,
    /// Nothing may be written.
    pub(super) readonly: bool,
    /// The features that both sides agreed on.
    pub(super) features: u64,
}

impl Limits {
    /// How long a request's header is, in bytes.
    pub(super) const fn header_len(&self) -> u64 {
        if self.features & feature::FIRST_HEADERS == 0 { HEADER } else { BLOCK_HEADER_BYTES as u64 }
    }

    fn agreed(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// The stretch of `len` bytes from `sector` on, if the disk has it.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        if len.is_multiple_of(SECTOR) && end <= self.size {
            Ok(offset)
        } else {
            Err(Status::IoError)
        }
    }
}

/// Understands a request; its last writable byte is the status's.
///
/// # Errors
/// The status to answer with.
pub(super) fn parse(chain: &Chain, limits: &Limits) -> Result<Request, Status> {
    let mut reader = chain.reader().map_err(|_| Status::IoError)?;
    let mut header = Header::default();
    reader.read_exact(header.as_mut_bytes()).map_err(|_| Status::IoError)?;
    let sector = header.sector.get();
    let data_in = chain.writable().checked_sub(1).ok_or(Status::IoError)?;
    let data_out = chain.readable().saturating_sub(limits.header_len());
    match header.kind.get() {
        VIRTIO_BLK_T_IN => {
            Ok(Request::Read { offset: limits.range(sector, data_in)?, len: data_in })
        }
        VIRTIO_BLK_T_OUT if limits.readonly => Err(Status::IoError),
        VIRTIO_BLK_T_OUT => {
            Ok(Request::Write { offset: limits.range(sector, data_out)?, len: data_out })
        }
        VIRTIO_BLK_T_FLUSH if limits.agreed(VIRTIO_BLK_F_FLUSH) => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Request::Identify { room: data_in }),
        VIRTIO_BLK_T_DISCARD if limits.agreed(VIRTIO_BLK_F_DISCARD) => {
            segments(&mut reader, data_out, limits, false).map(Request::Discard)
        }
        VIRTIO_BLK_T_WRITE_ZEROES if limits.agreed(VIRTIO_BLK_F_WRITE_ZEROES) => {
            segments(&mut reader, data_out, limits, true).map(Request::WriteZeroes)
        }
        _ => Err(Status::Unsupported),
    }
}

/// Reads what a discard or write-zeroes request is about, all of it before any is done.
fn segments(
    reader: &mut impl Read,
    len: u64,
    limits: &Limits,
    may_unmap: bool,
) -> Result<Vec<Segment>, Status> {
    let each = size_of::<RawSegment>() as u64;
    let count = len.checked_div(each).unwrap_or(0);
    if limits.readonly || count == 0 || count > u64::from(MAX_SEGMENTS) || !len.is_multiple_of(each)
    {
        return Err(Status::IoError);
    }
    (0..count)
        .map(|_| {
            let mut raw = RawSegment::default();
            reader.read_exact(raw.as_mut_bytes()).map_err(|_| Status::IoError)?;
            let flags = raw.flags.get();
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            // virtio 1.2, 5.2.6.2: unknown flags, and unmap where it has no meaning.
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (unmap && !may_unmap) {
                return Err(Status::Unsupported);
            }
            if raw.sectors.get() > MAX_SEGMENT_SECTORS {
                return Err(Status::IoError);
            }
            let len = u64::from(raw.sectors.get()).saturating_mul(SECTOR);
            Ok(Segment { offset: limits.range(raw.sector.get(), len)?, len, unmap })
        })
        .collect()
}
