//! From guest bytes to blocks of [`op::Op`]s.

pub mod op;
pub mod cache;
