//! Putting things into guest RAM: the one place through which the loader writes.
//!
//! Every range is claimed before it is written, and a claim must lie within RAM and
//! overlap no earlier one. So whatever addresses a kernel image names, it cannot end up
//! on top of the boot structures, nor they on top of it.

use std::ops::Range;

use softcpu::GuestPhysAddr;
use vm_memory::{Bytes, GuestAddress};

use super::error::PlaceError;
use crate::memory::GuestRam;

/// Something that has its place in guest RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The guest-physical addresses it has.
    pub range: Range<u64>,
    /// What it is, for errors and logs.
    pub what: &'static str,
}

/// Guest RAM with a record of what is where.
#[derive(Debug)]
pub(super) struct Placer<'m> {
    ram: &'m GuestRam,
    taken: Vec<Placed>,
}

impl<'m> Placer<'m> {
    /// RAM with nothing in it.
    pub(super) fn new(ram: &'m GuestRam) -> Self {
        Self { ram, taken: Vec::new() }
    }

    /// The RAM that is filled.
    pub(super) fn ram(&self) -> &'m GuestRam {
        self.ram
    }

    /// All claims so far.
    pub(super) fn taken(&self) -> &[Placed] {
        &self.taken
    }

    /// Gives up the placer for its record.
    pub(super) fn into_taken(self) -> Vec<Placed> {
        self.taken
    }

    /// Reserves `len` bytes at `start`. An empty range takes no place.
    pub(super) fn claim(
        &mut self,
        start: u64,
        len: u64,
        what: &'static str,
    ) -> Result<(), PlaceError> {
        let not_ram = PlaceError::NotRam { what, start, len };
        let end = start.checked_add(len).ok_or(not_ram)?;
        let in_ram = |(base, size): &(GuestPhysAddr, u64)| {
            base.0 <= start && end <= base.0.saturating_add(*size)
        };
        if !self.ram.ranges().iter().any(in_ram) {
            return Err(not_ram);
        }
        if len == 0 {
            return Ok(());
        }
        let overlaps = |placed: &&Placed| placed.range.start < end && start < placed.range.end;
        if let Some(other) = self.taken.iter().find(overlaps) {
            return Err(PlaceError::Overlap { what, start, with: other.what });
        }
        self.taken.push(Placed { range: start..end, what });
        Ok(())
    }

    /// Claims the start of `area` for `bytes` and writes them there.
    pub(super) fn put(
        &mut self,
        area: Range<u64>,
        bytes: &[u8],
        what: &'static str,
    ) -> Result<(), PlaceError> {
        let len = bytes.len() as u64;
        let room = area.end.saturating_sub(area.start);
        if len > room {
            return Err(PlaceError::NoRoom { what, len, room });
        }
        self.claim(area.start, len, what)?;
        self.write(area.start, bytes, what)
    }

    /// Writes into a range that has been claimed.
    pub(super) fn write(
        &self,
        start: u64,
        bytes: &[u8],
        what: &'static str,
    ) -> Result<(), PlaceError> {
        let len = bytes.len() as u64;
        self.ram.about_to_fill(&(start..start.saturating_add(len)));
        let not_ram = PlaceError::NotRam { what, start, len };
        self.ram.mmap().write_slice(bytes, GuestAddress(start)).map_err(|_| not_ram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIN_RAM;
    use proptest::prelude::*;

    #[test]
    fn claims_are_kept_apart_and_within_ram() {
        let ram = GuestRam::new(MIN_RAM).unwrap();
        let mut placer = Placer::new(&ram);
        placer.put(0x1000..0x2000, &[1; 0x800], "first").unwrap();
        placer.claim(0x1800, 0x800, "second").unwrap();
        let overlap = placer.claim(0x17ff, 1, "third").unwrap_err();
        assert_eq!(overlap, PlaceError::Overlap { what: "third", start: 0x17ff, with: "first" });
        let too_long = placer.put(0x3000..0x3004, &[0; 5], "fourth").unwrap_err();
        assert_eq!(too_long, PlaceError::NoRoom { what: "fourth", len: 5, room: 4 });
        for (start, len) in [(MIN_RAM, 1), (MIN_RAM - 1, 2), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(matches!(placer.claim(start, len, "x"), Err(PlaceError::NotRam { .. })));
        }
        assert_eq!(placer.into_taken().len(), 2);
    }

    proptest! {
        #[test]
        fn whatever_is_claimed_never_overlaps(claims in prop::collection::vec((0..MIN_RAM, 0..0x40_0000u64), 0..40)) {
            let ram = GuestRam::new(MIN_RAM).unwrap();
            let mut placer = Placer::new(&ram);
            for (start, len) in claims {
                let _ = placer.claim(start, len, "thing");
            }
            let mut taken = placer.into_taken();
            taken.sort_by_key(|placed| placed.range.start);
            for pair in taken.windows(2) {
                prop_assert!(pair[0].range.end <= pair[1].range.start);
            }
            prop_assert!(taken.last().is_none_or(|last| last.range.end <= MIN_RAM));
        }
    }
}
