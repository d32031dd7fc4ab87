//! Rows of plain integer and floating-point code.

use std::hint::black_box;

use crate::stopwatch::{best, fastest, say};

/// Bytes hashed, words sorted, roots taken.
const HASHED: usize = 20 << 20;
const SORTED: usize = 1 << 20;
const ROOTS: u32 = 5_000_000;

/// Fowler, Noll and Vo's hash of 20 MiB, byte by byte.
pub(crate) fn fnv(name: &str) {
    let data: Vec<u8> = (0..HASHED).map(|i| (i * 7) as u8).collect();
    let hash = |data: &[u8]| {
        data.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        })
    };
    assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8);
    say(name, fastest(|| _ = black_box(hash(&data))), 1, "ms");
}

/// A shell sort of 1 Mi words.
pub(crate) fn shell_sort(name: &str) {
    say(name, best(|| shuffled(SORTED), |mut words| sort(&mut words)), 1, "ms");
}

/// Words in no order, the same each time.
pub(crate) fn shuffled(count: usize) -> Vec<u32> {
    let mut next = 1_u32;
    let word = || {
        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        next
    };
    std::iter::repeat_with(word).take(count).collect()
}

/// Sorts by insertion with gaps that are halved.
pub(crate) fn sort(words: &mut [u32]) {
    let mut gap = words.len() / 2;
    while gap > 0 {
        for i in gap..words.len() {
            let (word, mut at) = (words[i], i);
            while at >= gap && words[at - gap] > word {
                words[at] = words[at - gap];
                at -= gap;
            }
            words[at] = word;
        }
        gap /= 2;
    }
    assert!(words.is_sorted());
}

/// Square roots and divisions that wait for each other.
pub(crate) fn square_roots(name: &str) {
    let roots = || (1..ROOTS).fold(1.0, |sum, i| (sum + f64::from(i)).sqrt() / 1.0001);
    assert!(roots() > f64::from(ROOTS).sqrt() * 0.999);
    say(name, fastest(|| _ = black_box(roots())), 1, "ms");
}
