//! The Machine: guest memory, the loader, the platform and its devices, and the engine
//! that runs vCPUs on them.
//!
//! Nothing in here knows of terminals or command lines; that is the Launcher's part.

// The guest is hostile, and nearly all code here is within its reach.
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod acpi;
pub mod clock;
pub mod devices;
pub mod engine;
pub mod layout;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod platform;
pub mod sandbox;
