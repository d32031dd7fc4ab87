//! Which received frames the driver wants (virtio 1.2, 5.1.6.5.1 and .2).
//!
//! A driver may leave this to chance: the device must pass what is wanted, and should
//! keep back the rest, which spares the guest's CPU looking at it.

use super::mac::MacAddress;

/// Addresses remembered of each kind; with more, all of the kind pass.
const MOST_ADDRESSES: usize = 64;

/// Commands of class `VIRTIO_NET_CTRL_RX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RxMode {
    Promiscuous = 0,
    AllMulticast = 1,
    AllUnicast = 2,
    NoMulticast = 3,
    NoUnicast = 4,
    NoBroadcast = 5,
}

impl RxMode {
    pub(super) const ALL: [Self; 6] = [
        Self::Promiscuous,
        Self::AllMulticast,
        Self::AllUnicast,
        Self::NoMulticast,
        Self::NoUnicast,
        Self::NoBroadcast,
    ];
}

/// Addresses to pass.
#[derive(Clone, Debug, Default)]
enum Table {
    #[default]
    None,
    These(Vec<MacAddress>),
    /// More than are remembered.
    All,
}

impl Table {
    fn new(addresses: &[MacAddress]) -> Self {
        match addresses.len() {
            0 => Self::None,
            1..=MOST_ADDRESSES => Self::These(addresses.to_vec()),
            _ => Self::All,
        }
    }

    fn has(&self, address: MacAddress) -> bool {
        match self {
            Self::None => false,
            Self::These(these) => these.contains(&address),
            Self::All => true,
        }
    }
}

/// The filter of one card.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    /// The card's own address.
    own: MacAddress,
    /// Which modes are on: a bit each.
    modes: u8,
    unicast: Table,
    multicast: Table,
}

impl Filter {
    /// As after reset: everything passes, until the driver says what it wants. Many never
    /// do.
    pub(super) const fn new(own: MacAddress) -> Self {
        Self {
            own,
            modes: 1 << RxMode::Promiscuous as u8,
            unicast: Table::None,
            multicast: Table::None,
        }
    }

    pub(super) const fn set_own(&mut self, own: MacAddress) {
        self.own = own;
    }

    pub(super) const fn set_mode(&mut self, mode: RxMode, on: bool) {
        let bit = 1 << mode as u8;
        self.modes = if on { self.modes | bit } else { self.modes & !bit };
    }

    pub(super) fn set_tables(&mut self, unicast: &[MacAddress], multicast: &[MacAddress]) {
        self.unicast = Table::new(unicast);
        self.multicast = Table::new(multicast);
    }

    const fn is_on(&self, mode: RxMode) -> bool {
        self.modes & 1 << mode as u8 != 0
    }

    /// Whether `frame` is wanted.
    pub(super) fn passes(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk().copied().map(MacAddress) else { return false };
        if self.is_on(RxMode::Promiscuous) {
            return true;
        }
        if to == MacAddress::BROADCAST {
            return !self.is_on(RxMode::NoBroadcast);
        }
        if to.is_unicast() {
            let wanted = to == self.own || self.unicast.has(to) || self.is_on(RxMode::AllUnicast);
            return wanted && !self.is_on(RxMode::NoUnicast);
        }
        let wanted = self.multicast.has(to) || self.is_on(RxMode::AllMulticast);
        wanted && !self.is_on(RxMode::NoMulticast)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_passes() {
        let own = MacAddress([2, 0, 0, 0, 0, 1]);
        let (other, group) = ([2, 0, 0, 0, 0, 2], [1, 0, 0x5e, 0, 0, 1]);
        let passes = |filter: &Filter| {
            [own.0, other, group, [0xff; 6]].map(|to| filter.passes(&[&to[..], &[0; 8]].concat()))
        };
        let mut filter = Filter::new(own);
        assert_eq!(passes(&filter), [true; 4]);
        filter.set_mode(RxMode::Promiscuous, false);
        assert_eq!(passes(&filter), [true, false, false, true]);
        filter.set_tables(&[MacAddress(other)], &[MacAddress(group)]);
        assert_eq!(passes(&filter), [true; 4]);
        filter.set_mode(RxMode::NoMulticast, true);
        filter.set_mode(RxMode::NoBroadcast, true);
        assert_eq!(passes(&filter), [true, true, false, false]);
        filter.set_mode(RxMode::NoUnicast, true);
        assert_eq!(passes(&filter), [false; 4]);
        filter.set_mode(RxMode::Promiscuous, true);
        assert_eq!(passes(&filter), [true; 4]);
        let mut filter = Filter::new(own);
        filter.set_mode(RxMode::Promiscuous, false);
        filter.set_tables(&[], &vec![MacAddress([1; 6]); MOST_ADDRESSES + 1]);
        assert_eq!(passes(&filter), [true, false, true, true]);
        filter.set_own(MacAddress(other));
        filter.set_mode(RxMode::AllUnicast, true);
        assert_eq!(passes(&filter), [true; 4]);
        assert!(!filter.passes(&[0; 5]));
    }
}
