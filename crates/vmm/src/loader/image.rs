//! A kernel or initrd as the user gave it: a file, or bytes already in memory.
//!
//! Files are read where and when something is needed, never whole: a debug `vmlinux` may
//! be larger than the guest, and what the loader holds on the host is memory the promise
//! about this process's size has to account for. Files are not mapped either, because
//! one that somebody truncates meanwhile would then kill us with SIGBUS.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::error::LoadError;

/// The most that is taken from something that is no regular file (a pipe, a device).
const STREAM_LIMIT: u64 = 1 << 30;

/// A kernel or initrd, with the name errors call it by.
#[derive(Debug)]
pub struct Image {
    name: String,
    data: Data,
}

#[derive(Debug)]
enum Data {
    File { file: File, len: u64 },
    Bytes(Vec<u8>),
}

impl Image {
    /// Opens a file. What is no regular file is read to its end, up to 1 GiB.
    ///
    /// # Errors
    /// [`LoadError::Open`] when it cannot be opened or read.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let name = path.display().to_string();
        let data = Self::open_data(path)
            .map_err(|reason| LoadError::Open { name: name.clone(), reason })?;
        Ok(Self { name, data })
    }

    fn open_data(path: &Path) -> io::Result<Data> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if metadata.is_file() {
            return Ok(Data::File { file, len: metadata.len() });
        }
        let mut bytes = Vec::new();
        if file.take(STREAM_LIMIT).read_to_end(&mut bytes)? as u64 == STREAM_LIMIT {
            return Err(io::Error::other("it does not end within 1 GiB"));
        }
        Ok(Data::Bytes(bytes))
    }

    /// An image that is in memory already.
    #[must_use]
    pub fn from_bytes(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), data: Data::Bytes(bytes) }
    }

    /// What errors call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How long it is, in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match &self.data {
            Data::File { len, .. } => *len,
            Data::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads at `offset`: at most `len` bytes, fewer only where the image ends.
    pub(super) fn bytes_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.section(offset, len as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The `len` bytes from `offset` on as a stream, shorter where the image ends.
    pub(super) fn section(&self, offset: u64, len: u64) -> Section<'_> {
        Section { image: self, at: offset, left: len }
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        match &self.data {
            Data::File { file, .. } => file.read_at(buf, offset),
            Data::Bytes(bytes) => {
                let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
                rest.unwrap_or_default().read(buf)
            }
        }
    }
}

/// Part of an image as a stream.
#[derive(Debug)]
pub(super) struct Section<'i> {
    image: &'i Image,
    at: u64,
    left: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let buf = buf.get_mut(..want).unwrap_or_default();
        if buf.is_empty() {
            return Ok(0);
        }
        let got = self.image.read_at(self.at, buf)?;
        self.at = self.at.saturating_add(got as u64);
        self.left = self.left.saturating_sub(got as u64);
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_end_where_the_image_does() {
        let image = Image::from_bytes("x", (0..10).collect());
        assert_eq!(image.bytes_at(3, 4).unwrap(), [3, 4, 5, 6]);
        assert_eq!(image.bytes_at(8, 4).unwrap(), [8, 9]);
        assert_eq!(image.bytes_at(u64::MAX, usize::MAX).unwrap(), []);
    }

    #[test]
    fn a_file_and_a_device_read_alike() {
        let path = std::env::temp_dir().join(format!("lguest-image-{}", std::process::id()));
        std::fs::write(&path, b"hello kernel").unwrap();
        let image = Image::open(&path).unwrap();
        assert_eq!((image.len(), image.bytes_at(6, 99).unwrap()), (12, b"kernel".to_vec()));
        std::fs::remove_file(&path).unwrap();
        assert!(Image::open(Path::new("/dev/null")).unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let message = |path| Image::open(Path::new(path)).unwrap_err().to_string();
        assert!(message("/nonexistent/vmlinuz").starts_with("/nonexistent/vmlinuz: "));
        assert!(message("/").contains("directory"));
    }
}
