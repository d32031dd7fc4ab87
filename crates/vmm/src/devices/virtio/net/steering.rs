//! Which queue pair a received frame belongs to: the one its flow was last sent from
//! (automatic receive steering; virtio 1.2, 5.1.6.5.6).

use super::packet::Transport;

/// Flows remembered. Two that share a place are steered alike, which costs nothing but
/// a little evenness.
const PLACES: usize = 1024;

/// Remembers each flow's pair.
#[derive(Debug)]
pub(super) struct Steering {
    pairs: Box<[u8; PLACES]>,
}

impl Steering {
    pub(super) fn new() -> Self {
        Self { pairs: Box::new([0; PLACES]) }
    }

    fn place(frame: &[u8]) -> Option<usize> {
        (Transport::find(frame)?.flow() as usize).checked_rem(PLACES)
    }

    /// `frame` was sent from that pair.
    pub(super) fn sent(&mut self, frame: &[u8], pair: u8) {
        if let Some(slot) = Self::place(frame).and_then(|place| self.pairs.get_mut(place)) {
            *slot = pair;
        }
    }

    /// Where `frame` goes, of the first `active` pairs.
    pub(super) fn pair_for(&self, frame: &[u8], active: u16) -> usize {
        if active < 2 {
            return 0;
        }
        let pair = Self::place(frame).and_then(|place| self.pairs.get(place)).copied();
        pair.filter(|pair| u16::from(*pair) < active).unwrap_or(0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::tests::frame;
    use super::super::packet::{IpVersion, TCP};
    use super::*;

    #[test]
    fn answers_go_where_the_question_came_from() {
        let mut steering = Steering::new();
        let there = frame(IpVersion::V6, 0, TCP, (1000, 80), b"?");
        let back = frame(IpVersion::V6, 0, TCP, (80, 1000), b"!");
        assert_eq!(steering.pair_for(&back, 4), 0);
        steering.sent(&there, 3);
        assert_eq!(steering.pair_for(&back, 4), 3);
        assert_eq!(steering.pair_for(&back, 2), 0, "a pair that is switched off");
        assert_eq!(steering.pair_for(b"", 4), 0);
    }
}
