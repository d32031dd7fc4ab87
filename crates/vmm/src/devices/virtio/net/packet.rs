//! Where the layers of a frame are: Ethernet, VLAN tags, IP, and TCP or UDP.
//!
//! Only to look at frames, whoever made them: what cannot be made out is `None`, and
//! the frame travels on as it is.

use super::checksum::Sum;

/// Bytes of an Ethernet header.
pub(super) const ETHERNET_HEADER: usize = 14;
const VLAN_TAG: usize = 4;
const IPV6_HEADER: usize = 40;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Versions of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IpVersion {
    V4,
    V6,
}

/// Where the IP header of `frame` begins, and which version it says it is. Two VLAN tags
/// are looked through.
pub(super) fn network_layer(frame: &[u8]) -> Option<(usize, IpVersion)> {
    let mut at = ETHERNET_HEADER;
    for _ in 0..3 {
        let kind = word(frame, at.checked_sub(2)?)?;
        let version = match kind {
            0x0800 => IpVersion::V4,
            0x86dd => IpVersion::V6,
            0x8100 | 0x88a8 => {
                at = at.checked_add(VLAN_TAG)?;
                continue;
            }
            _ => return None,
        };
        let expected = if version == IpVersion::V4 { 4 } else { 6 };
        return (frame.get(at)? >> 4 == expected).then_some((at, version));
    }
    None
}

/// The big-endian number at `at`.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Writes a big-endian number at `at`.
pub(super) fn set_word(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

/// A TCP segment or UDP datagram that lies in one frame altogether.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transport<'f> {
    /// Source and destination address, back to back.
    addresses: &'f [u8],
    /// [`TCP`] or [`UDP`].
    protocol: u8,
    /// Its header and payload, without what pads the frame.
    segment: &'f [u8],
}

impl<'f> Transport<'f> {
    /// Finds it. IPv6 extension headers are not looked through.
    pub(super) fn find(frame: &'f [u8]) -> Option<Self> {
        let (at, version) = network_layer(frame)?;
        let packet = frame.get(at..)?;
        let (addresses, protocol, segment) = match version {
            IpVersion::V4 => {
                let header = usize::from(packet.first()? & 15).checked_mul(4)?;
                let total = usize::from(word(packet, 2)?);
                // More fragments to come, or not the first: no whole segment.
                if header < 20 || word(packet, 6)? & 0x3fff != 0 {
                    return None;
                }
                (packet.get(12..20)?, *packet.get(9)?, packet.get(header..total)?)
            }
            IpVersion::V6 => {
                let end = usize::from(word(packet, 4)?).checked_add(IPV6_HEADER)?;
                (packet.get(8..40)?, *packet.get(6)?, packet.get(IPV6_HEADER..end)?)
            }
        };
        let least = match protocol {
            TCP => 20,
            UDP => 8,
            _ => return None,
        };
        (segment.len() >= least).then_some(Self { addresses, protocol, segment })
    }

    /// Whether its checksum is there and right (RFC 9293, 3.1; RFC 768).
    pub(super) fn checksum_is_good(&self) -> bool {
        if self.protocol == UDP && word(self.segment, 6) == Some(0) {
            return false;
        }
        // An IP packet has at most 64 KiB.
        let len = self.segment.len() as u16;
        let sum = Sum::default()
            .bytes(self.addresses)
            .word(self.protocol.into())
            .word(len)
            .bytes(self.segment);
        sum.fold() == 0xffff
    }

    /// A number that both directions of a flow have in common, and few other flows.
    pub(super) fn flow(&self) -> u32 {
        let (source, destination) =
            self.addresses.split_at_checked(self.addresses.len() / 2).unwrap_or_default();
        let ports = word(self.segment, 0).unwrap_or(0) ^ word(self.segment, 2).unwrap_or(0);
        let mut hash = u32::from(ports) << 8 | u32::from(self.protocol);
        for (a, b) in source.iter().zip(destination) {
            hash = (hash ^ u32::from(a ^ b)).wrapping_mul(0x0100_0193);
        }
        hash ^ hash >> 15
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::checksum::tests::plain_sum;
    use super::*;
    use proptest::prelude::*;

    /// A frame with a TCP or UDP segment in it, checksums and all.
    pub(in super::super) fn frame(
        version: IpVersion,
        vlans: usize,
        protocol: u8,
        ports: (u16, u16),
        payload: &[u8],
    ) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        for n in 0..vlans {
            frame.extend([0x81, 0, 0, n as u8]);
        }
        let mut segment = Vec::new();
        segment.extend(ports.0.to_be_bytes());
        segment.extend(ports.1.to_be_bytes());
        if protocol == TCP {
            segment.extend([0, 0, 1, 0, 0, 0, 2, 0, 0x80, 0x18, 0x20, 0, 0, 0, 0, 0]);
            segment.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            segment.extend((8 + payload.len() as u16).to_be_bytes());
            segment.extend([0, 0]);
        }
        segment.extend(payload);
        let len = segment.len() as u16;
        let mut ip = match version {
            IpVersion::V4 => {
                frame.extend([8, 0]);
                let mut ip = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0];
                ip.extend([10, 0, 0, 1, 10, 0, 0, 2]);
                ip[2..4].copy_from_slice(&(len + 20).to_be_bytes());
                let sum = !plain_sum(&ip);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                ip
            }
            IpVersion::V6 => {
                frame.extend([0x86, 0xdd]);
                let mut ip = vec![0x60, 0, 0, 0];
                ip.extend(len.to_be_bytes());
                ip.extend([protocol, 64]);
                ip.extend((0..32).map(|n| n * 7));
                ip
            }
        };
        let checksum =
            match !plain_sum(&[&pseudo_header(&ip, protocol, len)[..], &segment].concat()) {
                // The same number, which does not say "none" to UDP.
                0 => 0xffff,
                sum => sum,
            };
        let at = checksum_offset(protocol);
        segment[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        ip.extend(segment);
        frame.extend(ip);
        frame
    }

    pub(in super::super) fn checksum_offset(protocol: u8) -> usize {
        if protocol == TCP { 16 } else { 6 }
    }

    pub(in super::super) fn pseudo_header(ip: &[u8], protocol: u8, len: u16) -> Vec<u8> {
        let mut pseudo = if ip[0] >> 4 == 4 { ip[12..20].to_vec() } else { ip[8..40].to_vec() };
        pseudo.extend([0, protocol]);
        pseudo.extend(len.to_be_bytes());
        pseudo
    }

    pub(in super::super) fn any_version() -> impl Strategy<Value = IpVersion> {
        prop_oneof![Just(IpVersion::V4), Just(IpVersion::V6)]
    }

    proptest! {
        #[test]
        fn good_checksums_are_told_from_bad_ones(
            version in any_version(),
            vlans in 0..3_usize,
            protocol in prop_oneof![Just(TCP), Just(UDP)],
            payload in proptest::collection::vec(any::<u8>(), 1..200),
            pad in 0..4_usize,
            at: prop::sample::Index,
            bit in 0..8,
        ) {
            let mut frame = frame(version, vlans, protocol, (1, 2), &payload);
            let len = frame.len();
            frame.extend(vec![0; pad]);
            prop_assert!(Transport::find(&frame).unwrap().checksum_is_good());
            let payload_at = len - payload.len();
            frame[payload_at + at.index(payload.len())] ^= 1_u8 << bit;
            prop_assert!(!Transport::find(&frame).unwrap().checksum_is_good());
        }

        #[test]
        fn nothing_in_a_frame_panics(frame in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some(transport) = Transport::find(&frame) {
                let _ = (transport.checksum_is_good(), transport.flow());
            }
        }
    }

    #[test]
    fn a_flow_is_one_in_both_directions() {
        let there = frame(IpVersion::V4, 0, TCP, (1000, 80), b"x");
        let mut back = frame(IpVersion::V4, 0, TCP, (80, 1000), b"x");
        back[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        let flow = |frame: &[u8]| Transport::find(frame).unwrap().flow();
        assert_eq!(flow(&there), flow(&back));
        assert_ne!(flow(&there), flow(&frame(IpVersion::V4, 0, TCP, (1001, 80), b"x")));
    }

    #[test]
    fn a_missing_checksum_is_not_a_good_one_and_a_fragment_no_segment() {
        let mut datagram = frame(IpVersion::V4, 0, UDP, (1, 2), b"hello");
        datagram[40..42].fill(0);
        assert!(!Transport::find(&datagram).unwrap().checksum_is_good());
        datagram[20] |= 0x20;
        assert!(Transport::find(&datagram).is_none());
    }
}
