//! Received TCP segments put together again: the reverse of `segment`.
//!
//! What a peer has cut into small segments costs the guest's slow CPU as much for each
//! of them as for a large one. Segments of one flow that follow each other, and have all
//! come in already, are handed over as one (as Linux's GRO does): nothing waits for
//! another, and only what can be cut again into the very same segments (but for IPv4's
//! identification) is merged.

use super::checksum::Sum;
use super::header::{GSO_TCPV4, GSO_TCPV6, Header, NEEDS_CSUM};
use super::packet::{IpVersion, TCP, Transport, network_layer, set_word, word};

/// The longest result, in bytes: no IP packet is longer.
const LONGEST: usize = 0xffff;

const TCP_CHECKSUM: usize = 16;
const TCP_FLAGS: usize = 13;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// A TCP segment with data that may be merged.
#[derive(Clone, Copy, Debug)]
struct Segment<'f> {
    version: IpVersion,
    l3: usize,
    l4: usize,
    /// Ethernet, IP and TCP.
    headers: &'f [u8],
    payload: &'f [u8],
    sequence: u32,
    flags: u8,
}

impl<'f> Segment<'f> {
    /// Looks at a frame; `None`: it stays alone.
    fn look(frame: &'f [u8]) -> Option<Self> {
        let (l3, version) = network_layer(frame)?;
        let packet = frame.get(l3..)?;
        let (l3_len, end, protocol) = match version {
            IpVersion::V4 => {
                let header = packet.get(..20)?;
                let plain =
                    *header.first()? == 0x45 && Sum::default().bytes(header).fold() == 0xffff;
                plain.then_some((20, usize::from(word(header, 2)?), *header.get(9)?))?
            }
            IpVersion::V6 => {
                let end = usize::from(word(packet, 4)?).checked_add(40)?;
                (40, end, *packet.get(6)?)
            }
        };
        let l4 = l3.checked_add(l3_len)?;
        let tcp = packet.get(l3_len..end)?;
        let tcp_len = usize::from(*tcp.get(12)? >> 4).checked_mul(4)?;
        let flags = *tcp.get(TCP_FLAGS)?;
        let good = protocol == TCP
            && tcp_len >= 20
            && flags & !PSH == ACK
            && Transport::find(frame)?.checksum_is_good();
        let (headers, payload) =
            frame.get(..l3.checked_add(end)?)?.split_at_checked(l4.checked_add(tcp_len)?)?;
        let sequence = u32::from_be_bytes(*tcp.get(4..)?.first_chunk()?);
        (good && !payload.is_empty()).then_some(Self {
            version,
            l3,
            l4,
            headers,
            payload,
            sequence,
            flags,
        })
    }

    /// The headers in pieces, without what differs between segments of one flow: lengths,
    /// IPv4's identification, checksums, sequence numbers, flags; and without the window, two bytes.
    fn common(&self) -> Option<[&'f [u8]; 7]> {
        let ethernet = self.headers.get(..self.l3)?;
        let ip = self.headers.get(self.l3..self.l4)?;
        let tcp = self.headers.get(self.l4..)?;
        let (class, hops, addresses) = match self.version {
            IpVersion::V4 => (ip.get(..2)?, ip.get(6..10)?, ip.get(12..)?),
            IpVersion::V6 => (ip.get(..4)?, ip.get(6..8)?, ip.get(8..)?),
        };
        let (ports, acknowledged) = (tcp.get(..4)?, tcp.get(8..13)?);
        Some([ethernet, class, hops, addresses, ports, acknowledged, tcp.get(18..)?])
    }

    /// The window, which an acknowledgement changes.
    fn window(&self) -> Option<u16> {
        word(self.headers, self.l4.checked_add(14)?)
    }

    fn same_flow(&self, other: &Self) -> bool {
        self.version == other.version
            && self.window() == other.window()
            && self.common().is_some_and(|common| Some(common) == other.common())
    }
}

/// Segments merged so far.
#[derive(Debug)]
pub(super) struct Merge<'f> {
    first: Segment<'f>,
    /// Where the next one must begin.
    next: u32,
    payload: usize,
    push: u8,
    ended: bool,
    count: usize,
}

impl<'f> Merge<'f> {
    /// Begins with a frame; `None`: it stays alone.
    pub(super) fn begin(frame: &'f [u8]) -> Option<Self> {
        let first = Segment::look(frame).filter(|first| first.flags & PSH == 0)?;
        let payload = first.payload.len();
        let next = first.sequence.wrapping_add(payload as u32);
        Some(Self { first, next, payload, push: 0, ended: false, count: 1 })
    }

    /// Adds a frame if it follows; its payload goes to `merged`, which the first one's
    /// headers and payload are put into before.
    pub(super) fn add(&mut self, frame: &[u8], merged: &mut Vec<u8>) -> bool {
        if self.ended {
            return false;
        }
        let Some(segment) = Segment::look(frame) else { return false };
        let size = self.first.payload.len();
        let payload = self.payload.saturating_add(segment.payload.len());
        let headers = self.first.headers.len();
        let follows = segment.sequence == self.next
            && segment.payload.len() <= size
            && payload.saturating_add(headers) <= LONGEST
            && segment.same_flow(&self.first);
        if !follows {
            return false;
        }
        if self.count == 1 {
            merged.clear();
            merged.extend_from_slice(self.first.headers);
            merged.extend_from_slice(self.first.payload);
        }
        merged.extend_from_slice(segment.payload);
        self.payload = payload;
        self.next = self.next.wrapping_add(segment.payload.len() as u32);
        self.push = segment.flags & PSH;
        // A short one is the last, and so is one that says that it is.
        self.ended = segment.payload.len() < size || self.push != 0;
        self.count = self.count.saturating_add(1);
        true
    }

    /// Makes the headers in `merged` fit, and says what to tell the driver; `None`: the
    /// first frame has stayed alone.
    pub(super) fn finish(&self, merged: &mut [u8]) -> Option<Header> {
        if self.count < 2 {
            return None;
        }
        let Segment { version, l3, l4, headers, payload, .. } = self.first;
        let (lower, tcp) = merged.split_at_mut_checked(l4)?;
        let ip = lower.get_mut(l3..)?;
        let tcp_len = u16::try_from(tcp.len()).ok()?;
        let (gso_type, addresses) = match version {
            IpVersion::V4 => {
                set_word(ip, 2, u16::try_from(ip.len().checked_add(tcp.len())?).ok()?)?;
                set_word(ip, 10, 0)?;
                let checksum = Sum::default().bytes(ip).checksum();
                set_word(ip, 10, checksum)?;
                (GSO_TCPV4, ip.get(12..)?)
            }
            IpVersion::V6 => {
                set_word(ip, 4, tcp_len)?;
                (GSO_TCPV6, ip.get(8..)?)
            }
        };
        // Each segment's checksum was good, so that the driver need not look again: it
        // gets the pseudo header's sum, as if the frame came from next door.
        let pseudo = Sum::default().bytes(addresses).word(TCP.into()).word(tcp_len);
        set_word(tcp, TCP_CHECKSUM, pseudo.fold())?;
        *tcp.get_mut(TCP_FLAGS)? |= self.push;
        Some(Header {
            flags: NEEDS_CSUM,
            gso_type,
            hdr_len: u16::try_from(headers.len()).ok()?.into(),
            gso_size: u16::try_from(payload.len()).ok()?.into(),
            csum_start: u16::try_from(l4).ok()?.into(),
            csum_offset: (TCP_CHECKSUM as u16).into(),
            num_buffers: 0.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::UDP;
    use super::super::packet::tests::{any_version, frame};
    use super::super::segment::Segments;
    use super::super::segment::tests::offload;
    use super::*;
    use proptest::prelude::*;

    fn cut(header: &Header, frame: &[u8]) -> Vec<Vec<u8>> {
        let (mut buffer, mut starts) = (Vec::new(), Vec::new());
        let segments = Segments::new(header, frame).unwrap().unwrap();
        segments.write(&mut buffer, |buffer, len| starts.push((buffer.len(), len))).unwrap();
        starts.into_iter().map(|(at, len)| buffer[at..at + len].to_vec()).collect()
    }

    fn merge(frames: &[Vec<u8>]) -> (usize, Option<(Header, Vec<u8>)>) {
        let mut merged = Vec::new();
        let Some(mut merge) = Merge::begin(&frames[0]) else { return (1, None) };
        for frame in &frames[1..] {
            if !merge.add(frame, &mut merged) {
                break;
            }
        }
        (merge.count, merge.finish(&mut merged).map(|header| (header, merged)))
    }

    proptest! {
        #[test]
        fn what_was_cut_is_whole_again(
            version in any_version(),
            vlans in 0..3_usize,
            payload in proptest::collection::vec(any::<u8>(), 2..20_000),
            size in 48..3000_u16,
        ) {
            prop_assume!(payload.len() > usize::from(size));
            let mut original = frame(version, vlans, TCP, (7, 8), &payload);
            let header = offload(&mut original, TCP, size);
            let segments = cut(&header, &original);
            let (count, merged) = merge(&segments);
            prop_assert_eq!(count, segments.len());
            let (told, whole) = merged.unwrap();
            prop_assert_eq!(whole, original);
            let hdr_len = told.hdr_len;
            prop_assert_eq!(told, Header { hdr_len, ..header });
            prop_assert_eq!(cut(&told, &merge(&segments).1.unwrap().1), segments);
        }

        #[test]
        fn nothing_in_frames_panics(
            a in proptest::collection::vec(any::<u8>(), 0..100),
            b in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let good = frame(IpVersion::V4, 0, TCP, (1, 2), &a);
            for (one, other) in [(&a, &b), (&good, &b), (&b, &good)] {
                let _ = merge(&[one.clone(), other.clone()]);
            }
        }
    }

    #[test]
    fn what_does_not_follow_stays_alone() {
        let mut large = frame(IpVersion::V4, 0, TCP, (7, 8), &[5; 300]);
        let header = offload(&mut large, TCP, 100);
        let segments = cut(&header, &large);
        assert_eq!(merge(&segments).0, 3);
        assert_eq!(merge(&[segments[0].clone(), segments[2].clone()]).0, 1, "a gap");
        assert_eq!(merge(&[segments[1].clone(), segments[0].clone()]).0, 1, "the wrong order");
        // Every single bit counts: of a header through the comparison or a checksum, of
        // the payload through the checksum.
        for bit in 0..segments[1].len() * 8 {
            let mut changed = segments[1].clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(merge(&[segments[0].clone(), changed]).0, 1, "bit {bit}");
        }
        let datagram = frame(IpVersion::V4, 0, UDP, (7, 8), &[5; 100]);
        assert!(Merge::begin(&datagram).is_none());
        let mut many = vec![segments[0].clone()];
        many.extend(std::iter::repeat_n(segments[2].clone(), 2));
        assert_eq!(merge(&many).0, 1);
    }
}
