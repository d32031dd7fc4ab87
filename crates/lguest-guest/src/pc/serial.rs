//! COM1, by polling.

use super::ports::{in8, out8};

const DATA: u16 = 0x3f8;
const INTERRUPTS: u16 = DATA + 1;
const FIFO: u16 = DATA + 2;
const LINE: u16 = DATA + 3;
const STATUS: u16 = DATA + 5;
/// Status: a byte is there; room for one.
const READY: u8 = 1;
const EMPTY: u8 = 0x20;

pub(crate) fn start() {
    out8(INTERRUPTS, 0);
    // Eight bits, no parity; FIFO on.
    out8(LINE, 3);
    out8(FIFO, 7);
}

pub(crate) fn put(byte: u8) {
    while in8(STATUS) & EMPTY == 0 {
        core::hint::spin_loop();
    }
    out8(DATA, byte);
}

pub(crate) fn get() -> Option<u8> {
    (in8(STATUS) & READY != 0).then(|| in8(DATA))
}
