//! How traps and interrupts reach a 32-bit guest.
//!
//! The host builds the frame that the CPU would have: on the stack of SET_STACK when it
//! interrupts user mode, else on the current one. It differs in the saved flags, which show
//! the interrupt flag that the guest believes in.

use crate::shared_data::{IRQ_FLAG, interrupts_enabled};

/// The vector of `int` that is a hypercall. Its gate has privilege 1: a user gets #GP.
pub const HYPERCALL_VECTOR: u8 = 0x1f;
/// Vector of IRQ 0; the others follow.
pub const FIRST_IRQ_VECTOR: u8 = 0x20;
/// The clock event's IRQ.
pub const CLOCK_IRQ: u8 = 0;
/// First IRQ of a device.
pub const FIRST_DEVICE_IRQ: u8 = 1;
/// IRQs there are, as bits of `blocked_interrupts`.
pub const IRQS: u8 = 32;
/// Most pages that SET_STACK names.
pub const STACK_PAGES_MAX: u32 = 2;

/// The virtual interrupt vector of an IRQ. `None` if there is no such IRQ.
pub const fn irq_vector(irq: u8) -> Option<u8> {
    if irq < IRQS { FIRST_IRQ_VECTOR.checked_add(irq) } else { None }
}

/// Whether the CPU pushes an error code for this exception.
pub const fn pushes_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// EFLAGS as pushed: IF is the guest's own, from `irq_enabled`.
pub const fn saved_flags(eflags: u32, irq_enabled: u32) -> u32 {
    if interrupts_enabled(irq_enabled) { eflags | IRQ_FLAG } else { eflags & !IRQ_FLAG }
}

/// TF, NT, RF and VM: off in a handler.
const OFF_IN_HANDLERS: u32 = 1 << 8 | 1 << 14 | 1 << 16 | 1 << 17;

/// EFLAGS in the handler, from those before: the CPU's own IF stays on.
pub const fn handler_flags(eflags: u32) -> u32 {
    eflags & !OFF_IN_HANDLERS | IRQ_FLAG
}

/// The IRQ to deliver next: the lowest that is pending and not blocked.
pub const fn next_irq(pending: u32, blocked: u32) -> Option<u8> {
    match pending & !blocked {
        0 => None,
        deliverable => Some(deliverable.trailing_zeros() as u8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_flags_show_the_guests_own_interrupt_flag() {
        assert_eq!(saved_flags(0x246, 0), 0x046);
        assert_eq!(saved_flags(0x246, 0x002), 0x046);
        assert_eq!(saved_flags(0x046, 0x200), 0x246);
    }

    #[test]
    fn handlers_run_without_single_step_and_with_the_real_flag_on() {
        assert_eq!(handler_flags(0x0003_4746), 0x0000_0646);
        assert_eq!(handler_flags(0x0000_0002), 0x0000_0202);
    }

    #[test]
    fn error_codes_come_with_the_vectors_of_the_reference() {
        let with: Vec<u8> = (0..=255).filter(|&v| pushes_error_code(v)).collect();
        assert_eq!(with, [8, 10, 11, 12, 13, 14, 17]);
    }

    #[test]
    fn irqs_are_numbered_and_masked() {
        assert_eq!(irq_vector(0), Some(0x20));
        assert_eq!(irq_vector(31), Some(0x3f));
        assert_eq!(irq_vector(32), None);
        assert_eq!(next_irq(0b1100, 0b0100), Some(3));
        assert_eq!(next_irq(0b1100, 0b1101), None);
    }
}
