//! Frames on a stream socket: each behind its length, 32 bits, big-endian, as passt and
//! QEMU's `-netdev stream` have it.
//!
//! The socket's other end is not trusted: a length that no frame has means that the
//! stream is out of step, and it is given up. Bare frames carry no header, so
//! checksums and segments that the guest leaves to its card are made here; and what comes
//! in is checked here, natively, to spare the guest doing it on a slow CPU.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::super::feature;
use super::super::header::{DATA_VALID, Header};
use super::super::merge::Merge;
use super::super::packet::Transport;
use super::super::segment::{Segments, fill_checksum};
use super::{Incoming, MAX_FRAME};

/// Bytes of the length in front of a frame.
const PREFIX: usize = 4;
/// Bytes read at once: many small frames, or a few of the largest.
const INPUT: usize = 256 << 10;
/// Bytes of whole frames written at once. The kernel keeps so much in one piece, or takes
/// none of it: passt loses its step if a length, or a frame that it has the beginning of,
/// comes in several. A longer frame goes alone, in two pieces at most, which it can take.
const PIECE: usize = 32 << 10;

/// Bytes waiting to go out, from which on nothing more is taken from the guest. One frame
/// (cut into segments, five times [`MAX_FRAME`] at the very most) may come on top.
const OUTPUT: usize = 128 << 10;

/// What the work done here allows the driver to leave to its card.
pub(in super::super) const FEATURES: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6;

/// One connection. What is half read or half written stays here when the device is reset:
/// the next driver finds the stream in step.
#[derive(Debug)]
pub(in super::super) struct FrameStream {
    socket: UnixStream,
    readable: bool,
    writable: bool,
    lost: bool,
    /// Frames received.
    pub frames_in: u64,
    input: Box<[u8]>,
    /// Where in `input` the unread bytes are.
    start: usize,
    end: usize,
    output: Vec<u8>,
    /// How much of `output` is gone.
    sent: usize,
    /// Where in `output` the frames end that are on their way out.
    piece: usize,
    /// Where a frame is gathered that is to be cut.
    whole: Vec<u8>,
    /// The driver understands [`DATA_VALID`].
    tell_valid: bool,
    /// The driver takes large segments.
    merge: bool,
    /// Segments put together.
    merged: Vec<u8>,
    /// How much of `input` the frame took that was given last.
    given: usize,
}

impl FrameStream {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// The socket will not be non-blocking.
    pub(in super::super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            readable: true,
            writable: true,
            lost: false,
            frames_in: 0,
            input: vec![0; INPUT].into_boxed_slice(),
            start: 0,
            end: 0,
            output: Vec::new(),
            sent: 0,
            piece: 0,
            whole: Vec::new(),
            tell_valid: false,
            merge: false,
            merged: Vec::new(),
            given: 0,
        })
    }

    pub(in super::super) const fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether the other end has gone away, or out of step.
    pub(in super::super) const fn is_lost(&self) -> bool {
        self.lost
    }

    pub(in super::super) const fn start(&mut self, features: u64) {
        self.tell_valid = features & feature::GUEST_CSUM != 0;
        let all = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6;
        self.merge = features & all == all;
    }

    /// Events come anew when a descriptor is registered again.
    pub(in super::super) const fn assume_ready(&mut self) {
        self.readable = true;
        self.writable = true;
    }

    pub(in super::super) fn event(&mut self, set: EventSet) {
        let broken = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.readable |= broken || set.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.writable |= broken || set.contains(EventSet::OUT);
    }

    /// Gives the stream up if its other end has been closed, whatever is left to read.
    pub(in super::super) fn check_other_end(&mut self) {
        let mut polled = [PollFd::new(&self.socket, PollFlags::empty())];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let hung_up = rustix::event::poll(&mut polled, Some(&at_once)).is_ok()
            && polled.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR));
        if hung_up {
            self.lose("the other end has closed it, and another peer is there");
        }
    }

    fn lose(&mut self, why: impl std::fmt::Display) {
        if !self.lost {
            self.lost = true;
            tracing::debug!(%why, "net: a stream of frames ends");
        }
        self.output.clear();
        self.sent = 0;
        self.piece = 0;
    }

    /// The length of the frame at `at` of `input`, if its prefix is there.
    fn len_at(&self, at: usize) -> Option<usize> {
        let prefix = self.input.get(at..self.end)?.first_chunk()?;
        usize::try_from(u32::from_be_bytes(*prefix)).ok()
    }

    /// The frame at `at` of `input`, if all of it is there.
    fn frame_at(&self, at: usize) -> Option<&[u8]> {
        let rest = self.input.get(at..self.end)?.get(PREFIX..)?;
        rest.get(..self.len_at(at)?)
    }

    /// Puts the segments that `input` begins with together, if there are several; and
    /// where the input goes on behind them.
    fn put_together(&mut self) -> Option<(Header, usize)> {
        let mut merged = std::mem::take(&mut self.merged);
        let (header, at) = self.gather(&mut merged).unzip();
        self.merged = merged;
        Some((header?, at?))
    }

    fn gather(&self, merged: &mut Vec<u8>) -> Option<(Header, usize)> {
        let first = self.frame_at(self.start)?;
        let mut at = self.start.checked_add(PREFIX)?.checked_add(first.len())?;
        let mut merge = self.frame_at(at).and_then(|_| Merge::begin(first))?;
        while let Some(frame) = self.frame_at(at)
            && merge.add(frame, merged)
        {
            at = at.checked_add(PREFIX)?.checked_add(frame.len())?;
        }
        Some((merge.finish(merged)?, at))
    }

    pub(in super::super) fn peek(&mut self) -> Option<Incoming<'_>> {
        let (from, to) = loop {
            if self.lost {
                return None;
            }
            if let Some(len) = self.len_at(self.start) {
                if len > MAX_FRAME {
                    self.lose(format_args!("a frame of {len} bytes"));
                    return None;
                }
                let from = self.start.checked_add(PREFIX)?;
                let to = from.checked_add(len)?;
                if to <= self.end {
                    break (from, to);
                }
            }
            if !self.read_more() {
                return None;
            }
        };
        self.given = to.saturating_sub(self.start);
        if self.merge
            && let Some((header, end)) = self.put_together()
        {
            self.given = end.saturating_sub(self.start);
            return Some(Incoming { header, frame: &self.merged });
        }
        let frame = self.input.get(from..to)?;
        let valid = self.tell_valid
            && Transport::find(frame).is_some_and(|transport| transport.checksum_is_good());
        let header = Header { flags: if valid { DATA_VALID } else { 0 }, ..Header::default() };
        Some(Incoming { header, frame })
    }

    pub(in super::super) fn consume(&mut self) {
        self.start = self.start.saturating_add(std::mem::take(&mut self.given)).min(self.end);
        self.frames_in = self.frames_in.saturating_add(1);
    }

    /// Reads what fits; `false`: nothing more for now.
    fn read_more(&mut self) -> bool {
        if !self.readable {
            return false;
        }
        if self.start != 0 {
            self.input.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        loop {
            let room = self.input.get_mut(self.end..).unwrap_or_default();
            match (&self.socket).read(room) {
                Ok(0) => self.lose("the other end has closed it"),
                Ok(len) => {
                    self.end = self.end.saturating_add(len);
                    return true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) => self.lose(error),
            }
            return false;
        }
    }

    /// Whether there is room for a frame. For one that is lost anyway there is.
    pub(in super::super) fn can_send(&mut self) -> bool {
        if self.pending() >= OUTPUT {
            self.flush();
        }
        self.lost || self.pending() < OUTPUT
    }

    const fn pending(&self) -> usize {
        self.output.len().saturating_sub(self.sent)
    }

    pub(in super::super) fn send(
        &mut self,
        header: &Header,
        frame: &mut dyn Read,
        len: usize,
    ) -> &[u8] {
        if self.lost {
            return &[];
        }
        let at = self.output.len();
        if let Err(error) = self.append(header, frame, len) {
            // Of a frame that makes no sense nothing leaves.
            self.output.truncate(at);
            tracing::debug!(%error, "net: a frame of the guest's is dropped");
        }
        self.output.get(at.saturating_add(PREFIX)..).unwrap_or_default()
    }

    fn append(&mut self, header: &Header, frame: &mut dyn Read, len: usize) -> io::Result<()> {
        if header.gso() == 0 {
            prefix(&mut self.output, len);
            let at = self.output.len();
            self.output.resize(at.saturating_add(len), 0);
            let bytes = self.output.get_mut(at..).unwrap_or_default();
            frame.read_exact(bytes)?;
            return fill_checksum(header, bytes).map_err(io::Error::other);
        }
        self.whole.resize(len, 0);
        frame.read_exact(&mut self.whole)?;
        match Segments::new(header, &self.whole).map_err(io::Error::other)? {
            Some(segments) => segments.write(&mut self.output, prefix).map_err(io::Error::other),
            None => Ok(()),
        }
    }

    pub(in super::super) fn flush(&mut self) {
        while self.writable && !self.lost && self.pending() > 0 {
            if self.sent >= self.piece {
                self.piece = self.next_piece();
            }
            let rest = self.output.get(self.sent..self.piece).unwrap_or_default();
            // A closed peer is an error here and no signal: Rust's runtime ignores SIGPIPE.
            match (&self.socket).write(rest) {
                Ok(len) => self.sent = self.sent.saturating_add(len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) => self.lose(error),
            }
        }
        // What is gone makes room, but not by moving much for little.
        if self.sent >= self.pending() {
            self.output.drain(..self.sent.min(self.output.len()));
            self.piece = self.piece.saturating_sub(self.sent);
            self.sent = 0;
        }
    }

    /// Where the frames end that are written next.
    fn next_piece(&self) -> usize {
        let mut end = self.sent;
        while let Some(len) = self.output.get(end..).and_then(<[u8]>::first_chunk) {
            let frame = usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX);
            let next = end.saturating_add(PREFIX).saturating_add(frame);
            if end > self.sent && next.saturating_sub(self.sent) > PIECE {
                break;
            }
            end = next;
        }
        end.min(self.output.len())
    }
}

fn prefix(output: &mut Vec<u8>, len: usize) {
    // MAX_FRAME fits.
    output.extend_from_slice(&(len as u32).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (FrameStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (FrameStream::new(ours).unwrap(), theirs)
    }

    fn frames(stream: &mut FrameStream) -> Vec<Vec<u8>> {
        stream.assume_ready();
        let mut all = Vec::new();
        while let Some(incoming) = stream.peek() {
            all.push(incoming.frame.to_vec());
            stream.consume();
        }
        all
    }

    #[test]
    fn frames_come_out_whole_however_they_were_cut() {
        let (mut stream, mut peer) = pair();
        let mut bytes = Vec::new();
        for len in [0_u32, 1, 60, 1514] {
            bytes.extend(len.to_be_bytes());
            bytes.extend(vec![len as u8; len as usize]);
        }
        let mut lens = Vec::new();
        for chunk in bytes.chunks(7) {
            peer.write_all(chunk).unwrap();
            lens.extend(frames(&mut stream).iter().map(Vec::len));
        }
        assert_eq!((lens, stream.is_lost()), (vec![0, 1, 60, 1514], false));
        peer.write_all(&[0, 0]).unwrap();
        drop(peer);
        assert!(frames(&mut stream).is_empty() && stream.is_lost());
    }

    #[test]
    fn the_largest_frames_pass_and_larger_ones_end_the_stream() {
        let (mut stream, mut peer) = pair();
        let feeder = std::thread::spawn(move || {
            for _ in 0..20 {
                peer.write_all(&(MAX_FRAME as u32).to_be_bytes()).unwrap();
                peer.write_all(&vec![9; MAX_FRAME]).unwrap();
            }
            peer.write_all(&(MAX_FRAME as u32 + 1).to_be_bytes()).unwrap();
            peer
        });
        let mut seen = 0;
        while !stream.is_lost() {
            seen += frames(&mut stream).len();
        }
        assert_eq!((seen, stream.frames_in), (20, 20));
        drop(feeder.join().unwrap());
    }

    #[test]
    fn what_the_socket_does_not_take_waits_within_bounds() {
        let (mut stream, mut peer) = pair();
        let frame = vec![5; 9000];
        let mut sent = 0;
        while stream.can_send() {
            stream.send(&Header::default(), &mut &frame[..], frame.len());
            sent += 1;
        }
        stream.flush();
        assert!(!stream.can_send() && stream.output.len() <= 3 * OUTPUT);
        let reader = std::thread::spawn(move || {
            let mut got = 0;
            let mut bytes = vec![0; 9004];
            while peer.read_exact(&mut bytes).is_ok() {
                assert_eq!(bytes[..5], [0, 0, 0x23, 0x28, 5]);
                got += 1;
            }
            got
        });
        while stream.pending() > 0 {
            stream.assume_ready();
            stream.flush();
        }
        drop(stream);
        assert_eq!(reader.join().unwrap(), sent);
    }

    /// Reads as passt does: whatever is there, then once what is missing of the last frame.
    #[test]
    fn a_reader_that_waits_only_once_stays_in_step() {
        let (mut stream, mut peer) = pair();
        let lens = [60, 65_000, 1514, 30_000, 2000, 20_000, 64_000, 1, 40_000, 16_381, 16_381];
        let reader = std::thread::spawn(move || {
            // Behind what one read may fill there is room for the rest of its last frame.
            const FILL: usize = 1 << 20;
            let (mut buffer, mut seen) = (vec![0; FILL + (1 << 16)], Vec::new());
            loop {
                let mut got = peer.read(&mut buffer[..FILL]).unwrap();
                if got == 0 {
                    return seen;
                }
                let mut at = 0;
                while at < got {
                    assert!(got - at > PREFIX, "a length in pieces");
                    let len = u32::from_be_bytes(*buffer[at..].first_chunk().unwrap()) as usize;
                    at += PREFIX;
                    if at + len > got {
                        got += peer.read(&mut buffer[got..at + len]).unwrap();
                        assert_eq!(got, at + len, "a frame in many pieces");
                    }
                    seen.push(len);
                    at += len;
                }
            }
        });
        let mut sent = Vec::new();
        for len in lens.iter().cycle().take(4000) {
            while !stream.can_send() {
                stream.assume_ready();
                stream.flush();
            }
            stream.send(&Header::default(), &mut &vec![7; *len][..], *len);
            sent.push(*len);
        }
        while stream.pending() > 0 {
            stream.assume_ready();
            stream.flush();
        }
        drop(stream);
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[test]
    fn a_frame_that_makes_no_sense_leaves_nothing_behind() {
        let (mut stream, _peer) = pair();
        let senseless = Header { flags: 1, csum_start: 99.into(), ..Header::default() };
        assert!(stream.send(&senseless, &mut &[0; 60][..], 60).is_empty());
        let senseless = Header { gso_type: 1, flags: 1, gso_size: 100.into(), ..Header::default() };
        assert!(stream.send(&senseless, &mut &[0; 60][..], 60).is_empty());
        assert!(stream.send(&Header::default(), &mut &[0; 10][..], 60).is_empty());
        assert_eq!(stream.pending(), 0);
    }
}
