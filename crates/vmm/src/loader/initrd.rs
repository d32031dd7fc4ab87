//! Initrds: where they go, and several of them as one.
//!
//! Linux takes one range and unpacks archive after archive from it, skipping zeroes in
//! between, as long as each begins at a multiple of four bytes
//! (Documentation/driver-api/early-userspace/buffer-format.rst). They are put as high as
//! allowed, out of the way of a kernel that clears and moves things behind its end.

use std::io::Read;
use std::ops::Range;

use softcpu::addr::{PAGE_OFFSET, PAGE_SIZE};

use super::error::LoadError;
use super::image::Image;
use super::place::Placer;

/// How much is copied at a time.
const CHUNK: usize = 0x4_0000;
/// What archives are aligned to within the range.
const ARCHIVE_ALIGN: u64 = 4;

/// Puts all initrds into one range that begins at a page, above `floor` (the kernel's
/// end) and with no byte above `last` (the kernel's reach).
///
/// Returns the range; `None` when there are none or all are empty.
pub(super) fn place_together(
    placer: &mut Placer<'_>,
    initrds: &[Image],
    floor: u64,
    last: u64,
) -> Result<Option<Range<u64>>, LoadError> {
    let align = |len: u64| len.checked_next_multiple_of(ARCHIVE_ALIGN).unwrap_or(u64::MAX);
    let total = initrds.iter().fold(0u64, |sum, image| align(sum).saturating_add(image.len()));
    if total == 0 {
        return Ok(None);
    }
    let range = find_room(placer, total, floor, last)?;
    placer.claim(range.start, total, "initrd")?;
    let mut at = range.start;
    for image in initrds {
        at = align(at);
        copy(placer, image, at)?;
        at = at.saturating_add(image.len());
    }
    Ok(Some(range))
}

/// Puts each initrd into pages of its own, in their order (multiboot modules).
pub(super) fn place_apart(
    placer: &mut Placer<'_>,
    initrds: &[Image],
    floor: u64,
) -> Result<Vec<Range<u64>>, LoadError> {
    let pages = |len: u64| len.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
    let total = initrds.iter().fold(0u64, |sum, image| sum.saturating_add(pages(image.len())));
    let mut at = find_room(placer, total, floor, u64::MAX)?.start;
    let mut ranges = Vec::new();
    for image in initrds {
        placer.claim(at, image.len(), "initrd")?;
        copy(placer, image, at)?;
        ranges.push(at..at.saturating_add(image.len()));
        at = at.saturating_add(pages(image.len()));
    }
    Ok(ranges)
}

/// The highest pages with room for `len` bytes between `floor` and `last`, in low RAM.
fn find_room(
    placer: &Placer<'_>,
    len: u64,
    floor: u64,
    last: u64,
) -> Result<Range<u64>, LoadError> {
    let low_end = placer.ram().low_end().0;
    let top = low_end.min(last.saturating_add(1));
    let floor = floor.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
    let start = top.checked_sub(len).map(|start| start & !PAGE_OFFSET);
    match start.filter(|start| *start >= floor) {
        Some(start) => Ok(start..start.saturating_add(len)),
        None if top < low_end => Err(LoadError::InitrdUnreachable { bytes: len, limit: top }),
        None => {
            let needed = floor.saturating_add(len).saturating_add(PAGE_SIZE);
            Err(LoadError::InitrdTooBig { bytes: len, needed })
        }
    }
}

/// Copies an initrd to `at`, which is claimed.
fn copy(placer: &Placer<'_>, image: &Image, at: u64) -> Result<(), LoadError> {
    let range = at..at.saturating_add(image.len());
    placer.ram().filled_by(std::slice::from_ref(&range), || copy_all(placer, image, &range))
}

/// Copies an initrd to where it is to lie.
fn copy_all(placer: &Placer<'_>, image: &Image, range: &Range<u64>) -> Result<(), LoadError> {
    let Range { start: mut at, end } = range.clone();
    let failed = |reason| LoadError::InitrdRead { name: image.name().to_owned(), reason };
    let mut buffer = vec![0; CHUNK.min(usize::try_from(image.len()).unwrap_or(CHUNK))];
    let mut source = image.section(0, image.len());
    while at < end {
        let read = source.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let chunk = buffer.get(..read).unwrap_or_default();
        placer.write(at, chunk, "initrd")?;
        at = at.saturating_add(read as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIN_RAM};
    use vm_memory::{Bytes, GuestAddress};

    fn images(sizes: &[usize]) -> Vec<Image> {
        let image = |(n, len): (usize, &usize)| Image::from_bytes("i", vec![n as u8 + 1; *len]);
        sizes.iter().enumerate().map(image).collect()
    }

    #[test]
    fn together_they_are_aligned_with_zeroes_between() {
        let ram = GuestRam::new(MIN_RAM).unwrap();
        let mut placer = Placer::new(&ram);
        let range = place_together(&mut placer, &images(&[5, 0, 3, 300_001]), 0x10_0000, u64::MAX);
        let range = range.unwrap().unwrap();
        assert_eq!((range.start % 4096, range.end - range.start), (0, 12 + 300_001));
        assert!(range.end <= MIN_RAM && range.end + 4096 > MIN_RAM);
        let mut head = [0; 13];
        ram.mmap().read_slice(&mut head, GuestAddress(range.start)).unwrap();
        assert_eq!(head, [1, 1, 1, 1, 1, 0, 0, 0, 3, 3, 3, 0, 4]);
        assert_eq!(ram.mmap().read_obj::<u8>(GuestAddress(range.end - 1)).unwrap(), 4);
    }

    #[test]
    fn apart_each_has_its_own_pages() {
        let ram = GuestRam::new(MIN_RAM).unwrap();
        let mut placer = Placer::new(&ram);
        let ranges = place_apart(&mut placer, &images(&[5, 5000, 1]), 0x10_0000).unwrap();
        assert!(ranges.iter().all(|range| range.start % 4096 == 0));
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let ram = GuestRam::new(MIN_RAM).unwrap();
        let mut placer = Placer::new(&ram);
        let error =
            place_together(&mut placer, &images(&[20 << 20]), 16 << 20, u64::MAX).unwrap_err();
        assert!(error.to_string().contains("give --mem 37M"), "{error}");
        let error = place_together(&mut placer, &images(&[20 << 20]), 0x10_0000, (16 << 20) - 1)
            .unwrap_err();
        assert!(error.to_string().contains("below the 16 MiB"), "{error}");
        assert_eq!(place_together(&mut placer, &images(&[0]), 0, u64::MAX).unwrap(), None);
    }
}
