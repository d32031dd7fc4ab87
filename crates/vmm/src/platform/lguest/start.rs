//! The registers that a guest of this platform starts with.

use lguest_abi::entry;
use lguest_abi::segments::{KERNEL_CS, KERNEL_DS};
use softcpu::VcpuState;
use softcpu::state::control::{Cr0, Cr4};
use softcpu::state::regs::Gpr;
use softcpu::state::rflags::RFlags;
use softcpu::state::segment::{DescriptorTable, SegReg, Segment};

/// Where SGDT and SIDT say that the tables are: at the top, which no guest maps.
const TABLES: u64 = 0xffff_f000;
/// The limit that SGDT shows.
const GDT_LIMIT: u16 = 0xff;

/// Ring 1, flat, at `entry`. Paging is off in the CPU until the guest, or for old ones the
/// host, has page tables: a guest of V5 sees the same either way, and the older ones run at
/// physical addresses until LGUEST_INIT.
#[must_use]
pub fn vcpu_state(entry: u32) -> VcpuState {
    let mut state = VcpuState::at_reset();
    crate::loader::set_firmware_msrs(&mut state);
    state.gpr.fill(0);
    state.set_reg32(Gpr::Rsi, entry::ESI);
    state.rip = entry.into();
    state.rflags = RFlags::from_bits_retain(entry::EFLAGS.into());
    *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(entry::CS, entry::CODE.0);
    for reg in [SegReg::Ds, SegReg::Es, SegReg::Ss] {
        *state.segment_mut(reg) = Segment::from_descriptor(entry::DS, entry::DATA.0);
    }
    for reg in [SegReg::Fs, SegReg::Gs] {
        *state.segment_mut(reg) = Segment::null(0);
    }
    debug_assert!(usize::from(entry::CS >> 3) == KERNEL_CS);
    debug_assert!(usize::from(entry::DS >> 3) == KERNEL_DS);
    state.ldtr = Segment::null(0);
    // No task state: no port is allowed by a bitmap, and no stack comes from there.
    state.tr.limit = 0;
    state.gdtr = DescriptorTable { base: TABLES, limit: GDT_LIMIT };
    state.idtr = DescriptorTable { base: TABLES, limit: 0 };
    state.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP;
    // The guest's own writes of CR4 go nowhere, so what SSE needs is on already.
    state.cr4 = Cr4::OSFXSR | Cr4::OSXMMEXCPT;
    state
}
