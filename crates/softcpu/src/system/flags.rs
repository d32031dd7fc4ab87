//! Instructions on the flags register as a whole and on the interrupt flag.
//!
//! Sources: SDM vol. 2, PUSHF, POPF, CLI, STI (tables of modes and IOPL). Virtual-8086
//! mode extensions (VME, PVI) are not offered by CPUID, so IOPL alone decides.

use crate::decode::op::Op;
use crate::state::rflags::RFlags;
use crate::vcpu::{Shadow, Step, Vcpu};

impl Vcpu {
    /// Whether IF may be changed: IOPL-sensitive, as the manual calls it.
    #[inline]
    pub(crate) fn io_privileged(&self) -> bool {
        !self.state.protected_mode() || self.state.cpl() <= self.state.rflags.iopl()
    }

    fn popf_mask(&self, size: u8) -> RFlags {
        let mut mask = RFlags::STATUS | RFlags::TF | RFlags::DF | RFlags::NT;
        if size != 2 {
            mask |= RFlags::AC | RFlags::ID;
        }
        if self.io_privileged() {
            mask |= RFlags::IF;
        }
        if self.state.cpl() == 0 {
            mask |= RFlags::IOPL;
        }
        mask
    }
}

/// Flags that something outside the flags register follows from.
pub(crate) const FOLLOWED: RFlags = RFlags::from_bits_retain(
    RFlags::IF.bits() | RFlags::TF.bits() | RFlags::AC.bits() | RFlags::IOPL.bits(),
);

/// `pushf`, `pushfd`, `pushfq` by operand size. RF and VM read as zero.
pub(crate) fn pushf(cpu: &mut Vcpu, op: &Op) -> Step {
    if cpu.virtual_8086() && cpu.state.rflags.iopl() < 3 {
        return Err(cpu.gp(0));
    }
    let image = cpu.state.rflags.difference(RFlags::RF | RFlags::VM);
    let mut stack = cpu.current_stack();
    cpu.push_to(&mut stack, op.size, image.bits())?;
    cpu.commit_stack(&stack);
    Ok(())
}

/// `popf`, `popfd`, `popfq` by operand size. What may not be changed keeps its value
/// without a fault.
pub(crate) fn popf(cpu: &mut Vcpu, op: &Op) -> Step {
    if cpu.virtual_8086() && cpu.state.rflags.iopl() < 3 {
        return Err(cpu.gp(0));
    }
    let mut stack = cpu.current_stack();
    let image = cpu.pop_from(&mut stack, op.size)?;
    cpu.commit_stack(&stack);
    let old = cpu.state.rflags;
    let new = old.with_image(image, cpu.popf_mask(op.size)).difference(RFlags::RF);
    if !(old ^ new).intersects(FOLLOWED) {
        cpu.state.rflags = new;
        return Ok(());
    }
    cpu.set_rflags(new);
    cpu.end_block(op)
}

/// `cli`.
pub(crate) fn cli(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.io_privileged() {
        return Err(cpu.gp(0));
    }
    if !cpu.state.rflags.contains(RFlags::IF) {
        return Ok(());
    }
    cpu.set_rflags(cpu.state.rflags.difference(RFlags::IF));
    cpu.end_block(op)
}

/// `sti`: interrupts are taken after the next instruction, so that `sti; hlt` cannot
/// sleep through one.
pub(crate) fn sti(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.io_privileged() {
        return Err(cpu.gp(0));
    }
    if !cpu.state.rflags.contains(RFlags::IF) {
        cpu.shadow = Shadow::Sti;
        cpu.set_rflags(cpu.state.rflags | RFlags::IF);
    }
    cpu.end_block(op)
}

/// `clac`: supervisor code gives up access to user pages.
pub(crate) fn clac(cpu: &mut Vcpu, _op: &Op) -> Step {
    cpu.change_ac(false)
}

/// `stac`: supervisor code may access user pages.
pub(crate) fn stac(cpu: &mut Vcpu, _op: &Op) -> Step {
    cpu.change_ac(true)
}

impl Vcpu {
    /// These sit around every user copy of a kernel, so only the view changes: data
    /// accesses look it up each time, and the block goes on.
    fn change_ac(&mut self, ac: bool) -> Step {
        if self.state.cpl() != 0 {
            return Err(self.ud());
        }
        self.state.rflags.set(RFlags::AC, ac);
        self.mmu.set_alignment_override(ac);
        Ok(())
    }
}
