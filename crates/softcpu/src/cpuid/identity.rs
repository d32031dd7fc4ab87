//! The processor every guest sees.
//!
//! An AMD family 19h part, because the 64-bit extensions are AMD's own and so Linux takes
//! the plainest paths on it: `syscall` from 32-bit code, no microcode business, and none
//! of the Intel-only mitigations. What the real family needs guarding against is reported
//! as fixed (see [`leaves`](super::leaves)).

/// Vendor string, in the order CPUID spreads it: EBX, EDX, ECX.
pub(super) const VENDOR: [u32; 3] = [word(*b"Auth"), word(*b"enti"), word(*b"cAMD")];

/// Leaf 1 EAX: family 19h (0Fh + 0Ah), model 11h, stepping 1.
pub(super) const SIGNATURE: u32 = 0x00a1_0f11;

/// The brand string of model `name`, as leaves 8000_0002h to 8000_0004h spell it: 48
/// bytes, padded with zeros.
pub(super) fn brand(name: &str) -> [[u32; 4]; 3] {
    let mut bytes = [0_u8; 48];
    for (slot, byte) in bytes.iter_mut().zip(b"lguest x86-64-".iter().chain(name.as_bytes())) {
        *slot = *byte;
    }
    let mut words = bytes.as_chunks::<4>().0.iter().map(|chunk| u32::from_le_bytes(*chunk));
    std::array::from_fn(|_| std::array::from_fn(|_| words.next().unwrap_or(0)))
}

const fn word(text: [u8; 4]) -> u32 {
    u32::from_le_bytes(text)
}
