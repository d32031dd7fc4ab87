//! What the CPU says about itself.
//!
//! A [`CpuidTable`] is made for a [`CpuModel`] and a vCPU's place in the [`Topology`];
//! the machine adds its own leaves (hypervisor signature, TSC frequency). The `cpuid`
//! instruction answers from it and fills in what depends on control registers.
//!
//! Every model shows one fixed identity, whatever the host is: the guest's code paths
//! are then the same, and tested, everywhere. Which instruction sets are reported is
//! decided in one place, [`FeatureSet`](crate::native::features::FeatureSet), which the decoder reads too.

mod identity;
mod leaves;
mod model;
mod table;

pub use model::{CpuModel, CpuidError, ParseModelError, Topology};
pub use table::CpuidTable;

use crate::decode::op::Op;
use crate::state::control::Cr4;
use crate::state::fpu::XCR0_AVX;
use crate::state::regs::Gpr;
use crate::vcpu::{Step, Vcpu};

/// Leaf 1 ECX: OSXSAVE mirrors CR4.OSXSAVE.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 1 EDX: APIC mirrors the local APIC's global enable.
const APIC: u32 = 1 << 9;
/// `IA32_APIC_BASE`, and its global enable.
const IA32_APIC_BASE: u32 = 0x1b;
const APIC_ENABLE: u64 = 1 << 11;
/// Size of the XSAVE area with x87 and SSE state: legacy region and header.
pub(crate) const XSAVE_LEGACY: u32 = 512 + 64;
/// The upper halves of the YMM registers.
pub(crate) const XSAVE_AVX: u32 = 256;

/// `cpuid`.
pub(crate) fn cpuid(cpu: &mut Vcpu, _op: &Op) -> Step {
    let leaf = cpu.state.reg(Gpr::Rax) as u32;
    let subleaf = cpu.state.reg(Gpr::Rcx) as u32;
    let [eax, mut ebx, mut ecx, mut edx] = cpu.cpuid.get(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            if cpu.state.cr4.contains(Cr4::OSXSAVE) {
                ecx |= OSXSAVE;
            }
            if cpu.env.read_msr(IA32_APIC_BASE).is_ok_and(|base| base & APIC_ENABLE == 0) {
                edx &= !APIC;
            }
        }
        // The area for what XCR0 enables: the standard format's size in subleaf 0, the
        // compacted one's in subleaf 1. Ours are the same, because nothing lies between.
        (0xd, 0 | 1) if cpu.cpuid.has_xsave() => {
            let avx = cpu.state.xcr0 & XCR0_AVX != 0;
            ebx = if avx { XSAVE_LEGACY + XSAVE_AVX } else { XSAVE_LEGACY };
        }
        _ => {}
    }
    cpu.state.set_reg32(Gpr::Rax, eax);
    cpu.state.set_reg32(Gpr::Rbx, ebx);
    cpu.state.set_reg32(Gpr::Rcx, ecx);
    cpu.state.set_reg32(Gpr::Rdx, edx);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMachine;

    #[test]
    fn the_apic_bit_follows_its_global_enable() {
        let mut machine = TestMachine::protected_mode();
        let shown = |machine: &mut TestMachine| {
            machine.put(0x1000, &[0x0f, 0xa2]);
            machine.vcpu.state.rip = 0x1000;
            machine.vcpu.state.set_reg(Gpr::Rax, 1);
            assert!(machine.vcpu.single_step().is_none());
            machine.vcpu.state.reg(Gpr::Rdx) as u32 & APIC != 0
        };
        assert!(shown(&mut machine));
        machine.vcpu.write_msr(IA32_APIC_BASE, 0xfee0_0100).unwrap();
        assert!(!shown(&mut machine));
    }
}
