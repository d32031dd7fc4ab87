//! What a driver leaves to the device before a frame may leave: the checksum, and the
//! cutting of one large TCP segment into many (virtio 1.2, 5.1.6.2).
//!
//! A tap device hands both to the host's kernel. A socket carries bare frames, so they
//! are done here. One large frame costs the guest's slow CPU about as much as a small
//! one; cutting it up costs the host next to nothing.

use super::checksum::Sum;
use super::header::{GSO_NONE, GSO_TCPV4, GSO_TCPV6, Header, NEEDS_CSUM};
use super::packet::{IpVersion, network_layer, set_word, word};

/// The least payload of a segment. Linux sends none below 48 bytes
/// (`net.ipv4.tcp_min_snd_mss`); less would let a guest make one frame into thousands.
const LEAST_PAYLOAD: u16 = 48;

const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// The frame's header asks for what its bytes do not allow: the frame is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SegmentError {
    #[error("the checksum would lie outside of the frame")]
    Checksum,
    #[error("to be cut into segments, but not a TCP segment of that IP version")]
    NotTcp,
    #[error("segments of less than {LEAST_PAYLOAD} bytes")]
    TooSmall,
}

/// Fills in the checksum that `header` asks for, if it does.
pub(super) fn fill_checksum(header: &Header, frame: &mut [u8]) -> Result<(), SegmentError> {
    if header.flags & NEEDS_CSUM == 0 {
        return Ok(());
    }
    let start = usize::from(header.csum_start.get());
    // The driver has put the pseudo header's sum into the field.
    let part = frame.get_mut(start..).ok_or(SegmentError::Checksum)?;
    let checksum = Sum::default().bytes(part).checksum();
    // Zero means "none" to UDP, and the same as its complement to everyone.
    let checksum = if checksum == 0 { 0xffff } else { checksum };
    set_word(part, header.csum_offset.get().into(), checksum).ok_or(SegmentError::Checksum)
}

/// A frame to be cut, looked through.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segments<'f> {
    headers: &'f [u8],
    payload: &'f [u8],
    version: IpVersion,
    /// Where IP begins.
    l3: usize,
    /// Where TCP begins.
    l4: usize,
    /// Payload bytes of each segment but the last.
    size: usize,
}

impl<'f> Segments<'f> {
    /// `None`: the header does not ask for it.
    ///
    /// # Errors
    /// [`SegmentError`]: what it asks for cannot be done.
    pub(super) fn new(header: &Header, frame: &'f [u8]) -> Result<Option<Self>, SegmentError> {
        let wanted = match header.gso() {
            GSO_NONE => return Ok(None),
            GSO_TCPV4 => IpVersion::V4,
            GSO_TCPV6 => IpVersion::V6,
            _ => return Err(SegmentError::NotTcp),
        };
        let size = header.gso_size.get();
        if size < LEAST_PAYLOAD {
            return Err(SegmentError::TooSmall);
        }
        if header.flags & NEEDS_CSUM == 0 {
            return Err(SegmentError::Checksum);
        }
        let l4 = header.csum_start.get().into();
        Self::look(frame, wanted, l4, size.into()).map(Some).ok_or(SegmentError::NotTcp)
    }

    fn look(frame: &'f [u8], wanted: IpVersion, l4: usize, size: usize) -> Option<Self> {
        let (l3, version) = network_layer(frame)?;
        let l3_len = l4.checked_sub(l3)?;
        let fits = match version {
            IpVersion::V4 => {
                let said = usize::from(frame.get(l3)? & 15).checked_mul(4)?;
                l3_len >= 20 && l3_len == said && *frame.get(l3.checked_add(9)?)? == 6
            }
            IpVersion::V6 => l3_len >= 40,
        };
        let data_offset = *frame.get(l4.checked_add(12)?)? >> 4;
        let tcp_len = usize::from(data_offset).checked_mul(4)?;
        let (headers, payload) = frame.split_at_checked(l4.checked_add(tcp_len)?)?;
        let all = fits && version == wanted && tcp_len >= 20;
        all.then_some(Self { headers, payload, version, l3, l4, size })
    }

    /// Hands out each segment as a frame in `buffer`'s tail, which `begin` and `end`
    /// (called before and after) may frame further.
    ///
    /// # Errors
    /// [`SegmentError`]: the headers do not hold what they must.
    pub(super) fn write(
        &self,
        buffer: &mut Vec<u8>,
        mut begin: impl FnMut(&mut Vec<u8>, usize),
    ) -> Result<(), SegmentError> {
        let mut offset = 0_usize;
        let mut index = 0_u16;
        // At least one, though it may carry nothing.
        while let Some(rest) = self.payload.get(offset..) {
            let (chunk, more) = match rest.split_at_checked(self.size) {
                Some((chunk, more)) => (chunk, !more.is_empty()),
                None => (rest, false),
            };
            begin(buffer, self.headers.len().saturating_add(chunk.len()));
            let at = buffer.len();
            buffer.extend_from_slice(self.headers);
            buffer.extend_from_slice(chunk);
            let frame = buffer.get_mut(at..).unwrap_or_default();
            self.adjust(frame, index, offset, !more).ok_or(SegmentError::NotTcp)?;
            if !more {
                break;
            }
            offset = offset.saturating_add(chunk.len());
            index = index.wrapping_add(1);
        }
        Ok(())
    }

    /// Makes copied headers those of segment number `index`, whose payload begins at
    /// `offset` of the whole.
    fn adjust(&self, frame: &mut [u8], index: u16, offset: usize, last: bool) -> Option<()> {
        let (lower, tcp) = frame.split_at_mut_checked(self.l4)?;
        let ip = lower.get_mut(self.l3..)?;
        let ip_len = ip.len().checked_add(tcp.len())?;
        match self.version {
            IpVersion::V4 => {
                set_word(ip, 2, u16::try_from(ip_len).ok()?)?;
                let id = word(ip, 4)?.wrapping_add(index);
                set_word(ip, 4, id)?;
                set_word(ip, 10, 0)?;
                let checksum = Sum::default().bytes(ip).checksum();
                set_word(ip, 10, checksum)?;
            }
            IpVersion::V6 => set_word(ip, 4, u16::try_from(ip_len.checked_sub(40)?).ok()?)?,
        }
        let sequence = tcp.get_mut(TCP_SEQUENCE..)?.first_chunk_mut::<4>()?;
        *sequence = u32::from_be_bytes(*sequence).wrapping_add(offset as u32).to_be_bytes();
        let flags = tcp.get_mut(TCP_FLAGS)?;
        if !last {
            *flags &= !(FIN | PSH);
        }
        if index != 0 {
            *flags &= !CWR;
        }
        // The driver has put the pseudo header's sum into the field, over the length of
        // the whole. Taking that out and ours in leaves addresses and protocol, which an
        // IPv6 routing header may have made others than those in front (RFC 8200, 8.1).
        let whole = self.headers.len().checked_sub(self.l4)?.checked_add(self.payload.len())?;
        let (whole, ours) = (u16::try_from(whole).ok()?, u16::try_from(tcp.len()).ok()?);
        let pseudo = Sum::default().word(word(tcp, TCP_CHECKSUM)?).word(!whole).word(ours);
        set_word(tcp, TCP_CHECKSUM, pseudo.fold())?;
        let checksum = Sum::default().bytes(tcp).checksum();
        set_word(tcp, TCP_CHECKSUM, checksum)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::checksum::tests::plain_sum;
    use super::super::packet::tests::{any_version, checksum_offset, frame, pseudo_header};
    use super::super::packet::{TCP, Transport, UDP};
    use super::*;
    use proptest::prelude::*;

    /// The frame as a driver hands it over: the pseudo header's sum where the checksum
    /// goes, and a header that asks for it (and, with `gso_size`, for segments).
    pub(in super::super) fn offload(frame: &mut [u8], protocol: u8, gso_size: u16) -> Header {
        let (l3, version) = network_layer(frame).unwrap();
        let l4 = l3 + if version == IpVersion::V4 { 20 } else { 40 };
        let len = (frame.len() - l4) as u16;
        let sum = plain_sum(&pseudo_header(&frame[l3..], protocol, len));
        let offset = checksum_offset(protocol);
        set_word(frame, l4 + offset, sum).unwrap();
        let gso = if version == IpVersion::V4 { GSO_TCPV4 } else { GSO_TCPV6 };
        Header {
            flags: NEEDS_CSUM,
            gso_type: if gso_size == 0 { GSO_NONE } else { gso },
            gso_size: gso_size.into(),
            csum_start: (l4 as u16).into(),
            csum_offset: (offset as u16).into(),
            ..Header::default()
        }
    }

    fn cut(header: &Header, frame: &[u8]) -> Result<Vec<Vec<u8>>, SegmentError> {
        let (mut buffer, mut starts) = (Vec::new(), Vec::new());
        let segments = Segments::new(header, frame)?.unwrap();
        segments.write(&mut buffer, |buffer, len| starts.push((buffer.len(), len)))?;
        Ok(starts.into_iter().map(|(at, len)| buffer[at..at + len].to_vec()).collect())
    }

    proptest! {
        #[test]
        fn a_checksum_filled_in_is_the_one_it_had(
            version in any_version(),
            vlans in 0..3_usize,
            protocol in prop_oneof![Just(TCP), Just(UDP)],
            payload in proptest::collection::vec(any::<u8>(), 0..3000),
        ) {
            let original = frame(version, vlans, protocol, (5, 6), &payload);
            let mut given = original.clone();
            let header = offload(&mut given, protocol, 0);
            fill_checksum(&header, &mut given).unwrap();
            prop_assert_eq!(given, original);
        }

        #[test]
        fn segments_put_together_are_the_original(
            version in any_version(),
            vlans in 0..3_usize,
            flags: u8,
            payload in proptest::collection::vec(any::<u8>(), 0..20_000),
            size in LEAST_PAYLOAD..3000,
        ) {
            let mut original = frame(version, vlans, TCP, (7, 8), &payload);
            let headers = original.len() - payload.len();
            let tcp = headers - 32;
            original[tcp + TCP_FLAGS] = flags;
            let header = offload(&mut original, TCP, size);
            let segments = cut(&header, &original).unwrap();
            prop_assert_eq!(segments.len(), payload.len().div_ceil(size.into()).max(1));
            let mut whole: Vec<u8> = Vec::new();
            for (n, segment) in segments.iter().enumerate() {
                // Lengths, addresses and both checksums, as a receiver sees them.
                prop_assert!(Transport::find(segment).unwrap().checksum_is_good());
                let (l3, _) = network_layer(segment).unwrap();
                if version == IpVersion::V4 {
                    prop_assert_eq!(plain_sum(&segment[l3..l3 + 20]), 0xffff);
                    prop_assert_eq!(word(segment, l3 + 4), Some(0x1234 + n as u16));
                    prop_assert_eq!(word(segment, l3 + 2).unwrap() as usize, segment.len() - l3);
                } else {
                    prop_assert_eq!(word(segment, l3 + 4).unwrap() as usize, segment.len() - l3 - 40);
                }
                let sequence = u32::from_be_bytes(segment[tcp + 4..tcp + 8].try_into().unwrap());
                prop_assert_eq!(sequence as usize, 0x100 + whole.len());
                let mut expected = flags;
                if n + 1 < segments.len() { expected &= !(FIN | PSH); }
                if n > 0 { expected &= !CWR; }
                prop_assert_eq!(segment[tcp + TCP_FLAGS], expected);
                prop_assert_eq!(&segment[..l3], &original[..l3]);
                prop_assert_eq!(&segment[tcp + 18..headers], &original[tcp + 18..headers]);
                whole.extend(&segment[headers..]);
            }
            prop_assert_eq!(whole, payload);
        }

        #[test]
        fn no_header_panics_or_swells(
            flags: u8, gso_type in 0..6_u8, gso_size: u16, start in 0..200_u16, offset: u16,
            mut bytes in proptest::collection::vec(any::<u8>(), 0..2000),
            version in any_version(), mangle: bool,
        ) {
            if !mangle {
                bytes = frame(version, 0, TCP, (1, 2), &bytes);
            }
            let header = Header {
                flags, gso_type, gso_size: gso_size.into(), csum_start: start.into(),
                csum_offset: offset.into(), ..Header::default()
            };
            let _ = fill_checksum(&header, &mut bytes);
            if let Ok(Some(segments)) = Segments::new(&header, &bytes) {
                let mut buffer = Vec::new();
                let _ = segments.write(&mut buffer, |_, _| ());
                prop_assert!(buffer.len() <= bytes.len() * 8);
            }
        }
    }

    #[test]
    fn what_cannot_be_cut_is_said() {
        let mut bytes = frame(IpVersion::V4, 0, TCP, (1, 2), &[1; 500]);
        let good = offload(&mut bytes, TCP, 100);
        assert_eq!(
            cut(&Header { gso_size: 47.into(), ..good }, &bytes),
            Err(SegmentError::TooSmall)
        );
        assert_eq!(cut(&Header { gso_type: GSO_TCPV6, ..good }, &bytes), Err(SegmentError::NotTcp));
        assert_eq!(cut(&Header { flags: 0, ..good }, &bytes), Err(SegmentError::Checksum));
        assert_eq!(
            cut(&Header { csum_start: 35.into(), ..good }, &bytes),
            Err(SegmentError::NotTcp)
        );
        assert_eq!(cut(&good, &bytes[..50]), Err(SegmentError::NotTcp));
        let past = Header { csum_start: 0xffff.into(), ..good };
        assert_eq!(fill_checksum(&past, &mut bytes), Err(SegmentError::Checksum));
    }
}
