//! Instruction handlers.
