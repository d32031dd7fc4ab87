//! Which frames a table may have entries for, without looking at all of them.

use crate::memory::ram::RamFrame;

/// A set of frames that may claim too many, never too few: a bit each, by the frame's number.
#[derive(Debug)]
pub(super) struct FrameFilter {
    words: [u64; Self::WORDS],
}

impl Default for FrameFilter {
    fn default() -> Self {
        Self { words: [0; Self::WORDS] }
    }
}

impl FrameFilter {
    pub(super) const WORDS: usize = 1024;

    fn place(frame: RamFrame) -> (usize, u64) {
        ((frame.0 / 64) as usize & (Self::WORDS - 1), 1 << (frame.0 % 64))
    }

    pub(super) fn add(&mut self, frame: RamFrame) {
        let (word, bit) = Self::place(frame);
        if let Some(word) = self.words.get_mut(word) {
            *word |= bit;
        }
    }

    pub(super) fn may_have(&self, frame: RamFrame) -> bool {
        let (word, bit) = Self::place(frame);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    pub(super) fn clear(&mut self) {
        self.words.fill(0);
    }
}
