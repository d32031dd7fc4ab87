//! The x86 families, as Linux 2.6.29/2.6.30 had them, for 64-bit kernels, and of its later
//! ops those that tell of CPUs that do not run (`vcpu_is_preempted`, `steal_clock`).
//!
//! Ops whose native meaning is an instruction or nothing default to that; ops that only
//! the kernel can give a body to (its IPIs, its clocks, its boot) have no default, and
//! patching without binding them is an error that names them. The ops of Linux that exist
//! for 32-bit high memory alone (`kmap_atomic_pte`) have no place in 64-bit code, and
//! `pv_init_ops.patch` is what [`Template`](crate::Template) is here.
//!
//! [`Info`](types::Info) holds the facts of `pv_info`.

mod boot;
mod control;
mod interrupts;
mod locks;
mod paging;
pub mod types;

pub use boot::{apic, init, time};
pub use control::cpu;
pub use interrupts::irq;
pub use locks::lock;
pub use paging::mmu;
