//! The stack: `push`, `pop`, `pusha`, `popa`, `enter`, `leave`.
//!
//! The stack pointer is RSP in 64-bit code; elsewhere SS.B says whether ESP or SP, and
//! every access is checked against SS (SDM vol. 1, 6.2).

use super::operand::{Source, Target};
use crate::decode::op::{Op, read_reg, write_reg};
use crate::memory::access::Scalar;
use crate::mmu::Access;
use crate::state::CodeSize;
use crate::state::regs::Gpr;
use crate::state::segment::SegReg;
use crate::vcpu::{Abort, Shadow, Step, Vcpu};

impl Vcpu {
    /// Which bits of RSP address the stack.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.code_size == CodeSize::Bits64 {
            u64::MAX
        } else if self.state.segment(SegReg::Ss).is_big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// RSP moved by `delta` within the stack's width; the bits outside it stay (for a
    /// 16-bit stack) or are zero (for a 32-bit one).
    pub(crate) fn moved_stack_pointer(&self, delta: u64) -> u64 {
        let mask = self.stack_mask();
        let rsp = self.state.reg(Gpr::Rsp);
        let moved = rsp.wrapping_add(delta) & mask;
        if mask == 0xffff { rsp & !0xffff | moved } else { moved }
    }

    /// The linear address of `size` bytes on the stack at the stack pointer `rsp`.
    #[inline(always)]
    pub(crate) fn stack_linear(
        &mut self,
        rsp: u64,
        size: u64,
        access: Access,
    ) -> Result<u64, Abort> {
        if self.code_size == CodeSize::Bits64 {
            return Ok(rsp);
        }
        self.segmented(SegReg::Ss, rsp & self.stack_mask(), size, access)
    }

    /// Pushes `value`.
    #[inline(always)]
    pub(crate) fn push<T: Scalar>(&mut self, value: T) -> Result<(), Abort> {
        let size = u64::from(T::SIZE);
        let rsp = if self.code_size == CodeSize::Bits64 {
            self.state.reg(Gpr::Rsp).wrapping_sub(size)
        } else {
            self.moved_stack_pointer(size.wrapping_neg())
        };
        let addr = self.stack_linear(rsp, size, Access::Write)?;
        self.write(addr, value)?;
        self.state.set_reg(Gpr::Rsp, rsp);
        Ok(())
    }

    /// What is on top of the stack, and the stack pointer once it has been popped.
    #[inline(always)]
    pub(crate) fn peek<T: Scalar>(&mut self) -> Result<(T, u64), Abort> {
        let size = u64::from(T::SIZE);
        let rsp = self.state.reg(Gpr::Rsp);
        let addr = self.stack_linear(rsp, size, Access::Read)?;
        let value = self.read(addr)?;
        let after = if self.code_size == CodeSize::Bits64 {
            rsp.wrapping_add(size)
        } else {
            self.moved_stack_pointer(size)
        };
        Ok((value, after))
    }
}

/// `push` of a register, immediate or memory operand.
pub(crate) fn push<T: Scalar, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<T>(cpu, op)?;
    cpu.push(value)
}

/// `pop` into a register or memory. The memory operand's address is computed with the
/// stack pointer already moved.
pub(crate) fn pop<T: Scalar, D: Target>(cpu: &mut Vcpu, op: &Op) -> Step {
    let (value, after) = cpu.peek::<T>()?;
    let before = cpu.state.reg(Gpr::Rsp);
    cpu.state.set_reg(Gpr::Rsp, after);
    D::set(cpu, op, value).inspect_err(|_| cpu.state.set_reg(Gpr::Rsp, before))
}

/// `push` of a segment register, whose number is `imm`.
pub(crate) fn push_segment<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let selector = cpu.state.seg.get(op.imm as usize).map_or(0, |segment| segment.selector);
    cpu.push(T::truncate(u64::from(selector)))
}

/// `pop` of a segment register, whose number is `imm`. Ends the block.
pub(crate) fn pop_segment<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let (value, after) = cpu.peek::<T>()?;
    let Some(reg) = SegReg::from_number(op.imm as u8) else { return Err(cpu.ud()) };
    cpu.load_segment(reg, value.zero_extend() as u16)?;
    cpu.state.set_reg(Gpr::Rsp, after);
    if reg == SegReg::Ss {
        cpu.cast_shadow(Shadow::MovSs);
    }
    cpu.state.rip = op.next_rip();
    Err(Abort::EndBlock)
}

/// `mov` to a segment register, whose number is `imm`. Ends the block.
pub(crate) fn move_to_segment<S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let selector = S::get::<u16>(cpu, op)?;
    let Some(reg) = SegReg::from_number(op.imm as u8) else { return Err(cpu.ud()) };
    cpu.load_segment(reg, selector)?;
    if reg == SegReg::Ss {
        cpu.cast_shadow(Shadow::MovSs);
    }
    cpu.state.rip = op.next_rip();
    Err(Abort::EndBlock)
}

/// `lds`, `les`, `lss`, `lfs`, `lgs`: a far pointer from memory into register and
/// segment register `imm`. Ends the block.
pub(crate) fn load_far_pointer<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let size = u64::from(T::SIZE);
    let addr = cpu.linear(op, size + 2, Access::Read)?;
    let offset = cpu.read::<T>(addr)?;
    let selector = cpu.read::<u16>(addr.wrapping_add(size))?;
    let Some(reg) = SegReg::from_number(op.imm as u8) else { return Err(cpu.ud()) };
    cpu.load_segment(reg, selector)?;
    write_reg(&mut cpu.state, op.dst, offset);
    cpu.state.rip = op.next_rip();
    Err(Abort::EndBlock)
}

/// `pusha`.
pub(crate) fn push_all<T: Scalar>(cpu: &mut Vcpu, _: &Op) -> Step {
    let size = u64::from(T::SIZE);
    let saved = cpu.state.reg(Gpr::Rsp);
    // All eight slots must be writable before the first is written; the first that is
    // not says what fault it is.
    for slot in 1..=8_u64 {
        let rsp = cpu.moved_stack_pointer(size.wrapping_mul(slot).wrapping_neg());
        let addr = cpu.stack_linear(rsp, size, Access::Write)?;
        cpu.probe_write(addr, size)?;
    }
    for reg in 0..8 {
        let value = if reg == 4 { T::truncate(saved) } else { read_reg(&cpu.state, reg) };
        if let Err(abort) = cpu.push(value) {
            cpu.state.set_reg(Gpr::Rsp, saved);
            return Err(abort);
        }
    }
    Ok(())
}

/// `popa`.
pub(crate) fn pop_all<T: Scalar>(cpu: &mut Vcpu, _: &Op) -> Step {
    let saved = cpu.state.reg(Gpr::Rsp);
    let mut values = [T::default(); 8];
    for value in values.iter_mut().rev() {
        match cpu.peek::<T>() {
            Ok((popped, after)) => {
                *value = popped;
                cpu.state.set_reg(Gpr::Rsp, after);
            }
            Err(abort) => {
                cpu.state.set_reg(Gpr::Rsp, saved);
                return Err(abort);
            }
        }
    }
    for (reg, value) in (0..8).zip(values) {
        if reg != 4 {
            write_reg(&mut cpu.state, reg, value);
        }
    }
    Ok(())
}

/// `leave`.
pub(crate) fn leave<T: Scalar>(cpu: &mut Vcpu, _: &Op) -> Step {
    let saved = cpu.state.reg(Gpr::Rsp);
    let rbp = cpu.state.reg(Gpr::Rbp);
    let mask = cpu.stack_mask();
    cpu.state
        .set_reg(Gpr::Rsp, if mask == 0xffff { saved & !mask | rbp & mask } else { rbp & mask });
    match cpu.peek::<T>() {
        Ok((value, after)) => {
            cpu.state.set_reg(Gpr::Rsp, after);
            write_reg(&mut cpu.state, 5, value);
            Ok(())
        }
        Err(abort) => {
            cpu.state.set_reg(Gpr::Rsp, saved);
            Err(abort)
        }
    }
}

/// `enter`: `imm` is the frame size, `aux` the nesting level.
pub(crate) fn enter<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let (rsp, rbp) = (cpu.state.reg(Gpr::Rsp), cpu.state.reg(Gpr::Rbp));
    enter_frame::<T>(cpu, op).inspect_err(|_| {
        cpu.state.set_reg(Gpr::Rsp, rsp);
        cpu.state.set_reg(Gpr::Rbp, rbp);
    })
}

fn enter_frame<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let size = u64::from(T::SIZE);
    let level = op.aux & 31;
    cpu.push(read_reg::<T>(&cpu.state, 5))?;
    let frame = cpu.state.reg(Gpr::Rsp);
    for step in 1..u64::from(level) {
        let pointer = cpu.state.reg(Gpr::Rbp).wrapping_sub(size.wrapping_mul(step));
        let mask = cpu.stack_mask();
        let addr = cpu.stack_linear(pointer & mask, size, Access::Read)?;
        let value = cpu.read::<T>(addr)?;
        cpu.push(value)?;
    }
    if level > 0 {
        cpu.push(T::truncate(frame))?;
    }
    let bottom = cpu.moved_stack_pointer(op.imm.wrapping_neg());
    // The manual probes the new top of the stack for writability.
    let addr = cpu.stack_linear(bottom, size, Access::Write)?;
    cpu.probe_write(addr, size)?;
    write_reg(&mut cpu.state, 5, T::truncate(frame));
    cpu.state.set_reg(Gpr::Rsp, bottom);
    Ok(())
}
