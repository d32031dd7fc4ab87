//! Whether the tables of a qcow2 image can be what they should be.
//!
//! imago trusts that an image's reference counts cover the image's header: where they do
//! not, it would put new clusters over it, or look for a place without end. Damaged images
//! are refused here instead, before anything is written to them.

use std::io;

use imago::{Storage, StorageExt};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// What such an image begins with (QEMU, `docs/interop/qcow2.txt`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    snapshots: U32,
    snapshots_offset: U64,
}

/// The largest tables QEMU reads, in bytes.
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The bits of a table entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Checks the header of the image in `file`, and where its tables are.
///
/// # Errors
/// The file cannot be read, or the image is damaged or encrypted.
pub(super) fn check(file: &impl Storage) -> io::Result<()> {
    let mut header = Header::new_zeroed();
    file.read(header.as_mut_bytes(), 0)?;
    let bits = header.cluster_bits.get();
    if !(9..=21).contains(&bits) {
        return bad("its clusters have no size that clusters can have");
    }
    if header.crypt_method.get() != 0 {
        return bad("it is encrypted, which is not supported");
    }
    let cluster = 1_u64 << bits;
    let file_size = file.size()?;
    let inside = |offset: u64, len: u64| {
        offset >= cluster
            && offset.is_multiple_of(cluster)
            && offset.checked_add(len).is_some_and(|end| end <= file_size)
    };
    let l1 = u64::from(header.l1_size.get()).saturating_mul(8);
    if l1 > MAX_L1 || (l1 != 0 && !inside(header.l1_table_offset.get(), l1)) {
        return bad("its table of mappings is not in the file");
    }
    let table = header.refcount_table_offset.get();
    let table_len = u64::from(header.refcount_table_clusters.get()).saturating_mul(cluster);
    if table_len == 0 || table_len > MAX_REFCOUNT_TABLE || !inside(table, table_len) {
        return bad("its table of reference counts is not in the file");
    }
    // The first count is that of the header's own cluster, which is in use.
    let mut entry = U64::new(0);
    file.read(entry.as_mut_bytes(), table)?;
    let block = entry.get() & OFFSET;
    if !inside(block, cluster) {
        return bad("its first reference counts are not in the file");
    }
    let mut first = [0_u8; 8];
    file.read(first.as_mut_slice(), block)?;
    let count_bits = 1_u32.checked_shl(refcount_order(file, &header)?).unwrap_or(0);
    let in_use = match count_bits {
        1..=8 => first.first().is_some_and(|byte| u32::from(*byte) & low_bits(count_bits) != 0),
        _ => first.iter().take((count_bits / 8) as usize).any(|byte| *byte != 0),
    };
    if in_use { Ok(()) } else { bad("its header is not counted as in use") }
}

const fn low_bits(count: u32) -> u32 {
    match 1_u32.checked_shl(count) {
        Some(bit) => bit.saturating_sub(1),
        None => u32::MAX,
    }
}

/// Version 2 has counts of 16 bits, version 3 says.
fn refcount_order(file: &impl Storage, header: &Header) -> io::Result<u32> {
    /// Where `refcount_order` is.
    const AT: u64 = 96;
    if header.version.get() < 3 {
        return Ok(4);
    }
    let mut order = U32::new(0);
    file.read(order.as_mut_bytes(), AT)?;
    if order.get() > 6 { bad("its reference counts are too wide") } else { Ok(order.get()) }
}

fn bad<T>(what: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}
