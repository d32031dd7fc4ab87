//! How traps, interrupts and system calls enter a 64-bit guest.
//!
//! The frame is the CPU's own, so `iretq` returns from it. Two things are the host's: the
//! saved flags show the guest's interrupt flag, and the segments are ring 1's.

use super::layout::shared;
use crate::shared_data::{IRQ_FLAG, interrupts_enabled};

pub use crate::traps::{CLOCK_IRQ, FIRST_IRQ_VECTOR, HYPERCALL_VECTOR, pushes_error_code};

/// IRQs there are, as bits of `blocked`.
pub const IRQS: u8 = 64;
/// Vectors that never have a gate: NMI, double fault, and the hypercall's.
pub const NO_GATE: [u8; 3] = [2, 8, HYPERCALL_VECTOR];
/// The longest that a deliverable IRQ may be left undelivered, in nanoseconds, to a guest
/// that neither traps nor asks.
pub const IRQ_LATENCY_MAX: u64 = 1_000_000;

shared! {
    /// What lies at RSP when a handler begins, behind the error code where there is one.
    /// RSP was aligned to 16 before.
    Frame {
        /// Where it happened.
        rip: u64,
        /// [`KERNEL_CS`](super::entry::KERNEL_CS) or [`USER_CS`](super::entry::USER_CS).
        cs: u64,
        /// IF is the guest's.
        rflags: u64,
        /// As it was.
        rsp: u64,
        /// As it was.
        ss: u64,
    }
}

/// The virtual interrupt vector of an IRQ. `None` if there is no such IRQ.
pub const fn irq_vector(irq: u8) -> Option<u8> {
    if irq < IRQS { FIRST_IRQ_VECTOR.checked_add(irq) } else { None }
}

/// The IRQ to deliver next: the lowest that is pending and not blocked.
pub const fn next_irq(pending: u64, blocked: u64) -> Option<u8> {
    match pending & !blocked {
        0 => None,
        deliverable => Some(deliverable.trailing_zeros() as u8),
    }
}

/// RFLAGS as pushed.
pub const fn saved_flags(rflags: u64, irq_enabled: u32) -> u64 {
    let flag = IRQ_FLAG as u64;
    if interrupts_enabled(irq_enabled) { rflags | flag } else { rflags & !flag }
}

/// TF, NT, RF and AC.
const OFF_IN_HANDLERS: u64 = 1 << 8 | 1 << 14 | 1 << 16 | 1 << 18;
/// IOPL.
const IOPL: u64 = 3 << 12;
/// DF.
const DIRECTION: u64 = 1 << 10;

/// RFLAGS in a handler, from those before.
pub const fn handler_flags(rflags: u64) -> u64 {
    rflags & !(OFF_IN_HANDLERS | IOPL) | super::entry::RFLAGS
}

/// RFLAGS at the entry of `syscall`: as in a handler, and string instructions go forward.
pub const fn syscall_flags(rflags: u64) -> u64 {
    handler_flags(rflags) & !DIRECTION
}

/// Bytes below the RSP of interrupted kernel code that a frame leaves alone: the red zone of
/// the System V convention. Compilers use it, and so does Rust's core library as shipped.
pub const RED_ZONE: u64 = 128;

/// Where the words of a frame go, for a handler that begins on the stack `rsp`: what is
/// written, and the handler's RSP, which is where. `error` is pushed last. A frame of ring 1
/// lies below the [`RED_ZONE`]. `None`: the stack begins too close to address 0.
pub fn frame_on(rsp: u64, frame: &Frame, error: Option<u32>) -> Option<([u64; 6], u64)> {
    let kernel = frame.cs & 3 != 3;
    let top = rsp.checked_sub(if kernel { RED_ZONE } else { 0 })? & !15;
    let at = top.checked_sub(if error.is_some() { 48 } else { 40 })?;
    let Frame { rip, cs, rflags, rsp, ss } = *frame;
    Some((
        match error {
            Some(error) => [u64::from(error), rip, cs, rflags, rsp, ss],
            None => [rip, cs, rflags, rsp, ss, 0],
        },
        at,
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::long::layout::{assert_packed, assert_wire};

    #[test]
    fn the_frame_is_the_cpus() {
        assert_packed(Frame::FIELDS, 40);
        assert_wire::<Frame>();
    }

    #[test]
    fn irqs_have_vectors_and_the_lowest_comes_first() {
        assert_eq!(irq_vector(63), Some(0x5f));
        assert_eq!(irq_vector(64), None);
        assert_eq!(next_irq(1 << 63 | 1 << 5, 1 << 5), Some(63));
        assert_eq!(next_irq(1, 1), None);
    }

    #[test]
    fn flags_in_handlers() {
        assert_eq!(handler_flags(0x4_7d02), 0x0c02 | 0x200);
        assert_eq!(syscall_flags(0x4_7d02), 0x0a02);
        assert_eq!(saved_flags(0x246, 2), 0x046);
    }

    proptest! {
        #[test]
        fn frames_are_aligned_below_the_stack(rsp: u64, rip: u64, error: Option<u32>, user: bool) {
            let frame = Frame { rip, cs: if user { 0x2b } else { 9 }, rflags: 2, rsp, ss: 0x11 };
            if let Some((words, at)) = frame_on(rsp, &frame, error) {
                prop_assert!(at < rsp || rsp == 0);
                let gap = rsp - at - if error.is_some() { 48 } else { 40 };
                let zone = if user { 0 } else { RED_ZONE };
                prop_assert!((zone..zone + 16).contains(&gap));
                prop_assert_eq!(at % 16, if error.is_some() { 0 } else { 8 });
                prop_assert_eq!(words[usize::from(error.is_some())], rip);
            } else {
                prop_assert!(rsp < 64 + RED_ZONE);
            }
        }
    }
}
