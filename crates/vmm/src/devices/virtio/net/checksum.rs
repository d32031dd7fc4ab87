//! The Internet checksum (RFC 1071): the ones' complement sum of 16-bit words.

/// A sum under way. Words are taken as they lie in memory: the ones' complement sum does
/// not care for byte order until it is read (RFC 1071, 2 B), and four bytes at a time are
/// as good as two.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// Adds bytes, padded with zeroes to whole words: only the last piece may be odd.
    #[must_use]
    pub(super) fn bytes(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum = self.0;
        for word in words {
            sum = sum.wrapping_add(u32::from_ne_bytes(*word).into());
        }
        let mut last = [0; 4];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        // 2^32 words of 32 bits fit: more than any frame has.
        Self(sum.wrapping_add(u32::from_ne_bytes(last).into()))
    }

    /// Adds one word.
    #[must_use]
    pub(super) fn word(self, word: u16) -> Self {
        self.bytes(&word.to_be_bytes())
    }

    /// The sum itself, as a number.
    #[must_use]
    pub(super) fn fold(self) -> u16 {
        let mut sum = self.0;
        while let Some(carry) = Some(sum >> 16).filter(|carry| *carry != 0) {
            sum = (sum & 0xffff).wrapping_add(carry);
        }
        u16::from_be(sum as u16)
    }

    /// What to put into the checksum's field, when that was zero (or held other sums
    /// that belong to it).
    #[must_use]
    pub(super) fn checksum(self) -> u16 {
        !self.fold()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same word by word, for the eye.
    pub(in super::super) fn plain_sum(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            if sum > 0xffff {
                sum = sum - 0x1_0000 + 1;
            }
        }
        sum as u16
    }

    #[test]
    fn the_rfcs_own_example() {
        let sum = Sum::default().bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!((sum.fold(), sum.checksum()), (0xddf2, 0x220d));
    }

    proptest! {
        #[test]
        fn as_word_by_word(bytes in proptest::collection::vec(any::<u8>(), 0..200), word: u16) {
            let sum = Sum::default().word(word).bytes(&bytes);
            let mut all = word.to_be_bytes().to_vec();
            all.extend(&bytes);
            prop_assert_eq!(sum.fold(), plain_sum(&all));
        }
    }
}
