//! Which of two kernel releases is newer.

use std::cmp::Ordering;

/// Compares as boot loaders and package managers do: digits by their value, everything else
/// by its bytes, and a `~` sorts before even the end ("6.1~rc1" is older than "6.1").
pub(super) fn compare(mut a: &str, mut b: &str) -> Ordering {
    loop {
        let (text_a, rest_a) = a.split_at(a.find(is_digit).unwrap_or(a.len()));
        let (text_b, rest_b) = b.split_at(b.find(is_digit).unwrap_or(b.len()));
        let weights = |text: &str| text.bytes().map(weight).chain([END]).collect::<Vec<_>>();
        let order = weights(text_a).cmp(&weights(text_b));
        if order != Ordering::Equal || (rest_a.is_empty() && rest_b.is_empty()) {
            return order;
        }
        let (number_a, next_a) = number(rest_a);
        let (number_b, next_b) = number(rest_b);
        // Without leading zeroes the longer one is the larger one, however long they are.
        let order = number_a.len().cmp(&number_b.len()).then(number_a.cmp(number_b));
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (next_a, next_b);
    }
}

/// What the end of a text weighs: more than a `~`, less than anything else.
const END: u16 = 1;

/// Letters come before signs.
fn weight(byte: u8) -> u16 {
    match byte {
        b'~' => 0,
        byte if byte.is_ascii_alphabetic() => u16::from(byte).saturating_add(2),
        byte => u16::from(byte).saturating_add(258),
    }
}

fn is_digit(c: char) -> bool {
    c.is_ascii_digit()
}

/// The digits at the beginning, without leading zeroes, and what follows.
fn number(text: &str) -> (&str, &str) {
    let end = text.find(|c| !is_digit(c)).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    (digits.trim_start_matches('0'), rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn newer_kernels_are_newer() {
        for pair in [
            ["6.1.0-9-amd64", "6.1.0-10-amd64"],
            ["5.10.0", "6.1.0"],
            ["6.1~rc1", "6.1"],
            ["6.1", "6.1.0"],
            ["6.1.0-10-amd64", "6.1.0-10-cloud-amd64"],
            ["6.12.9", "6.12.118+deb13"],
            ["", "1"],
            ["99999999999999999999", "100000000000000000000"],
        ] {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare("6.01", "6.1"), Ordering::Equal);
    }

    proptest! {
        /// Sorting needs a total order; a comparison that is not one may panic there.
        #[test]
        fn it_is_an_order(a in "[0-9a-b.~+-]{0,6}", b in "[0-9a-b.~+-]{0,6}", c in "[0-9a-b.~+-]{0,6}") {
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            if compare(&a, &b) != Ordering::Greater && compare(&b, &c) != Ordering::Greater {
                prop_assert_ne!(compare(&a, &c), Ordering::Greater);
            }
        }
    }
}
