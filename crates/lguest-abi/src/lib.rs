//! What an lguest host and its guests agree on: numbers, layouts and rules.
//!
//! There never was one lguest ABI: host and guest came from the same kernel, and the two
//! changed together, seven times. A [`Band`] names a stretch of kernels that speak the same
//! way, and says what differs. The modules beside it hold what they speak: [`call`]s, the
//! [`ring`] that batches them, the page of [`shared_data`], [`boot`] and the state at
//! [`entry`], [`segments`], page [`tables`], [`traps`], and the devices' [`bus`] or [`pci`].
//!
//! [`long`] is the ABI of this project's own guests, in long mode, which has no past.
//!
//! All of it is data and pure functions: no guest memory is touched here, nothing is
//! allocated, nothing can panic. The host reads guest bytes with these functions, and
//! assumes nothing of what it reads; a guest writes its bytes with the same ones.
#![cfg_attr(not(test), no_std)]
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

pub mod address;
pub mod band;
pub mod boot;
pub mod bus;
mod bytes;
pub mod call;
pub mod entry;
pub mod long;
pub mod pci;
pub mod ring;
pub mod segments;
pub mod shared_data;
pub mod tables;
pub mod traps;

pub use address::{Phys, Virt};
pub use band::{Band, Paging};
pub use call::{Call, CallWords};
