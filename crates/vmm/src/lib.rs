//! The Machine: guest memory, the loader, the platform and its devices, and the engine
//! that runs vCPUs on them.
//!
//! Nothing in here knows of terminals or command lines; that is the Launcher's part.

pub mod acpi;
pub mod clock;
pub mod devices;
pub mod engine;
pub mod layout;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod platform;
