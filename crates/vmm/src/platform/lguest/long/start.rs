//! What a 64-bit guest starts with: segments, registers, and what CPUID says.

use lguest_abi::long::entry::{
    CPUID_LEAF, CPUID_SIGNATURE, CR0, CR4, EFER, KERNEL_CS, KERNEL_DS, RFLAGS,
};
use lguest_abi::long::{Phys, VERSION};
use softcpu::VcpuState;
use softcpu::cpuid::CpuidTable;
use softcpu::state::control::{Cr0, Cr4, Efer};
use softcpu::state::fpu::XCR0_X87;
use softcpu::state::regs::Gpr;
use softcpu::state::rflags::RFlags;
use softcpu::state::segment::{DescriptorTable, SegReg, Segment};

/// 64-bit code, and data, of DPL 0, accessed.
const CODE: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const DPL1: u64 = 1 << 45;
const DPL3: u64 = 3 << 45;

/// The host's GDT, in the order of the selectors.
pub(super) const GDT: [u64; 6] = [0, CODE | DPL1, DATA | DPL1, 0, DATA | DPL3, CODE | DPL3];

/// Where SGDT and SIDT say that the tables are: nowhere that is mapped at the start.
const TABLES: u64 = 0xffff_ffff_ffff_f000;

/// One of the segments by its selector; null for another.
pub(super) fn segment(selector: u16) -> Segment {
    match GDT.get(usize::from(selector >> 3)) {
        Some(raw) if *raw != 0 => Segment::from_descriptor(selector, *raw),
        _ => Segment::null(selector),
    }
}

/// The leaves that this platform adds: that it is lguest, and which versions it speaks.
#[must_use]
pub fn cpuid_leaves() -> [(u32, [u32; 4]); 2] {
    let word = |at: usize| {
        let bytes = CPUID_SIGNATURE.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    let last = CPUID_LEAF.saturating_add(1);
    [(CPUID_LEAF, [last, word(0), word(4), word(8)]), (last, [VERSION, 0, 0, 0])]
}

/// Ring 1 at `entry`, on the tables at `top`, with RDI as given.
#[must_use]
pub fn vcpu_state(entry: u64, top: Phys, rdi: u64, cpuid: &CpuidTable) -> VcpuState {
    let mut state = VcpuState::at_reset();
    crate::loader::set_firmware_msrs(&mut state);
    state.gpr.fill(0);
    state.set_reg(Gpr::Rdi, rdi);
    state.rip = entry;
    state.rflags = RFlags::from_bits_truncate(RFLAGS);
    *state.segment_mut(SegReg::Cs) = segment(KERNEL_CS);
    for reg in [SegReg::Ss, SegReg::Ds, SegReg::Es] {
        *state.segment_mut(reg) = segment(KERNEL_DS);
    }
    for reg in [SegReg::Fs, SegReg::Gs] {
        *state.segment_mut(reg) = Segment::null(0);
    }
    state.ldtr = Segment::null(0);
    // No task state: no port is allowed by a bitmap, and no stack comes from there.
    state.tr.limit = 0;
    state.gdtr =
        DescriptorTable { base: TABLES, limit: size_of_val(&GDT).saturating_sub(1) as u16 };
    state.idtr = DescriptorTable { base: TABLES, limit: 0 };
    state.cr0 = Cr0::from_bits_truncate(CR0);
    state.cr3 = top.0;
    state.cr4 = Cr4::from_bits_truncate(CR4);
    state.efer = Efer::from_bits_truncate(EFER);
    let [_, _, features, _] = cpuid.get(1, 0);
    if features & XSAVE != 0 {
        state.cr4 |= Cr4::OSXSAVE;
        let [low, _, _, high] = cpuid.get(0xd, 0);
        state.xcr0 = u64::from(high) << 32 | u64::from(low) | XCR0_X87;
    }
    state
}

/// CPUID leaf 1, ECX: XSAVE.
const XSAVE: u32 = 1 << 26;

#[cfg(test)]
mod tests {
    use super::*;
    use lguest_abi::long::entry::{SELECTORS, USER_CS};

    #[test]
    fn selectors_have_segments_of_their_rings() {
        for (name, selector) in SELECTORS {
            let segment = segment(*selector);
            assert_eq!(u16::from(segment.dpl()), selector & 3, "{name}");
            assert_eq!(segment.is_long(), name.ends_with("CS"), "{name}");
        }
        assert!(segment(0x18).is_unusable() && segment(USER_CS + 8).is_unusable());
    }
}
