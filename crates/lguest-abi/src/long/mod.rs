//! The 64-bit ABI: the ideas of lguest for a guest in long mode.
//!
//! Ours, so it has one version and says so, where the old one had seven bands and did not.
//! `docs/lguest-abi.md` specifies it for people; a test holds the document's tables against
//! what is here. In the order of a guest's life: [`note`], by which an image is known;
//! [`entry`], the first instruction's registers, tables and [`StartInfo`](entry::StartInfo);
//! [`shared_data`], a page that the guest offers with its first call; [`call`]s and their
//! ring; [`traps`]; the [`bus`].

pub mod bus;
pub mod call;
pub mod entry;
mod layout;
pub mod note;
pub mod shared_data;
pub mod traps;

pub use layout::{Field, Wire};

/// The version that this crate describes. Hosts and guests name the ones they speak.
pub const VERSION: u32 = 1;

/// Features of version 1, offered in [`StartInfo`](entry::StartInfo), accepted in
/// [`SharedData`](shared_data::SharedData). Accepting what was not offered is fatal.
pub mod feature {
    /// There is a bus ([`bus`](super::bus)).
    pub const BUS: u64 = 1 << 0;
    /// The clock of the shared data is kept, and the TSC may be read by it at any time.
    pub const CLOCK: u64 = 1 << 1;
    /// All that there are, with their names.
    pub const ALL: &[(&str, u64)] = &[("BUS", BUS), ("CLOCK", CLOCK)];
}

/// A guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Phys(pub u64);

/// A guest-virtual address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Virt(pub u64);

impl Virt {
    /// Whether the upper 17 bits are all the same, as four levels of tables need it.
    pub const fn is_canonical(self) -> bool {
        ((self.0 << 16) as i64 >> 16) as u64 == self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses_have_a_hole_between_them() {
        let canonical = |a| Virt(a).is_canonical();
        assert!(canonical(0) && canonical(0x7fff_ffff_ffff));
        assert!(canonical(0xffff_8000_0000_0000) && canonical(u64::MAX));
        assert!(!canonical(0x8000_0000_0000) && !canonical(0xffff_7fff_ffff_ffff));
    }

    #[test]
    fn features_have_a_bit_each() {
        let all = feature::ALL.iter().fold(0u64, |all, (_, bit)| {
            assert_eq!((bit.count_ones(), all & bit), (1, 0));
            all | bit
        });
        assert_eq!(all, feature::BUS | feature::CLOCK);
    }
}
