//! The configuration space (`struct virtio_blk_config`; virtio 1.2, 5.2.4).

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::QUEUE_SIZE;
use super::image::{Image, SECTOR};
use super::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};

/// What the driver reads. Lengths are in sectors of 512 bytes unless they say otherwise.
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ConfigSpace {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    /// In bytes.
    blk_size: U32,
    /// Logarithm of the number of logical blocks in a physical one.
    physical_block_exp: u8,
    alignment_offset: u8,
    /// In logical blocks.
    min_io_size: U16,
    /// In logical blocks.
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

impl ConfigSpace {
    /// Where the one field is that a driver may write.
    pub(super) const WRITEBACK: u64 = offset_of!(Self, writeback) as u64;

    pub(super) fn new(image: &Image, queues: usize, writeback: bool) -> Self {
        let sectors = |bytes: u64| bytes.checked_div(SECTOR).unwrap_or(0);
        let granularity = image.granularity();
        let blocks = |bytes: u32| bytes.checked_div(granularity.block).unwrap_or(0);
        let discard = u32::try_from(sectors(granularity.discard.into())).unwrap_or(1);
        Self {
            capacity: sectors(image.size()).into(),
            // All of a queue but the header and the status.
            seg_max: u32::from(QUEUE_SIZE.saturating_sub(2)).into(),
            blk_size: granularity.block.into(),
            physical_block_exp: blocks(granularity.physical).max(1).ilog2() as u8,
            min_io_size: u16::try_from(blocks(granularity.physical)).unwrap_or(1).into(),
            opt_io_size: blocks(granularity.optimal).into(),
            writeback: writeback.into(),
            num_queues: u16::try_from(queues).unwrap_or(1).into(),
            max_discard_sectors: MAX_SEGMENT_SECTORS.into(),
            max_discard_seg: MAX_SEGMENTS.into(),
            discard_sector_alignment: discard.into(),
            max_write_zeroes_sectors: MAX_SEGMENT_SECTORS.into(),
            max_write_zeroes_seg: MAX_SEGMENTS.into(),
            write_zeroes_may_unmap: 1,
            ..Self::default()
        }
    }
}

const _: () = assert!(size_of::<ConfigSpace>() == 60);
const _: () = assert!(offset_of!(ConfigSpace, writeback) == 32);
const _: () = assert!(offset_of!(ConfigSpace, num_queues) == 34);
