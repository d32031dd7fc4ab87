//! Conformance guests: small kernels, written here in machine code, that use the lguest ABI
//! of every band, or the 64-bit one (`long`), and check what the host does.
//!
//! Each runs on a whole machine. It powers off if all its checks hold, and otherwise panics
//! with the number and the words of the one that does not.

mod bands;
mod bus;
mod devices;
mod guest;
mod hostile;
mod interrupts;
mod long;
mod traps;
