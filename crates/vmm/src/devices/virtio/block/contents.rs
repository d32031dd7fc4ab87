//! A disk's contents for those who look into it from outside before its guest runs.

use std::io;
use std::sync::Arc;

use super::image::Image;
use crate::loader::disk_boot::ImageRead;

/// What the guest will find on its disk, whatever format the image has.
#[derive(Clone, Debug)]
pub struct DiskContents(pub(super) Arc<Image>);

impl ImageRead for DiskContents {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.0.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.0.read_bytes(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.size())
    }
}
