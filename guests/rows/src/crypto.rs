//! Rows of cryptography, by RustCrypto, which asks CPUID for instructions made for it.

use std::hint::black_box;

use aes::Aes128;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use sha2::{Digest, Sha256};

use crate::stopwatch::{chose, fastest, say};

/// A buffer that stays in the caches, and how often it is gone through.
const BUFFER: usize = 1 << 20;
const PASSES: usize = 64;

/// AES-128 in counter mode.
pub(crate) fn aes(name: &str) {
    chose(name, if is_x86_feature_detected!("aes") { "AES-NI" } else { "software" });
    // NIST SP 800-38A, F.5.1: CTR-AES128.Encrypt, its first block.
    let key = 0x2b7e_1516_28ae_d2a6_abf7_1588_09cf_4f3c_u128.to_be_bytes();
    let counter = 0xf0f1_f2f3_f4f5_f6f7_f8f9_fafb_fcfd_feff_u128.to_be_bytes();
    let cipher = || Ctr128BE::<Aes128>::new(&key.into(), &counter.into());
    let mut block = 0x6bc1_bee2_2e40_9f96_e93d_7e11_7393_172a_u128.to_be_bytes();
    cipher().apply_keystream(&mut block);
    assert_eq!(u128::from_be_bytes(block), 0x874d_6191_b620_e326_1bef_6864_990d_b6ce);

    let mut buffer = vec![0; BUFFER];
    let passes = || {
        let mut cipher = cipher();
        for _ in 0..PASSES {
            cipher.apply_keystream(black_box(&mut buffer));
        }
    };
    say(name, fastest(passes), 1, "ms");
}

/// SHA-256.
pub(crate) fn sha(name: &str) {
    chose(name, if is_x86_feature_detected!("sha") { "SHA-NI" } else { "software" });
    // FIPS 180-2, B.1: "abc".
    assert_eq!(Sha256::digest(b"abc")[..4], 0xba78_16bf_u32.to_be_bytes());
    let buffer = vec![7; BUFFER];
    let passes = || {
        let mut hash = Sha256::new();
        for _ in 0..PASSES {
            hash.update(black_box(&buffer));
        }
        _ = black_box(hash.finalize());
    };
    say(name, fastest(passes), 1, "ms");
}
