//! Patching in an ordinary program on Linux.
//!
//! [`DualMapping`] writes text without ever having a page writable and executable: the
//! pages with sites are replaced by shared ones, mapped once to execute and once to
//! write. [`Threads`] says what becomes of the other threads meanwhile.
//!
//! No libc is needed; the few system calls are made directly.

mod dual;
mod stop;
mod sys;

pub use dual::{DualMapping, Threads};

/// The size of a page, bytes.
pub const PAGE: u64 = 4096;
