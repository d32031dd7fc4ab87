//! What may be in a 32-bit guest's page tables, and what kills it.
//!
//! The host shows an entry's frame to nobody before it has been through here. Walking, and
//! what to do with a present and lawful entry, is the host's business.

use core::fmt;

use crate::band::Paging;

/// Present, in every entry.
pub const PRESENT: u64 = 1;
/// Writable.
pub const WRITABLE: u64 = 2;
/// For user mode.
pub const USER: u64 = 4;
/// Set by the walk.
pub const ACCESSED: u64 = 0x20;
/// Set by a walk for a write.
pub const DIRTY: u64 = 0x40;
/// A large page above the lowest level; PAT in it. Neither may be.
pub const LARGE_OR_PAT: u64 = 0x80;

/// Flags that an entry above the lowest level may have.
pub const UPPER_ALLOWED: u64 = PRESENT | WRITABLE | USER | ACCESSED | DIRTY;

/// Where an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// PGD, or with PAE the four PDPT entries.
    Top,
    /// With PAE only.
    Middle,
    /// PTE.
    Page,
}

/// An entry that kills the guest when it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BadEntry {
    /// Flags that must not be there.
    Flags {
        /// Where.
        level: Level,
        /// The entry.
        entry: u64,
    },
    /// A frame at or above the limit.
    Frame {
        /// Where.
        level: Level,
        /// The entry.
        entry: u64,
    },
}

impl fmt::Display for BadEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (BadEntry::Flags { level, entry } | BadEntry::Frame { level, entry }) = self;
        let what = match self {
            BadEntry::Flags { .. } => "has flags it must not have",
            BadEntry::Frame { .. } => "leads outside the guest's memory",
        };
        let level = match level {
            Level::Top => "top-level",
            Level::Middle => "middle-level",
            Level::Page => "page",
        };
        write!(f, "{level} table entry {entry:#x} {what}")
    }
}

impl core::error::Error for BadEntry {}

/// The frame of a present entry, in a guest whose frames are those below `limit`. For an
/// entry that is not present, `Ok(None)`. V6's frames of devices lie above the limit: ask for
/// them with a limit that has them, and look again.
///
/// # Errors
///
/// The guest dies of it.
pub fn frame(
    paging: Paging,
    level: Level,
    entry: u64,
    limit: u32,
) -> Result<Option<u32>, BadEntry> {
    if entry & PRESENT == 0 {
        return Ok(None);
    }
    let lawful = match (paging, level) {
        (Paging::Pae, Level::Top) => entry & 0xfff == PRESENT,
        (_, Level::Top | Level::Middle) => entry & 0xfff & !UPPER_ALLOWED == 0,
        (_, Level::Page) => entry & LARGE_OR_PAT == 0,
    };
    if !lawful {
        return Err(BadEntry::Flags { level, entry });
    }
    let bits = match paging {
        Paging::TwoLevel => entry & 0xffff_ffff,
        // Without NX, which no guest is offered, all above the frame is to be 0.
        Paging::Pae => entry,
    };
    u32::try_from(bits >> 12)
        .ok()
        .filter(|&frame| frame < limit)
        .map(Some)
        .ok_or(BadEntry::Frame { level, entry })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: u32 = 0x4000;

    #[test]
    fn flags_are_judged_as_in_the_reference() {
        let ok = |paging, level, entry| frame(paging, level, entry, LIMIT).is_ok();
        for (paging, level) in [(Paging::TwoLevel, Level::Top), (Paging::Pae, Level::Middle)] {
            assert!(ok(paging, level, 0x1067));
            for bad in [0x1087, 0x100f, 0x1017, 0x1107, 0x1207] {
                assert!(!ok(paging, level, bad), "{bad:#x}");
            }
        }
        assert!(ok(Paging::Pae, Level::Top, 0x1001));
        assert!(!ok(Paging::Pae, Level::Top, 0x1003));
        // PWT and GLOBAL are ignored in a page's entry, PAT is not.
        assert!(ok(Paging::TwoLevel, Level::Page, 0x116f));
        assert!(!ok(Paging::TwoLevel, Level::Page, 0x10e7));
    }

    #[test]
    fn frames_end_at_the_limit() {
        let of = |entry| frame(Paging::TwoLevel, Level::Page, entry, LIMIT);
        assert_eq!(of(0x03ff_f007), Ok(Some(0x3fff)));
        assert_eq!(
            of(0x0400_0007),
            Err(BadEntry::Frame { level: Level::Page, entry: 0x0400_0007 })
        );
        assert_eq!(of(0xffff_fffe), Ok(None));
        let nx = 1 << 63 | 0x1007;
        assert!(frame(Paging::Pae, Level::Page, nx, LIMIT).is_err());
    }

    proptest! {
        #[test]
        fn any_entry_is_judged(entry: u64, limit: u32, pae: bool, which in 0usize..3) {
            let paging = if pae { Paging::Pae } else { Paging::TwoLevel };
            let level = [Level::Top, Level::Middle, Level::Page][which];
            if let Ok(Some(frame)) = frame(paging, level, entry, limit) {
                prop_assert!(frame < limit);
                prop_assert_eq!(u64::from(frame), entry >> 12 & 0xf_ffff_ffff_ffff & if pae { !0 } else { 0xf_ffff });
            }
        }
    }
}
