//! What a vCPU asks of the machine around it.
//!
//! The CPU knows nothing of devices. Whatever leaves it (port and memory-mapped
//! I/O, the MSRs that belong to the local APIC or the platform, interrupt
//! acknowledge, hypercalls) goes through one [`Environment`], which the `vmm`
//! crate implements once per vCPU. Calls come from the vCPU's own thread, in the
//! middle of an instruction, and must not block for long.

use crate::addr::GuestPhysAddr;

/// The guest used an MSR that does not exist, or a value it does not take:
/// the instruction ends in `#GP(0)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such MSR, or a value it does not take")]
pub struct MsrRefused;

/// A hypercall as KVM's ABI lays it out (Linux `Documentation/virt/kvm/x86/hypercalls.rst`):
/// number in RAX, arguments in RBX, RCX, RDX, RSI, truncated to 32 bits outside 64-bit mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypercall {
    /// Which call.
    pub number: u64,
    /// Its arguments, in order.
    pub args: [u64; 4],
    /// The caller's privilege level; most calls are for ring 0 only.
    pub cpl: u8,
    /// Whether the caller is 64-bit code: registers that hold one long bitmap between
    /// them hold 64 bits of it each then, and 32 otherwise.
    pub long: bool,
}

/// The machine, as one vCPU sees it. See the module's own words for the rules.
///
/// What only a machine with an interrupt controller, timers or a hypervisor has to say is
/// answered here as one without any would; who passes calls on must pass on these too.
pub trait Environment: Send {
    /// `in`: fill `data` (1, 2 or 4 bytes). Ports nobody answers read as all ones.
    fn port_read(&mut self, port: u16, data: &mut [u8]);

    /// `out`: take `data` (1, 2 or 4 bytes).
    fn port_write(&mut self, port: u16, data: &[u8]);

    /// A load from an address that is not RAM (1 to 64 bytes, inside one page).
    /// Addresses nobody answers read as all ones.
    fn mmio_read(&mut self, addr: GuestPhysAddr, data: &mut [u8]);

    /// A store to an address that is not RAM (1 to 64 bytes, inside one page).
    fn mmio_write(&mut self, addr: GuestPhysAddr, data: &[u8]);

    /// `rdmsr` of a register the CPU itself does not hold: APIC base, x2APIC, TSC
    /// deadline, KVM's paravirtual ones.
    ///
    /// # Errors
    /// [`MsrRefused`] makes the instruction raise `#GP(0)`.
    fn read_msr(&mut self, index: u32) -> Result<u64, MsrRefused> {
        let _ = index;
        Err(MsrRefused)
    }

    /// `wrmsr`, likewise.
    ///
    /// # Errors
    /// [`MsrRefused`] makes the instruction raise `#GP(0)`.
    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        let _ = (index, value);
        Err(MsrRefused)
    }

    /// The vCPU is ready to take an external interrupt: the highest-priority
    /// pending vector, moved to in-service, or `None` if there is none after all.
    /// When more are deliverable the environment raises
    /// [`Event::INTERRUPT`](crate::handle::Event::INTERRUPT) again.
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }

    /// CR8: the task priority class, bits 3..0 (SDM vol. 3, 11.8.6).
    fn task_priority(&mut self) -> u8 {
        0
    }

    /// A write of CR8.
    fn set_task_priority(&mut self, class: u8) {
        let _ = class;
    }

    /// `vmcall`/`vmmcall`: the result for RAX.
    fn hypercall(&mut self, call: &Hypercall) -> u64 {
        let _ = call;
        u64::MAX
    }

    /// The guest's TSC was moved (by a write of `IA32_TSC` or `IA32_TSC_ADJUST`):
    /// guest TSC = host TSC + `offset` from now on. Timers that count in it follow.
    fn tsc_offset_changed(&mut self, offset: u64) {
        let _ = offset;
    }

    /// Whoever holds stores to devices back does them now.
    fn settle(&mut self) {}
}
