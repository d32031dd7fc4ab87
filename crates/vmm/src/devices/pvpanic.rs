//! The pvpanic device: one port through which a guest kernel says that it panicked.
//!
//! Linux finds it by its ACPI identifier `QEMU0001` and writes the event from its panic
//! notifier, so that nobody has to read the console to know.

use super::Request;

/// The port, where ACPI says it is.
pub const PVPANIC_PORT: u16 = 0x505;
/// Event: the kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// Event: the kernel has panicked and a crash kernel takes over: nothing for us to do.
const CRASH_LOADED: u8 = 1 << 1;

/// Reading tells which events are understood.
#[must_use]
pub const fn read() -> u8 {
    PANICKED | CRASH_LOADED
}

/// Writing reports events.
#[must_use]
pub const fn write(events: u8) -> Option<Request> {
    if events & PANICKED != 0 { Some(Request::Panicked) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_reported_and_a_crash_kernel_is_left_alone() {
        assert_eq!(read(), 3);
        assert_eq!(write(PANICKED), Some(Request::Panicked));
        assert_eq!(write(CRASH_LOADED), None);
        assert_eq!(write(0xf0), None);
    }
}
