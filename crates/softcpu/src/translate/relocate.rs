//! What in a translation depends on where it is, and how it is moved.
//!
//! The assembler notes each number that would be another one if the guest's code were at
//! another address, or the translation at another place in code memory. Moving a translation
//! is then copying its bytes and changing those numbers, some fifty times faster than making
//! it ([`super::clone`]). Addresses differ by whole pages, so nothing changes its length: what
//! might is noted as staying where it is.

use super::access::tlb_entry;
use super::fields::jump_distance;
use crate::addr::PAGE_OFFSET;

/// Addresses of code that can be moved: far enough from both ends of what user code may have
/// that all addresses such code makes (they are within 2 GiB) are canonical and larger than
/// what has a short encoding. Programs that are loaded where chance has it are there.
const MOVABLE: std::ops::Range<u64> = 1 << 33..(1 << 47) - (1 << 32);

/// Whether code at `rip` can be moved, or moved there.
pub(super) fn is_movable(rip: u64) -> bool {
    MOVABLE.contains(&rip)
}

/// What a number depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// A guest address, which moves with the code.
    Address,
    /// The address of a kept op.
    Op,
    /// The number of a link.
    Link,
    /// The distance to a thunk.
    Thunk,
    /// Where the TLB's entry is for the last [`Kind::Address`].
    TlbEntry,
    /// Where the jump cache's entry is for the last [`Kind::Address`].
    Jump,
}

impl Kind {
    /// Bytes of such a number.
    pub(super) const fn size(self) -> usize {
        match self {
            Self::Address | Self::Op => 8,
            Self::Link | Self::Thunk | Self::TlbEntry | Self::Jump => 4,
        }
    }
}

/// A number in code: where it is, and in the lowest bits its [`Kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Relocation(u32);

const KIND_BITS: u32 = 3;

impl Relocation {
    fn new(at: usize, kind: Kind) -> Option<Self> {
        let at = u32::try_from(at).ok()?;
        (at >> (u32::BITS - KIND_BITS) == 0).then_some(Self(at << KIND_BITS | kind as u32))
    }

    pub(super) fn at(self) -> usize {
        (self.0 >> KIND_BITS) as usize
    }

    pub(super) fn kind(self) -> Kind {
        match self.0 & ((1 << KIND_BITS) - 1) {
            0 => Kind::Address,
            1 => Kind::Op,
            2 => Kind::Link,
            3 => Kind::Thunk,
            4 => Kind::TlbEntry,
            _ => Kind::Jump,
        }
    }
}

/// Those of code on its way, in order.
#[derive(Debug, Default)]
pub(super) struct Relocations {
    list: Vec<Relocation>,
    /// Something depends on the guest's address in a way that is none of the [`Kind`]s.
    stays: bool,
}

impl From<Vec<Relocation>> for Relocations {
    fn from(list: Vec<Relocation>) -> Self {
        Self { list, stays: false }
    }
}

impl Relocations {
    pub(super) fn add(&mut self, at: usize, kind: Kind) {
        match Relocation::new(at, kind) {
            Some(relocation) => self.list.push(relocation),
            None => self.stays = true,
        }
    }

    pub(super) fn stay(&mut self) {
        self.stays = true;
    }

    /// Nothing behind the first `len` bytes has been written.
    pub(super) fn take_back(&mut self, len: usize) {
        let kept = self.list.partition_point(|relocation| relocation.at() < len);
        self.list.truncate(kept);
    }

    /// Whether the code, which stands for the guest's at `rip`, can stand for the same code
    /// elsewhere.
    pub(super) fn can_move(&self, rip: u64) -> bool {
        is_movable(rip) && !self.stays
    }

    /// All of them. With no others a translation can be moved in code memory.
    pub(super) fn into_list(self) -> Vec<Relocation> {
        self.list
    }
}

/// How far a translation is moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Distance {
    /// In the guest: whole pages.
    pub(super) guest: u64,
    /// In code memory.
    pub(super) host: u64,
    /// From the numbers of its links to the new ones.
    pub(super) links: u32,
}

/// Who knows what the code was made with.
pub(super) trait MadeWith {
    /// The address of the op that stands for the one at `address`.
    fn op(&self, address: u64) -> Option<u64>;
    /// Where in the code the distance of link `number` is.
    fn link(&self, number: u32) -> Option<usize>;
}

/// Changes `code`, a copy of some from `origin`, into what it is `distance` further on, none
/// of its links connected. `None` if it cannot be; `code` may be anything then.
pub(super) fn relocate(
    code: &mut [u8],
    relocations: &[Relocation],
    distance: Distance,
    origin: &impl MadeWith,
) -> Option<()> {
    debug_assert_eq!(distance.guest & PAGE_OFFSET, 0);
    // The last address, as it was and as it is.
    let (mut old, mut new) = (0, 0);
    for relocation in relocations {
        let at = relocation.at();
        match relocation.kind() {
            Kind::Address => {
                let number = word(code, at)?;
                old = u64::from_le_bytes(*number);
                new = old.wrapping_add(distance.guest);
                *number = new.to_le_bytes();
            }
            Kind::Op => {
                let number = word(code, at)?;
                let op = origin.op(u64::from_le_bytes(*number))?;
                // As long as a word must be.
                i32::try_from(op as i64).is_err().then_some(())?;
                u32::try_from(op).is_err().then_some(())?;
                *number = op.to_le_bytes();
            }
            Kind::Link => {
                let number = half(code, at)?;
                let link = u32::from_le_bytes(*number);
                *number = link.wrapping_add(distance.links).to_le_bytes();
                // Its own piece of code begins with this, an opcode of one byte before it.
                let from = origin.link(link)?;
                let to = at.wrapping_sub(1).wrapping_sub(from).wrapping_sub(4);
                *half(code, from)? = (to as u32).to_le_bytes();
            }
            Kind::Thunk => change(code, at, |number| number.wrapping_sub(distance.host as u32))?,
            Kind::TlbEntry => change(code, at, |number| {
                number.wrapping_sub(tlb_entry(old)).wrapping_add(tlb_entry(new))
            })?,
            Kind::Jump => change(code, at, |number| {
                number.wrapping_sub(jump_distance(old)).wrapping_add(jump_distance(new))
            })?,
        }
    }
    Some(())
}

fn change(code: &mut [u8], at: usize, change: impl FnOnce(u32) -> u32) -> Option<()> {
    let number = half(code, at)?;
    *number = change(u32::from_le_bytes(*number)).to_le_bytes();
    Some(())
}

fn word(code: &mut [u8], at: usize) -> Option<&mut [u8; 8]> {
    code.get_mut(at..)?.first_chunk_mut()
}

fn half(code: &mut [u8], at: usize) -> Option<&mut [u8; 4]> {
    code.get_mut(at..)?.first_chunk_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relocations_say_what_they_were_made_of() {
        let all = [Kind::Address, Kind::Op, Kind::Link, Kind::Thunk, Kind::TlbEntry, Kind::Jump];
        for kind in all {
            let relocation = Relocation::new(0x1234, kind).unwrap();
            assert_eq!((relocation.at(), relocation.kind()), (0x1234, kind));
        }
        assert_eq!(Relocation::new(1 << 29, Kind::Op), None);
    }

    #[test]
    fn what_is_taken_back_is_not_moved() {
        let mut relocations = Relocations::default();
        for at in [3, 9, 20] {
            relocations.add(at, Kind::Thunk);
        }
        relocations.take_back(9);
        let left = relocations.into_list();
        assert_eq!(left.iter().map(|left| left.at()).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn only_code_far_from_the_ends_of_user_space_is_moved() {
        for (rip, movable) in [
            (0x40_1000, false),
            (0x1_ffff_f000, false),
            (0x2_0000_0000, true),
            (0x5555_5555_5000, true),
            (0x7fff_f7ff_f000, false),
            (0xffff_ffff_8100_0000, false),
        ] {
            assert_eq!(Relocations::default().can_move(rip), movable, "{rip:#x}");
        }
        let mut staying = Relocations::default();
        staying.stay();
        assert!(!staying.can_move(0x5555_5555_5000));
    }
}
