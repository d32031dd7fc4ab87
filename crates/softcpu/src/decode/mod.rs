//! From guest bytes to blocks of [`op::Op`]s.

pub(crate) mod build;
pub(crate) mod cache;
pub(crate) mod lower;
pub(crate) mod lower_integer;
pub(crate) mod lower_system;
pub mod op;
mod sweep;
