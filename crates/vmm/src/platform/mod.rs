//! What the guest believes it runs on.

pub mod lguest;
pub mod pc;
