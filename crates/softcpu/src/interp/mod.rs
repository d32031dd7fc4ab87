//! The interpreter: what each unprivileged instruction does.
//!
//! One file per instruction family, each full of small generic handlers that decode
//! picks by operation, operand form and size. Arithmetic is not re-implemented:
//! [`alu`] executes the host's own instruction and takes its flags. The privileged
//! half of the instruction set is in [`crate::system`]; vectors, x87 and the long
//! tail of integer instructions run as native stubs ([`crate::native`]).

pub mod alu;
pub mod arith;
pub mod bcd;
pub mod bits;
pub mod branch;
pub mod cond;
#[doc(hidden)]
pub mod fuzz;
pub mod muldiv;
pub mod operand;
pub mod run;
pub mod shift;
pub mod stack;
pub mod string;
pub mod transfer;

pub(crate) use string::BURST;
