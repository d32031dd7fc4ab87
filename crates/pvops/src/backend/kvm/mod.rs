//! KVM: interrupts are native; clocks, delays, locks and flushes of sleeping CPUs are not.
//!
//! Under hardware virtualization `cli` and `sti`, control registers and page tables cost
//! what they always did, so a guest of KVM keeps nearly everything and takes over what a
//! host knows better. What a host can do it says in CPUID ([`Features`]); each `bind_*`
//! binds what the features allow and leaves the rest as it is.
//!
//! | family | taken over                                                   | if the host has        |
//! |--------|--------------------------------------------------------------|------------------------|
//! | `cpu`  | `io_delay`: nothing                                          | [`Features::NOP_IO_DELAY`] |
//! | `time` | `sched_clock`, `get_wallclock`, `set_wallclock`, `get_tsc_khz` | [`Features::CLOCK`] or [`Features::CLOCK2`] |
//! | `time` | `steal_clock`                                                | [`Features::STEAL_TIME`] |
//! | `apic` | `setup_secondary_clock`: tells the host where the CPU's clock page is | as `sched_clock` |
//! | `lock` | all but `spin_is_locked`: waiters sleep, and are woken       | [`Features::UNHALT`]   |
//! | `lock` | `vcpu_is_preempted`                                          | [`Features::STEAL_TIME`] |
//! | `mmu`  | `flush_tlb_others`: CPUs that do not run flush when they do  | [`Features::TLB_FLUSH`] and `STEAL_TIME` |
//! | `mmu`  | `set_*`, `pte_clear`, `pmd_clear`, `ptep_modify_prot_commit`, `flush_tlb_user`, `release_*`, lazy mode: by hypercall, in batches | [`Features::MMU_OP`]: hosts without nested paging, until 2010 |
//!
//! Native stay: all of `irq` and `init`, the rest of the others. In particular
//! `ptep_modify_prot_start` must be the atomic exchange that it is, and a TLB flush of
//! one's own CPU is one instruction. Not an op of any family, and so not here: the end of
//! an interrupt (`PV_EOI`), page faults that wait for the host (`ASYNC_PF`).

pub mod clock;
pub mod locks;
pub mod paging;
pub mod steal;

use crate::families::cpu;
use crate::{BindError, Binding, Bindings, Plain};

pub use clock::{Clock, ClockPage, WallClock, bind_apic, bind_time};
pub use locks::{Sleep, bind_locks};
pub use paging::{Batches, Queue, bind_paging};
pub use steal::{Shootdown, StealTime, bind_flush, bind_preempted, bind_steal_clock};

/// CPUID leaf with KVM's signature.
pub const SIGNATURE_LEAF: u32 = 0x4000_0000;
/// CPUID leaf with its features, in EAX.
pub const FEATURES_LEAF: u32 = 0x4000_0001;

/// Whether the registers of [`SIGNATURE_LEAF`] are KVM's.
#[must_use]
pub const fn is_kvm(ebx: u32, ecx: u32, edx: u32) -> bool {
    // "KVMK" "VMKV" "M\0\0\0"
    ebx == 0x4b4d_564b && ecx == 0x564b_4d56 && edx == 0x4d
}

/// EAX of [`FEATURES_LEAF`] (Linux, Documentation/virt/kvm/x86/cpuid.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u32);

impl Features {
    /// A clock page, by the model-specific registers 0x11 and 0x12.
    pub const CLOCK: Self = Self(1);
    /// I/O delays are not needed.
    pub const NOP_IO_DELAY: Self = Self(1 << 1);
    /// Page tables by hypercall.
    pub const MMU_OP: Self = Self(1 << 2);
    /// A clock page, by registers of KVM's own range.
    pub const CLOCK2: Self = Self(1 << 3);
    /// Tells how long a CPU did not run.
    pub const STEAL_TIME: Self = Self(1 << 5);
    /// Wakes a halted CPU on request.
    pub const UNHALT: Self = Self(1 << 7);
    /// Flushes the TLB of a CPU before it runs again.
    pub const TLB_FLUSH: Self = Self(1 << 9);

    /// Whether all of `other` are among these.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The features in either.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Model-specific registers of KVM's own range.
pub mod msr {
    /// Where the host writes the time of its boot ([`WallClock`](super::WallClock)).
    pub const WALL_CLOCK: u32 = 0x4b56_4d00;
    /// Where it keeps a CPU's clock ([`ClockPage`](super::ClockPage)); bit 0 turns it on.
    pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
    /// Where it keeps a CPU's [`StealTime`](super::StealTime); bit 0 turns it on.
    pub const STEAL_TIME: u32 = 0x4b56_4d03;
    /// [`WALL_CLOCK`] of old hosts.
    pub const OLD_WALL_CLOCK: u32 = 0x11;
    /// [`SYSTEM_TIME`] of old hosts.
    pub const OLD_SYSTEM_TIME: u32 = 0x12;
}

/// No I/O delay: there is no slow bus.
///
/// # Errors
/// When it is bound already.
pub fn bind_cpu(bindings: &mut Bindings<cpu::Family>, host: Features) -> Result<(), BindError> {
    if host.has(Features::NOP_IO_DELAY) {
        bindings.bind(cpu::op::IoDelay, Binding::<Plain<_>>::nop())?;
    }
    Ok(())
}
