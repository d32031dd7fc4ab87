//! What the guest believes it runs on.

pub mod pc;
