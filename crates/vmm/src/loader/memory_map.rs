//! The memory map a kernel is told: e820's types, which PVH and multiboot share.
//!
//! Source: ACPI 6.5, table 15.7 (address range types).

use crate::layout::{BIOS_AREA, HIGH_MEMORY, LOW_USABLE_END};
use crate::memory::GuestRam;

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeType {
    /// RAM for the kernel's use.
    Usable = 1,
    /// Not for the kernel's use.
    Reserved = 2,
}

/// A range of guest-physical addresses and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The first address.
    pub start: u64,
    /// The length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: RangeType,
}

/// Where a PC has video memory and adapters' firmware: not in the map at all.
const VIDEO_MEMORY: u64 = 0xa_0000;

/// The map of a machine with this RAM, ascending.
///
/// What firmware would keep below 1 MiB is reserved: the BIOS data area, and the area
/// where firmware is.
#[must_use]
pub fn memory_map(ram: &GuestRam) -> Vec<MapEntry> {
    let entry =
        |start: u64, end: u64, kind| MapEntry { start, len: end.saturating_sub(start), kind };
    let mut map = vec![
        entry(0, LOW_USABLE_END.0, RangeType::Usable),
        entry(LOW_USABLE_END.0, VIDEO_MEMORY, RangeType::Reserved),
        entry(BIOS_AREA.start, BIOS_AREA.end, RangeType::Reserved),
        entry(HIGH_MEMORY.0, ram.low_end().0, RangeType::Usable),
    ];
    let high = ram.ranges().into_iter().skip(1);
    map.extend(high.map(|(start, len)| MapEntry { start: start.0, len, kind: RangeType::Usable }));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{HOLE_END, HOLE_START};
    use crate::memory::MIB;

    #[test]
    fn the_map_is_sorted_disjoint_and_within_ram() {
        for mib in [32, 128, 3071, 3072, 3073, 4096, 9000] {
            let ram = GuestRam::new(mib * MIB).unwrap();
            let map = memory_map(&ram);
            let mut end = 0;
            for entry in &map {
                assert!(entry.start >= end && entry.len > 0, "{mib}: {entry:x?}");
                end = entry.start + entry.len;
                assert!(end <= HOLE_START.0 || entry.start >= HOLE_END.0);
            }
            let usable: u64 =
                map.iter().filter(|e| e.kind == RangeType::Usable).map(|e| e.len).sum();
            assert_eq!(usable, mib * MIB - (HIGH_MEMORY.0 - LOW_USABLE_END.0), "{mib}");
        }
    }
}
