//! Addresses of a 32-bit guest, with the space they belong to in the type.
//!
//! Hypercalls mix the two freely: most pointers are physical, stacks and page-table
//! entries go by virtual address. Nothing here is checked against the guest's size; who
//! follows an address does that.

use core::fmt;

/// A guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Phys(pub u32);

/// A guest-virtual address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Virt(pub u32);

impl fmt::Display for Phys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "physical {:#x}", self.0)
    }
}

impl fmt::Display for Virt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "virtual {:#x}", self.0)
    }
}
