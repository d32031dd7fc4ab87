//! Guest RAM as the CPU sees it: host memory behind guest-physical addresses, and
//! the record of which of it has been decoded as code.

pub mod access;
mod ahead;
pub mod code_map;
pub(crate) mod copies;
pub(crate) mod huge;
pub(crate) mod outside;
pub(crate) mod overlay;
pub mod ram;
pub mod shared;

pub use code_map::CodeMap;
pub use ram::{PhysMemory, RamRegion};
pub use shared::SharedRam;
