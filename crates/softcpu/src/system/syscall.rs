//! Fast system calls, and the bases of FS and GS.
//!
//! Sources: SDM vol. 2, SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS, RDFSBASE and kin;
//! for SYSCALL outside 64-bit mode, AMD's Architecture Programmer's Manual, vol. 3.

use super::mask_of;
use crate::addr::GuestVirtAddr;
use crate::decode::op::{Op, OpFlags};
use crate::state::CodeSize;
use crate::state::control::{Cr4, Efer};
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::state::segment::{Access, SegReg, Segment};
use crate::supervisor::Trap;
use crate::vcpu::{Abort, Shadow, Step, Vcpu};

/// A flat segment as these instructions make them, without reading any table.
fn flat(selector: u16, kind: FlatKind, dpl: u8) -> Segment {
    // Present, code or data, accessed, readable or writable, 4 GiB.
    let common = Access::PRESENT
        | Access::CODE_OR_DATA
        | Access::ACCESSED
        | Access::WRITE_OR_READ
        | Access::GRANULAR
        | Access::from_bits_retain(u32::from(dpl & 3) << 5);
    let access = match kind {
        FlatKind::Code64 => common | Access::CODE | Access::LONG,
        FlatKind::Code32 => common | Access::CODE | Access::BIG,
        FlatKind::Stack => common | Access::BIG,
    };
    Segment { base: 0, limit: u32::MAX, access, selector }
}

#[derive(Clone, Copy)]
enum FlatKind {
    Code64,
    Code32,
    Stack,
}

impl Vcpu {
    fn enter_flat(&mut self, code: u16, kind: FlatKind, stack: u16, cpl: u8, rip: u64) -> Step {
        *self.state.segment_mut(SegReg::Ss) = flat(stack, FlatKind::Stack, cpl);
        self.enter(flat(code, kind, cpl), rip);
        Err(Abort::EndBlock)
    }

    /// RDFSBASE and its kin exist in 64-bit mode with CR4.FSGSBASE.
    fn require_fsgsbase(&mut self, op: &Op) -> Step {
        let there = op.flags.contains(OpFlags::LONG) && self.state.cr4.contains(Cr4::FSGSBASE);
        if there { Ok(()) } else { Err(self.ud()) }
    }

    fn read_base(&mut self, op: &Op, reg: SegReg) -> Step {
        self.require_fsgsbase(op)?;
        *self.state.gpr_slot_mut(op.dst) = self.state.segment(reg).base & mask_of(op.size);
        Ok(())
    }

    fn write_base(&mut self, op: &Op, reg: SegReg) -> Step {
        self.require_fsgsbase(op)?;
        let base = self.state.gpr_slot(op.dst) & mask_of(op.size);
        if !GuestVirtAddr(base).is_canonical() {
            return Err(self.gp(0));
        }
        self.state.segment_mut(reg).base = base;
        Ok(())
    }
}

/// `syscall`: to LSTAR from 64-bit code, to CSTAR from compatibility code, to STAR's low
/// half outside long mode.
pub(crate) fn syscall(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.state.efer.contains(Efer::SCE) || !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    if cpu.supervised() {
        cpu.state.rip = op.next_rip();
        return cpu.hand_over_from(Trap::Syscall { at: op.rip });
    }
    let star = cpu.state.msr.star;
    let code = (star >> 32) as u16 & !3;
    let stack = code.wrapping_add(8);
    let next = op.next_rip();
    let flags = cpu.state.rflags;
    if !cpu.state.long_mode() {
        cpu.state.set_reg(Gpr::Rcx, next & 0xffff_ffff);
        cpu.set_rflags(flags.difference(RFlags::IF | RFlags::RF | RFlags::VM));
        return cpu.enter_flat(code, FlatKind::Code32, stack, 0, star & 0xffff_ffff);
    }
    let target = match cpu.state.code_size() {
        CodeSize::Bits64 => cpu.state.msr.lstar,
        _ => cpu.state.msr.cstar,
    };
    cpu.state.set_reg(Gpr::Rcx, next);
    cpu.state.set_reg(Gpr::R11, flags.difference(RFlags::RF).bits());
    let kept = flags.bits() & !cpu.state.msr.fmask;
    cpu.set_rflags((RFlags::from_bits_truncate(kept) | RFlags::FIXED).difference(RFlags::RF));
    cpu.system.step_inhibited =
        flags.contains(RFlags::TF) && !cpu.state.rflags.contains(RFlags::TF);
    cpu.enter_flat(code, FlatKind::Code64, stack, 0, target)
}

/// `sysret`: to 64-bit code with an operand size of 8, to compatibility code otherwise,
/// and outside long mode to 32-bit code without touching flags other than IF.
pub(crate) fn sysret(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.state.efer.contains(Efer::SCE) || !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let base = (cpu.state.msr.star >> 48) as u16;
    let stack = base.wrapping_add(8) | 3;
    let rcx = cpu.state.reg(Gpr::Rcx);
    if !cpu.state.long_mode() {
        cpu.set_rflags(cpu.state.rflags | RFlags::IF);
        return cpu.enter_flat(base | 3, FlatKind::Code32, stack, 3, rcx & 0xffff_ffff);
    }
    // A non-canonical RCX faults here, in ring 0, as on Intel's processors.
    if op.size == 8 && !GuestVirtAddr(rcx).is_canonical() {
        return Err(cpu.gp(0));
    }
    let image = cpu.state.reg(Gpr::R11) & RFlags::all().bits();
    let flags =
        RFlags::from_bits_truncate(image).difference(RFlags::RF | RFlags::VM) | RFlags::FIXED;
    let stepping = cpu.state.rflags.contains(RFlags::TF);
    cpu.set_rflags(flags);
    cpu.system.step_inhibited = stepping && !flags.contains(RFlags::TF);
    if flags.contains(RFlags::TF) && !stepping {
        cpu.system.step_due = true;
        // Nothing comes between.
        cpu.cast_shadow(Shadow::Sti);
    }
    if op.size == 8 {
        cpu.enter_flat(base.wrapping_add(16) | 3, FlatKind::Code64, stack, 3, rcx)
    } else {
        cpu.enter_flat(base | 3, FlatKind::Code32, stack, 3, rcx & 0xffff_ffff)
    }
}

/// `sysenter`: to IA32_SYSENTER_EIP, from any mode with paging rings.
pub(crate) fn sysenter(cpu: &mut Vcpu, _op: &Op) -> Step {
    let code = cpu.state.msr.sysenter_cs as u16 & !3;
    if !cpu.state.protected_mode() || code == 0 {
        return Err(cpu.gp(0));
    }
    cpu.set_rflags(cpu.state.rflags.difference(RFlags::VM | RFlags::IF | RFlags::RF));
    let (kind, mask) = if cpu.state.long_mode() {
        (FlatKind::Code64, u64::MAX)
    } else {
        (FlatKind::Code32, 0xffff_ffff)
    };
    cpu.state.set_reg(Gpr::Rsp, cpu.state.msr.sysenter_esp & mask);
    let rip = cpu.state.msr.sysenter_eip & mask;
    cpu.enter_flat(code, kind, code.wrapping_add(8), 0, rip)
}

/// `sysexit`: back to RDX with the stack in RCX, to 64-bit code with an operand size of 8.
pub(crate) fn sysexit(cpu: &mut Vcpu, op: &Op) -> Step {
    let base = cpu.state.msr.sysenter_cs as u16;
    if !cpu.state.protected_mode() || base & !3 == 0 || cpu.state.cpl() != 0 {
        return Err(cpu.gp(0));
    }
    let rip = cpu.state.reg(Gpr::Rdx);
    let pointer = cpu.state.reg(Gpr::Rcx);
    if op.size == 8 {
        if !GuestVirtAddr(rip).is_canonical() || !GuestVirtAddr(pointer).is_canonical() {
            return Err(cpu.gp(0));
        }
        cpu.state.set_reg(Gpr::Rsp, pointer);
        let (code, stack) = (base.wrapping_add(32) | 3, base.wrapping_add(40) | 3);
        return cpu.enter_flat(code, FlatKind::Code64, stack, 3, rip);
    }
    cpu.state.set_reg(Gpr::Rsp, pointer & 0xffff_ffff);
    let (code, stack) = (base.wrapping_add(16) | 3, base.wrapping_add(24) | 3);
    cpu.enter_flat(code, FlatKind::Code32, stack, 3, rip & 0xffff_ffff)
}

/// `swapgs`: 64-bit ring 0 only. Only addressing depends on it, which looks the base up
/// each time, so the block goes on.
pub(crate) fn swapgs(cpu: &mut Vcpu, op: &Op) -> Step {
    if !op.flags.contains(OpFlags::LONG) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let base = cpu.state.segment(SegReg::Gs).base;
    cpu.state.segment_mut(SegReg::Gs).base = cpu.state.msr.kernel_gs_base;
    cpu.state.msr.kernel_gs_base = base;
    Ok(())
}

/// `rdfsbase r`.
pub(crate) fn rdfsbase(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.read_base(op, SegReg::Fs)
}

/// `rdgsbase r`.
pub(crate) fn rdgsbase(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.read_base(op, SegReg::Gs)
}

/// `wrfsbase r`.
pub(crate) fn wrfsbase(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.write_base(op, SegReg::Fs)
}

/// `wrgsbase r`.
pub(crate) fn wrgsbase(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.write_base(op, SegReg::Gs)
}
