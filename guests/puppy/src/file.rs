//! A file on a disk. There is one: its length is in the first sector, its bytes follow.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use lguest_guest::irq::Masked;
use lguest_guest::virtio::{self, Disk, SECTOR};

/// What the first sector begins with; the length follows, in eight bytes.
const MAGIC: &[u8; 8] = b"puppyfil";
/// The longest file: what a shell is good for.
const LONGEST: u64 = 1 << 20;

static DISK: Masked<Option<Box<dyn Disk>>> = Masked::new(None);

/// Why there is no file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileError {
    NoDisk,
    ReadOnly,
    /// The disk has something on it, but no file of ours.
    Foreign,
    TooLong,
    Device(virtio::Error),
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDisk => f.write_str("there is no disk: start me with --disk FILE"),
            Self::ReadOnly => f.write_str("the disk cannot be written to"),
            Self::Foreign => f.write_str("the disk is somebody else's: give me one of zeroes"),
            Self::TooLong => f.write_str("that is too long for the disk"),
            Self::Device(error) => write!(f, "the disk fails: {error}"),
        }
    }
}

impl From<virtio::Error> for FileError {
    fn from(error: virtio::Error) -> Self {
        Self::Device(error)
    }
}

/// The first disk is where the file is.
pub(crate) fn start(disks: Vec<Box<dyn Disk>>) {
    DISK.with(|slot| *slot = disks.into_iter().next());
}

fn with<R>(work: impl FnOnce(&mut dyn Disk) -> Result<R, FileError>) -> Result<R, FileError> {
    DISK.with(|slot| work(slot.as_mut().ok_or(FileError::NoDisk)?.as_mut()))
}

/// The file's length. A disk of zeroes has an empty one.
fn len(disk: &mut dyn Disk) -> Result<u64, FileError> {
    let mut head = [0; SECTOR];
    disk.read(0, &mut head)?;
    if head.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let (magic, rest) = head.split_at(MAGIC.len());
    let len = rest.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let fits = len <= LONGEST && len.div_ceil(SECTOR as u64) < disk.sectors();
    if magic == MAGIC && fits { Ok(len) } else { Err(FileError::Foreign) }
}

/// All that is in the file.
pub(crate) fn read() -> Result<Vec<u8>, FileError> {
    with(|disk| {
        let len = len(disk)? as usize;
        let mut data = vec![0; len.next_multiple_of(SECTOR)];
        if !data.is_empty() {
            disk.read(1, &mut data)?;
        }
        data.truncate(len);
        Ok(data)
    })
}

/// Makes `data` all that is in the file. When it returns, the disk has it.
pub(crate) fn write(data: &[u8]) -> Result<(), FileError> {
    with(|disk| {
        if disk.is_read_only() {
            return Err(FileError::ReadOnly);
        }
        len(disk)?;
        let sectors = data.len().div_ceil(SECTOR) as u64;
        if data.len() as u64 > LONGEST || sectors >= disk.sectors() {
            return Err(FileError::TooLong);
        }
        let mut padded = data.to_vec();
        padded.resize(data.len().next_multiple_of(SECTOR), 0);
        if !padded.is_empty() {
            disk.write(1, &padded)?;
        }
        // The length last: until then the old one holds.
        disk.flush()?;
        let mut head = [0; SECTOR];
        head[..8].copy_from_slice(MAGIC);
        head[8..16].copy_from_slice(&(data.len() as u64).to_le_bytes());
        disk.write(0, &head)?;
        disk.flush()?;
        Ok(())
    })
}
