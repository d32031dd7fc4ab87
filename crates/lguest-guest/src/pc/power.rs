//! The ends of a PC as lguest makes them: ACPI's registers for off and reset, and the ports
//! of QEMU's test devices. A kernel for real hardware would look for the former in ACPI's
//! tables.

use super::ports::out8;
use crate::hypercall::ShutdownReason;

/// ACPI's sleep control register, and "off" in it.
const SLEEP_CONTROL: u16 = 0x600;
const OFF: u8 = 1 << 5 | 5 << 2;
/// ACPI's reset register, and "now".
const RESET: u16 = 0x604;
const NOW: u8 = 1;
/// pvpanic, and "the kernel has panicked".
const PANIC: u16 = 0x505;
const PANICKED: u8 = 1;
/// isa-debug-exit.
const DEBUG_EXIT: u16 = 0xf4;

pub(crate) fn end(reason: ShutdownReason) -> ! {
    match reason {
        ShutdownReason::PowerOff => out8(SLEEP_CONTROL, OFF),
        ShutdownReason::Restart => out8(RESET, NOW),
        ShutdownReason::Exit(status) => {
            out8(DEBUG_EXIT, status);
            // Without that device it is a failure all the same.
            out8(PANIC, PANICKED);
            out8(RESET, NOW);
        }
        ShutdownReason::Panic => {
            out8(PANIC, PANICKED);
            out8(RESET, NOW);
        }
    }
    loop {
        core::hint::spin_loop();
    }
}
