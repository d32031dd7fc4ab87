//! Where the partitions of a disk are: GPT (UEFI specification 2.10, section 5.3), MBR with
//! logical partitions, or none at all.
//!
//! A table that contradicts itself is no table: there may still be a file system, and whoever
//! reads that will know.

use std::io;
use std::ops::Range;
use std::rc::Rc;

use gpt_disk_io::gpt_disk_types::{BlockSize, GptHeader, Lba};
use gpt_disk_io::{BlockIo, Disk, DiskError};

use super::error::DiskBootError;
use super::image_read::ImageRead;

/// What partition tables count in. Disks with larger sectors are rare, and none of ours is.
const SECTOR: u64 = 512;
/// The most partitions looked at; a GPT has room for 128.
const MOST: usize = 128;

/// A part of the disk that may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// Its bytes, within the disk.
    pub(super) bytes: Range<u64>,
    /// What Linux knows it by (PARTUUID); none for the whole disk.
    pub(super) uuid: Option<String>,
}

/// All partitions in the table's order, and at last the whole disk, which may be a file
/// system itself.
pub(super) fn partitions(
    image: &Rc<dyn ImageRead>,
    name: &str,
) -> Result<Vec<Partition>, DiskBootError> {
    let failed = |reason| DiskBootError::Read { name: name.to_owned(), reason };
    let size = image.size().map_err(failed)?;
    let mut found = gpt(image, size).map_err(failed)?;
    if found.is_empty() {
        found = mbr(image.as_ref(), size).map_err(failed)?;
    }
    found.push(Partition { bytes: 0..size, uuid: None });
    Ok(found)
}

/// The bytes of sectors `first` to `last`, if they are on the disk.
fn sectors(first: u64, last: u64, size: u64) -> Option<Range<u64>> {
    let start = first.checked_mul(SECTOR)?;
    let end = last.checked_add(1)?.checked_mul(SECTOR)?;
    (start < end && end <= size).then_some(start..end)
}

/// The disk as the crate that knows GPT wants it.
struct Blocks {
    image: Rc<dyn ImageRead>,
    size: u64,
}

impl BlockIo for Blocks {
    type Error = io::Error;

    fn block_size(&self) -> BlockSize {
        BlockSize::BS_512
    }

    fn num_blocks(&mut self) -> io::Result<u64> {
        Ok(self.size / SECTOR)
    }

    fn read_blocks(&mut self, start: Lba, buf: &mut [u8]) -> io::Result<()> {
        let offset = start.to_u64().checked_mul(SECTOR).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.image.read_at(offset, buf)
    }

    fn write_blocks(&mut self, _: Lba, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The partitions of the first GPT, or else of the second; none if neither is whole.
fn gpt(image: &Rc<dyn ImageRead>, size: u64) -> io::Result<Vec<Partition>> {
    let mut disk = match Disk::new(Blocks { image: Rc::clone(image), size }) {
        Ok(disk) => disk,
        Err(error) => return unless_short(error),
    };
    let mut block = [0; SECTOR as usize];
    for first in [true, false] {
        let header = if first {
            disk.read_primary_gpt_header(&mut block)
        } else {
            disk.read_secondary_gpt_header(&mut block)
        };
        let found = header.and_then(|header| gpt_entries(&mut disk, &header, size));
        match found {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(error) => {
                unless_short(error)?;
            }
        }
    }
    Ok(Vec::new())
}

/// A disk that is too short for a table has none; anything else is the host's failure.
fn unless_short(error: DiskError<io::Error>) -> io::Result<Vec<Partition>> {
    match error {
        DiskError::Io(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        _ => Ok(Vec::new()),
    }
}

fn gpt_entries(
    disk: &mut Disk<Blocks>,
    header: &GptHeader,
    size: u64,
) -> Result<Option<Vec<Partition>>, DiskError<io::Error>> {
    if !header.is_signature_valid() || header.calculate_header_crc32() != header.header_crc32 {
        return Ok(None);
    }
    let Ok(layout) = header.get_partition_entry_array_layout() else { return Ok(None) };
    let mut block = [0; SECTOR as usize];
    let mut found = Vec::new();
    for entry in disk.gpt_partition_entry_array_iter(layout, &mut block)?.take(MOST) {
        let entry = entry?;
        let range = entry.lba_range().filter(|_| entry.is_used());
        let bytes =
            range.and_then(|range| sectors(range.start().to_u64(), range.end().to_u64(), size));
        if let Some(bytes) = bytes {
            let uuid = { entry.unique_partition_guid }.to_string();
            found.push(Partition { bytes, uuid: Some(uuid) });
        }
    }
    Ok(Some(found))
}

/// Types of partitions that hold further ones, and the one that stands for a GPT.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
const PROTECTIVE: u8 = 0xee;

/// An entry of an MBR: what it is, where it begins, how long it is, in sectors.
struct Entry {
    kind: u8,
    start: u64,
    len: u64,
}

/// The four entries of an MBR, or of the sector a logical partition begins with; none
/// without the signature.
fn mbr_entries(sector: &[u8; SECTOR as usize]) -> Vec<Entry> {
    if sector.get(510..) != Some(&[0x55, 0xaa]) {
        return Vec::new();
    }
    let (entries, _) = sector.get(446..510).unwrap_or_default().as_chunks::<16>();
    let entry = |&[_, _, _, _, kind, _, _, _, a, b, c, d, e, f, g, h]: &[u8; 16]| Entry {
        kind,
        start: u32::from_le_bytes([a, b, c, d]).into(),
        len: u32::from_le_bytes([e, f, g, h]).into(),
    };
    entries.iter().map(entry).collect()
}

fn mbr(image: &dyn ImageRead, size: u64) -> io::Result<Vec<Partition>> {
    let mut sector = [0; SECTOR as usize];
    if size < SECTOR {
        return Ok(Vec::new());
    }
    image.read_at(0, &mut sector)?;
    let disk_id = match sector.get(440..444) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    };
    let mut found = Vec::new();
    let mut add = |number: u32, start: u64, len: u64| {
        let last = start.checked_add(len).and_then(|end| end.checked_sub(1));
        if let Some(bytes) = last.and_then(|last| sectors(start, last, size)) {
            let uuid = Some(format!("{disk_id:08x}-{number:02x}"));
            found.push(Partition { bytes, uuid });
        }
    };
    let mut extended = None;
    for (entry, number) in mbr_entries(&sector).iter().zip(1..) {
        match entry.kind {
            0 | PROTECTIVE => {}
            kind if EXTENDED.contains(&kind) => extended = extended.or(Some(entry.start)),
            _ => add(number, entry.start, entry.len),
        }
    }
    // Logical partitions: a chain of sectors, each with a partition relative to itself and
    // the next sector relative to the extended partition. It may lead in circles.
    let Some(base) = extended else { return Ok(found) };
    let mut at = base;
    for number in (5..).take(MOST) {
        if sectors(at, at, size).is_none() {
            break;
        }
        image.read_at(at.saturating_mul(SECTOR), &mut sector)?;
        let entries = mbr_entries(&sector);
        let is_link = |entry: &&Entry| EXTENDED.contains(&entry.kind);
        if let Some(entry) = entries.iter().find(|entry| entry.kind != 0 && !is_link(entry)) {
            add(number, at.saturating_add(entry.start), entry.len);
        }
        match entries.iter().find(is_link) {
            Some(link) => at = base.saturating_add(link.start),
            None => break,
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(image: Vec<u8>) -> Vec<(u64, u64, Option<String>)> {
        let image: Rc<dyn ImageRead> = Rc::new(image);
        let found = partitions(&image, "disk").unwrap();
        let sector = |bytes: &Range<u64>| (bytes.start / SECTOR, bytes.end / SECTOR);
        found.into_iter().map(|p| (sector(&p.bytes).0, sector(&p.bytes).1, p.uuid)).collect()
    }

    fn put_entry(image: &mut [u8], sector: usize, slot: usize, kind: u8, start: u32, len: u32) {
        let at = sector * 512 + 446 + slot * 16;
        image[at + 4] = kind;
        image[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        image[at + 12..at + 16].copy_from_slice(&len.to_le_bytes());
        image[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    #[test]
    fn a_disk_without_a_table_is_one_file_system() {
        for sectors in [0, 1, 2, 100] {
            let whole = (0, sectors as u64, None);
            assert_eq!(find(vec![0; sectors * 512]), [whole]);
        }
    }

    #[test]
    fn primary_and_logical_partitions_are_found() {
        let mut image = vec![0; 200 * 512];
        image[440..444].copy_from_slice(&0x1234_abcdu32.to_le_bytes());
        put_entry(&mut image, 0, 0, 0x83, 10, 20);
        put_entry(&mut image, 0, 1, 0x05, 50, 100);
        put_entry(&mut image, 0, 2, 0x83, 190, 11);
        put_entry(&mut image, 50, 0, 0x83, 1, 9);
        put_entry(&mut image, 50, 1, 0x05, 20, 30);
        put_entry(&mut image, 70, 0, 0x83, 2, 8);
        let named = |start, end, id: &str| (start, end, Some(id.to_owned()));
        assert_eq!(
            find(image),
            [
                named(10, 30, "1234abcd-01"),
                named(51, 60, "1234abcd-05"),
                named(72, 80, "1234abcd-06"),
                (0, 200, None)
            ]
        );
    }

    #[test]
    fn a_chain_that_leads_in_circles_ends() {
        let mut image = vec![0; 100 * 512];
        put_entry(&mut image, 0, 0, 0x05, 50, 50);
        put_entry(&mut image, 50, 0, 0x83, 1, 1);
        put_entry(&mut image, 50, 1, 0x05, 0, 50);
        assert_eq!(find(image).len(), MOST + 1);
    }
}
