//! I/O ports.

use core::arch::asm;

/// Writes a byte.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: devices' registers; what they do is the caller's wish.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Reads a byte.
pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// Writes a double word.
pub(crate) fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    };
}

/// Reads a double word.
pub(crate) fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags));
    };
    value
}
