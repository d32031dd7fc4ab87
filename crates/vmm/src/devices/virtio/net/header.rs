//! The header in front of each frame in a queue (virtio 1.2, 5.1.6), and what it may ask.

use lguest_abi::bus::tagged::NET_HEADER_BYTES;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::super::feature as transport;
use super::feature;

/// How long it is here and for backends, in bytes.
pub(super) const HEADER_LEN: usize = size_of::<Header>();

/// The L4 checksum is not filled in yet (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
pub(super) const NEEDS_CSUM: u8 = 1;
/// The L4 checksum has been found good (`VIRTIO_NET_HDR_F_DATA_VALID`).
pub(super) const DATA_VALID: u8 = 2;

/// No segmentation (`VIRTIO_NET_HDR_GSO_NONE`).
pub(super) const GSO_NONE: u8 = 0;
/// To be cut into TCP segments over IPv4.
pub(super) const GSO_TCPV4: u8 = 1;
/// To be cut into TCP segments over IPv6.
pub(super) const GSO_TCPV6: u8 = 4;
/// Beside the type: the segments carry congestion bits.
pub(super) const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr`, also what a tap device speaks.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub(super) struct Header {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_` constants, with or without [`GSO_ECN`].
    pub gso_type: u8,
    /// How long the headers of the frame are: a hint that nobody here believes.
    pub hdr_len: U16,
    /// How many bytes of payload a segment has.
    pub gso_size: U16,
    /// Where the checksummed part begins.
    pub csum_start: U16,
    /// Where in that part the checksum goes.
    pub csum_offset: U16,
    /// Over how many buffers a received frame stretches.
    pub num_buffers: U16,
}

/// How long it is in the queues of a driver that agreed on `features`: one from before
/// VERSION_1 that cannot merge buffers has no count of them at its end (virtio 1.2,
/// 5.1.6.1). In the first form, offsets differ from the third byte on; they mean nothing
/// without a feature, and that driver has none.
pub(super) const fn len_in_queues(features: u64) -> usize {
    if features & transport::FIRST_HEADERS != 0 {
        NET_HEADER_BYTES
    } else if features & (transport::VERSION_1 | feature::MRG_RXBUF) == 0 {
        HEADER_LEN.saturating_sub(size_of::<U16>())
    } else {
        HEADER_LEN
    }
}

impl Header {
    /// What the frame is to be cut into, without the congestion bit.
    pub(super) const fn gso(&self) -> u8 {
        self.gso_type & !GSO_ECN
    }

    /// Whether a driver that agreed on `features` may send this (virtio 1.2, 5.1.6.2.1).
    pub(super) const fn may_be_sent(&self, features: u64) -> bool {
        let csum = self.flags & NEEDS_CSUM == 0 || features & feature::CSUM != 0;
        let gso = match self.gso() {
            GSO_NONE => self.gso_type == GSO_NONE,
            GSO_TCPV4 => features & feature::HOST_TSO4 != 0,
            GSO_TCPV6 => features & feature::HOST_TSO6 != 0,
            _ => false,
        };
        let ecn = self.gso_type & GSO_ECN == 0 || features & feature::HOST_ECN != 0;
        csum && gso && ecn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_agreed_on_may_be_asked() {
        let ask = |flags, gso_type| Header { flags, gso_type, ..Header::default() };
        assert_eq!(HEADER_LEN, 12);
        assert!(ask(0, 0).may_be_sent(0));
        assert!(!ask(NEEDS_CSUM, 0).may_be_sent(0));
        assert!(ask(NEEDS_CSUM, 0).may_be_sent(feature::CSUM));
        assert!(!ask(NEEDS_CSUM, GSO_TCPV4).may_be_sent(feature::CSUM | feature::HOST_TSO6));
        assert!(ask(0, GSO_TCPV6).may_be_sent(feature::HOST_TSO6));
        assert!(!ask(0, GSO_TCPV6 | GSO_ECN).may_be_sent(feature::HOST_TSO6));
        assert!(!ask(0, GSO_ECN).may_be_sent(u64::MAX));
        assert!(!ask(0, 3).may_be_sent(u64::MAX));
    }
}
