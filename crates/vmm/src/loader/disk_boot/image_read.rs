//! Disk contents by offset, whatever format the image has, and parts of them.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

/// The contents of a disk, as its guest sees them.
pub trait ImageRead {
    /// Fills `buf` from the bytes at `offset`.
    ///
    /// # Errors
    /// The host cannot read it, or it ends before `buf` is full.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// How large the disk is, in bytes.
    ///
    /// # Errors
    /// The host does not say.
    fn size(&self) -> io::Result<u64>;
}

/// A raw image, or a block device.
impl ImageRead for File {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        // The metadata of a block device has no length. Nothing here reads at the cursor.
        let mut file = self;
        file.seek(SeekFrom::End(0))
    }
}

impl ImageRead for Vec<u8> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..));
        let there = rest.and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// The most that is read of one file system, in bytes and in reads. A kernel and its initrds
/// take a few hundred megabytes; a file system made to lead its reader in circles ends here.
const MOST_BYTES: u64 = 2 << 30;
const MOST_READS: u64 = 2 << 20;

/// A part of a disk that is read only so and so often.
pub(super) struct Part {
    image: Rc<dyn ImageRead>,
    range: Range<u64>,
    bytes_left: Cell<u64>,
    reads_left: Cell<u64>,
}

impl Part {
    pub(super) fn new(image: &Rc<dyn ImageRead>, range: Range<u64>) -> Self {
        Self {
            image: Rc::clone(image),
            range,
            bytes_left: Cell::new(MOST_BYTES),
            reads_left: Cell::new(MOST_READS),
        }
    }

    /// Fills `buf` from the part's bytes at `offset`.
    pub(super) fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len() as u64;
        let start = self.range.start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(len));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        if end > self.range.end {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it goes on behind the end of its partition",
            ));
        }
        let bytes = self.bytes_left.get().checked_sub(len);
        let (Some(bytes), Some(reads)) = (bytes, self.reads_left.get().checked_sub(1)) else {
            return Err(io::Error::other("it takes too much reading"));
        };
        self.bytes_left.set(bytes);
        self.reads_left.set(reads);
        self.image.read_at(start, buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_ends_where_it_does_and_not_later() {
        let image: Rc<dyn ImageRead> = Rc::new((0..100u8).collect::<Vec<u8>>());
        let part = Part::new(&image, 10..20);
        let mut buf = [0; 4];
        part.read_at(6, &mut buf).unwrap();
        assert_eq!(buf, [16, 17, 18, 19]);
        assert!(part.read_at(7, &mut buf).is_err());
        assert!(part.read_at(u64::MAX, &mut buf).is_err());
        assert!(part.read_at(u64::MAX - 12, &mut buf).is_err());
    }

    #[test]
    fn reading_comes_to_an_end() {
        let image: Rc<dyn ImageRead> = Rc::new(vec![0u8; 8]);
        let part = Part::new(&image, 0..8);
        let reads = (0..=MOST_READS).take_while(|_| part.read_at(0, &mut [0]).is_ok()).count();
        assert_eq!(reads as u64, MOST_READS);
    }

    #[test]
    fn a_file_and_bytes_read_alike() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"0123456789").unwrap();
        let bytes = b"0123456789".to_vec();
        for image in [&file as &dyn ImageRead, &bytes] {
            let mut buf = [0; 3];
            image.read_at(7, &mut buf).unwrap();
            assert_eq!((&buf, image.size().unwrap()), (b"789", 10));
            assert_eq!(
                image.read_at(8, &mut buf).unwrap_err().kind(),
                io::ErrorKind::UnexpectedEof
            );
        }
    }
}
