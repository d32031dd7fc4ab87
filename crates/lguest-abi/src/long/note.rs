//! The ELF note by which an image says that it is a 64-bit lguest guest.
//!
//! It names an entry of its own, so `e_entry` and other notes (PVH's) remain free: one image
//! starts on lguest and on a PC.

use super::layout::shared;
use super::{Virt, Wire};
use crate::bytes::get_u32;

/// The owner, without the 0 that ends it in the note.
pub const NAME: &[u8] = b"lguest";
/// The type.
pub const TYPE: u32 = 1;

shared! {
    /// The note's descriptor.
    Descriptor {
        /// The oldest version the guest speaks.
        version_min: u32,
        /// The newest.
        version_max: u32,
        /// Virtual address of the first instruction on lguest.
        entry: u64,
        /// Features it cannot do without.
        features: u64,
    }
}

/// Bytes of the descriptor.
pub const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();

/// Bytes of the whole note, as [`note_bytes`] makes it.
pub const NOTE_BYTES: usize = 12 + 8 + DESCRIPTOR_BYTES;

/// The note as it lies in the image: put it into a section named `.note.lguest`.
pub const fn note_bytes(d: Descriptor) -> [u8; NOTE_BYTES] {
    let mut note = [0; NOTE_BYTES];
    let words: [u32; 11] = [
        (NAME.len() as u32).wrapping_add(1),
        DESCRIPTOR_BYTES as u32,
        TYPE,
        u32::from_le_bytes(*b"lgue"),
        u32::from_le_bytes(*b"st\0\0"),
        d.version_min,
        d.version_max,
        d.entry as u32,
        (d.entry >> 32) as u32,
        d.features as u32,
        (d.features >> 32) as u32,
    ];
    let mut rest: &mut [u8] = &mut note;
    let mut words: &[u32] = &words;
    while let ([word, words_left @ ..], Some((to, left))) = (words, rest.split_first_chunk_mut()) {
        *to = word.to_le_bytes();
        (words, rest) = (words_left, left);
    }
    note
}

/// Why a note is none that a guest can be started by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BadNote {
    /// Shorter than [`DESCRIPTOR_BYTES`].
    Short(u32),
    /// None of its versions is ours.
    Version {
        /// Oldest.
        min: u32,
        /// Newest.
        max: u32,
    },
    /// Not a canonical address.
    Entry(Virt),
    /// It needs features that do not exist.
    Features(u64),
}

impl core::fmt::Display for BadNote {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            BadNote::Short(n) => write!(f, "lguest note of {n} bytes, not {DESCRIPTOR_BYTES}"),
            BadNote::Version { min, max } => write!(
                f,
                "the kernel speaks versions {min} to {max} of the lguest ABI, this host {}",
                super::VERSION
            ),
            BadNote::Entry(at) => write!(f, "lguest note: entry {:#x} is no address", at.0),
            BadNote::Features(bits) => {
                write!(f, "lguest note: unknown features {bits:#x} are required")
            }
        }
    }
}

impl core::error::Error for BadNote {}

/// Finds the note in a PT_NOTE segment. `Ok(None)`: there is none, and the image is no
/// lguest guest as far as this segment says.
///
/// # Errors
///
/// There is one, and it is of no use.
pub fn find(segment: &[u8]) -> Result<Option<Descriptor>, BadNote> {
    let mut rest = segment;
    while let Some((note, next)) = Note::split_off(rest) {
        rest = next;
        let ours = note.name.strip_suffix(&[0]).unwrap_or(note.name) == NAME;
        if ours && note.kind == TYPE {
            return parse(note.desc).map(Some);
        }
    }
    Ok(None)
}

/// Any owner's note.
struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    desc: &'a [u8],
}

impl<'a> Note<'a> {
    /// The first note, and what follows it.
    fn split_off(bytes: &'a [u8]) -> Option<(Note<'a>, &'a [u8])> {
        let name_len = get_u32(bytes, 0)? as usize;
        let desc_len = get_u32(bytes, 4)? as usize;
        let kind = get_u32(bytes, 8)?;
        let (name, rest) = padded(bytes.get(12..)?, name_len)?;
        let (desc, rest) = padded(rest, desc_len)?;
        Some((Note { name, kind, desc }, rest))
    }
}

/// So many bytes, and what follows their padding to four. The last one's may be missing.
fn padded(bytes: &[u8], len: usize) -> Option<(&[u8], &[u8])> {
    let taken = bytes.get(..len)?;
    let end = len.checked_next_multiple_of(4)?.min(bytes.len());
    Some((taken, bytes.get(end..)?))
}

fn parse(desc: &[u8]) -> Result<Descriptor, BadNote> {
    let parsed = Descriptor::read(desc)
        .ok_or_else(|| BadNote::Short(u32::try_from(desc.len()).unwrap_or(u32::MAX)))?;
    let Descriptor { version_min: min, version_max: max, entry, features } = parsed;
    if !(min..=max).contains(&super::VERSION) {
        return Err(BadNote::Version { min, max });
    }
    if !Virt(entry).is_canonical() {
        return Err(BadNote::Entry(Virt(entry)));
    }
    let known = super::feature::BUS | super::feature::CLOCK;
    if features & !known != 0 {
        return Err(BadNote::Features(features & !known));
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::long::layout::{assert_packed, assert_wire};

    const GOOD: Descriptor =
        Descriptor { version_min: 1, version_max: 1, entry: 0xffff_ffff_8000_0000, features: 1 };

    #[test]
    fn the_descriptor_has_no_holes() {
        assert_packed(Descriptor::FIELDS, 24);
        assert_wire::<Descriptor>();
    }

    #[test]
    fn the_note_is_found_behind_others() {
        let mut segment = Vec::new();
        // Xen's PVH note: name "Xen", type 18, four bytes.
        for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x0010_0000u32] {
            segment.extend(word.to_le_bytes());
        }
        assert_eq!(find(&segment), Ok(None));
        segment.extend(note_bytes(GOOD));
        assert_eq!(find(&segment), Ok(Some(GOOD)));
        segment.pop();
        assert_eq!(find(&segment), Ok(None), "a note that is cut off is none");
    }

    #[test]
    fn useless_notes_say_why() {
        let find = |d| find(&note_bytes(d));
        assert_eq!(
            find(Descriptor { version_min: 2, version_max: 7, ..GOOD }),
            Err(BadNote::Version { min: 2, max: 7 })
        );
        assert_eq!(find(Descriptor { entry: 1 << 50, ..GOOD }), Err(BadNote::Entry(Virt(1 << 50))));
        assert_eq!(find(Descriptor { features: 1 << 40, ..GOOD }), Err(BadNote::Features(1 << 40)));
        let mut short = note_bytes(GOOD);
        short[4] = 20;
        assert_eq!(super::find(&short), Err(BadNote::Short(20)));
    }

    proptest! {
        #[test]
        fn any_segment_is_read_to_an_end(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200), small: bool,
        ) {
            if small {
                // Lengths that make sense, to get further.
                for at in (0..bytes.len()).filter(|at| at % 4 != 0) {
                    bytes[at] = 0;
                }
            }
            let _ = find(&bytes);
            bytes.splice(0..0, note_bytes(GOOD));
            prop_assert_eq!(find(&bytes), Ok(Some(GOOD)));
        }
    }
}
