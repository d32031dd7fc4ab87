//! A set of interrupt vectors that several threads may change: IRR, ISR and TMR.

use std::sync::atomic::{AtomicU32, Ordering};

/// 256 bits, one per vector, in eight words as the APIC's registers show them.
#[derive(Debug, Default)]
pub struct VectorSet {
    words: [AtomicU32; 8],
}

impl VectorSet {
    fn word(&self, vector: u8) -> (&AtomicU32, u32) {
        // Three bits of the vector select one of eight words: never out of bounds.
        let [a, b, c, d, e, f, g, h] = &self.words;
        let word = match vector >> 5 {
            0 => a,
            1 => b,
            2 => c,
            3 => d,
            4 => e,
            5 => f,
            6 => g,
            _ => h,
        };
        (word, 1 << (vector & 31))
    }

    /// Adds `vector`.
    pub fn insert(&self, vector: u8) {
        let (word, bit) = self.word(vector);
        word.fetch_or(bit, Ordering::SeqCst);
    }

    /// Takes `vector` out; says whether it was in.
    pub fn remove(&self, vector: u8) -> bool {
        let (word, bit) = self.word(vector);
        word.fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }

    /// Whether `vector` is in.
    #[must_use]
    pub fn contains(&self, vector: u8) -> bool {
        let (word, bit) = self.word(vector);
        word.load(Ordering::SeqCst) & bit != 0
    }

    /// The highest vector in the set.
    #[must_use]
    pub fn highest(&self) -> Option<u8> {
        self.words.iter().zip([0_u8, 1, 2, 3, 4, 5, 6, 7]).rev().find_map(|(word, index)| {
            let word = word.load(Ordering::SeqCst);
            let bit = word.checked_ilog2()?;
            Some(index << 5 | bit as u8)
        })
    }

    /// The `index`th word, 0 to 7; zero beyond.
    #[must_use]
    pub fn show(&self, index: usize) -> u32 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::SeqCst))
    }

    /// Empties the set.
    pub fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((any::<u8>(), any::<bool>()), 0..200)) {
            let (set, mut model) = (VectorSet::default(), BTreeSet::new());
            for (vector, add) in steps {
                if add {
                    set.insert(vector);
                    model.insert(vector);
                } else {
                    prop_assert_eq!(set.remove(vector), model.remove(&vector));
                }
                prop_assert_eq!(set.contains(vector), model.contains(&vector));
                prop_assert_eq!(set.highest(), model.last().copied());
            }
        }
    }
}
