//! The debug-exit port: a write ends the machine with a value.
//!
//! Test kernels (kvm-unit-tests and our own) report their verdict with it. It exists
//! only when the machine's configuration asks for it. What exit status the value makes
//! is the Launcher's business.

use super::Request;

/// Where test kernels expect the port.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// A byte written to the port. Wider writes end with their lowest byte.
#[must_use]
pub const fn write(value: u8) -> Request {
    Request::Exit(value)
}
