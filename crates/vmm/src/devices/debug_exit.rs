//! The debug-exit port: a write ends the machine with a status.
//!
//! Test kernels (kvm-unit-tests and our own) report their verdict with it. It exists
//! only when the machine's configuration asks for it.

use super::Request;

/// Where test kernels expect the port.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// The status a write of `value` ends with: odd, so that no value looks like success
/// by accident; test kernels know this rule.
#[must_use]
pub const fn write(value: u8) -> Request {
    Request::Exit((value << 1) | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_twice_the_value_plus_one() {
        assert_eq!(write(0), Request::Exit(1));
        assert_eq!(write(0x10), Request::Exit(0x21));
        assert_eq!(write(0xff), Request::Exit(0xff));
    }
}
