//! Forgetting translations on request: `invlpg`, `invpcid`.
//!
//! Sources: SDM vol. 2, INVLPG and INVPCID; vol. 3, 4.10.4.1.

use crate::addr::GuestVirtAddr;
use crate::decode::op::{Op, OpFlags};
use crate::mmu::Access;
use crate::mmu::tlb::Whose;
use crate::state::SEG_SLOTS;
use crate::state::control::Cr4;
use crate::vcpu::{Step, Vcpu};

/// INVPCID types (SDM vol. 2, INVPCID).
mod invpcid_type {
    /// One address in one address space.
    pub(super) const ADDRESS: u64 = 0;
    /// All but global translations of one address space.
    pub(super) const SINGLE: u64 = 1;
    /// Everything, global ones too.
    pub(super) const ALL: u64 = 2;
    /// Everything but global ones.
    pub(super) const ALL_NON_GLOBAL: u64 = 3;
}

/// `invlpg m`. The operand is an address, not an access: no segment check but for
/// canonical form, which in 64-bit mode makes it do nothing.
pub(crate) fn invlpg(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.require_cpl0()?;
    let slot = usize::from(op.seg) & (SEG_SLOTS - 1);
    let base = cpu.state.seg.get(slot).map_or(0, |segment| segment.base);
    let addr = cpu.wrap_linear(base.wrapping_add(op.effective(&cpu.state)));
    if !cpu.state.long_mode() || GuestVirtAddr(addr).is_canonical() {
        cpu.mmu.invalidate(addr, Whose::Present);
    }
    cpu.end_block(op)
}

/// `invpcid r, m128`.
pub(crate) fn invpcid(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.has_descriptors() && cpu.state.protected_mode() {
        return Err(cpu.gp(0));
    }
    cpu.require_cpl0()?;
    let width = if op.flags.contains(OpFlags::LONG) { u64::MAX } else { 0xffff_ffff };
    let kind = cpu.state.gpr_slot(op.dst) & width;
    let at = cpu.linear(op, 16, Access::Read)?;
    let tag = cpu.read::<u64>(at)?;
    let addr = cpu.read::<u64>(cpu.wrap_linear(at.wrapping_add(8)))?;
    let pcid = (tag & 0xfff) as u16;
    let tagged = cpu.state.cr4.contains(Cr4::PCIDE);
    if kind > invpcid_type::ALL_NON_GLOBAL || tag >> 12 != 0 {
        return Err(cpu.gp(0));
    }
    match kind {
        invpcid_type::ADDRESS => {
            if !tagged && pcid != 0 || !GuestVirtAddr(addr).is_canonical() {
                return Err(cpu.gp(0));
            }
            cpu.mmu.invalidate(addr, Whose::Pcid(pcid));
        }
        invpcid_type::SINGLE => {
            if !tagged && pcid != 0 {
                return Err(cpu.gp(0));
            }
            cpu.mmu.flush_space(pcid);
        }
        invpcid_type::ALL => {
            cpu.mmu.flush_all();
            cpu.mmu.flush_non_global(cpu.pcid());
        }
        _ => cpu.mmu.flush_non_global(cpu.pcid()),
    }
    cpu.end_block(op)
}
