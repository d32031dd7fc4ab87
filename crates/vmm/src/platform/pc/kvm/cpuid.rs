//! The CPUID leaves by which a guest finds out that it runs on something like KVM.

use crate::clock::TscFrequency;
use crate::devices::apic::timer::APIC_BUS_HZ;

/// The hypervisor's signature and highest leaf.
pub const SIGNATURE_LEAF: u32 = 0x4000_0000;
/// KVM's features.
pub const FEATURES_LEAF: u32 = 0x4000_0001;
/// Frequencies, as VMware defined it and KVM's users know it.
pub const TIMING_LEAF: u32 = 0x4000_0010;

bitflags::bitflags! {
    /// Features in EAX of [`FEATURES_LEAF`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u32 {
        /// kvmclock by its old MSRs.
        const CLOCKSOURCE = 1 << 0;
        /// No need to wait after port I/O.
        const NOP_IO_DELAY = 1 << 1;
        /// kvmclock by its new MSRs.
        const CLOCKSOURCE2 = 1 << 3;
        /// Steal time.
        const STEAL_TIME = 1 << 5;
        /// A halted vCPU can be woken by a hypercall.
        const PV_UNHALT = 1 << 7;
        /// Remote TLB flushes of halted vCPUs by the steal-time page.
        const PV_TLB_FLUSH = 1 << 9;
        /// Interprocessor interrupts by a hypercall.
        const PV_SEND_IPI = 1 << 11;
        /// kvmclock is stable across vCPUs.
        const CLOCKSOURCE_STABLE = 1 << 24;
    }
}

/// A leaf and its EAX, EBX, ECX and EDX.
pub type Leaf = (u32, [u32; 4]);

/// The leaves, for a TSC of this frequency.
#[must_use]
pub fn leaves(tsc: TscFrequency) -> [Leaf; 3] {
    let bus_khz = u32::try_from(APIC_BUS_HZ / 1000).unwrap_or(u32::MAX);
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    [
        (SIGNATURE_LEAF, [TIMING_LEAF, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]),
        (FEATURES_LEAF, [Features::all().bits(), 0, 0, 0]),
        (TIMING_LEAF, [tsc.khz(), bus_khz, 0, 0]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_reads_as_kvm() {
        let [(_, [highest, words @ ..]), _, (_, timing)] =
            leaves(TscFrequency::from_hz(2_400_000_000));
        let text: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(text, b"KVMKVMKVM\0\0\0");
        assert_eq!((highest, timing[0], timing[1]), (TIMING_LEAF, 2_400_000, 1_000_000));
    }
}
