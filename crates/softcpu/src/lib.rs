//! An x86-64 CPU in software.
//!
//! It runs guest code at every privilege level inside one ordinary process: decode
//! ([`decode`]) turns guest bytes into blocks of pre-resolved operations, the
//! interpreter ([`interp`], [`system`]) runs them, and whatever is arithmetic with
//! hundreds of variants (x87, SSE, AVX, BMI, AES...) is executed by the host CPU
//! itself through small generated stubs ([`native`]). Memory is reached through a
//! software TLB ([`mmu`]).
//!
//! The crate knows nothing of devices or terminals: what leaves the CPU goes through
//! [`env::Environment`]. The interpreter is the definition of every instruction; the
//! translator ([`translate`]) must agree with it bit for bit, which [`lockstep`] checks.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
// The guest is hostile: nothing it can reach may panic.
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::todo,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod addr;
mod code_memory;
pub mod cpuid;
pub mod decode;
pub mod env;
pub mod exception;
pub mod handle;
pub mod interp;
pub mod lockstep;
pub mod memory;
pub mod mmu;
pub mod native;
mod observers;
pub mod state;
pub mod stats;
pub mod supervisor;
mod sync;
pub mod system;
#[doc(hidden)]
pub mod testing;
pub mod trace;
pub mod translate;
pub mod vcpu;

pub use addr::{GuestPhysAddr, GuestVirtAddr};
pub use env::{Environment, Hypercall, MsrRefused};
pub use exception::Exception;
pub use handle::{Event, VcpuHandle};
pub use memory::{PhysMemory, RamRegion};
pub use native::Stubs;
pub use state::VcpuState;
pub use stats::{Stats, StatsSink};
pub use supervisor::{Supervisor, Trap, Verdict};
pub use vcpu::{Engine, Exit, Vcpu, VcpuConfig};
