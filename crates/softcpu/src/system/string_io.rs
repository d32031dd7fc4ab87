//! `ins` and `outs`, with and without `rep`.
//!
//! A repeated one stops after a bounded number of items with registers that say how far
//! it got and RIP still at itself, so that interrupts are taken on the way and it goes
//! on afterwards; the same holds when an item faults. Source: SDM vol. 2, INS, OUTS, REP.

use crate::decode::op::{Op, OpFlags};
use crate::mmu::Access;
use crate::state::SEG_SLOTS;
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::state::segment::SegReg;
use crate::vcpu::{Abort, Step, Vcpu};

/// Items moved before the run loop gets a look at pending events.
const CHUNK: u64 = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

impl Vcpu {
    /// Replaces the part of `reg` that the address size covers.
    fn set_counter(&mut self, reg: Gpr, mask: u64, value: u64) {
        let old = self.state.reg(reg);
        let new = if mask == 0xffff { old & !mask | value & mask } else { value & mask };
        self.state.set_reg(reg, new);
    }

    fn string_address(
        &mut self,
        op: &Op,
        slot: u8,
        offset: u64,
        access: Access,
    ) -> Result<u64, Abort> {
        let size = u64::from(op.size);
        if op.flags.contains(OpFlags::LEGACY) {
            self.check_segment(slot, offset, size, access)?;
        }
        let base = self
            .state
            .seg
            .get(usize::from(slot) & (SEG_SLOTS - 1))
            .map_or(0, |segment| segment.base);
        Ok(self.wrap_linear(base.wrapping_add(offset)))
    }

    fn input_item(&mut self, op: &Op, port: u16) -> Step {
        let offset = self.state.reg(Gpr::Rdi) & op.addr_mask;
        let slot = if op.flags.contains(OpFlags::LONG) {
            crate::state::SEG_FLAT
        } else {
            SegReg::Es as u8
        };
        let addr = self.string_address(op, slot, offset, Access::Write)?;
        // The device must not be read if the store cannot be made.
        self.probe_write(addr, u64::from(op.size))?;
        let value = self.port_in(port, op.size);
        match op.size {
            1 => self.write::<u8>(addr, value as u8),
            2 => self.write::<u16>(addr, value as u16),
            _ => self.write::<u32>(addr, value),
        }
    }

    fn output_item(&mut self, op: &Op, port: u16) -> Step {
        let offset = self.state.reg(Gpr::Rsi) & op.addr_mask;
        let addr = self.string_address(op, op.seg, offset, Access::Read)?;
        let value = match op.size {
            1 => u32::from(self.read::<u8>(addr)?),
            2 => u32::from(self.read::<u16>(addr)?),
            _ => self.read::<u32>(addr)?,
        };
        self.port_out(port, op.size, value);
        Ok(())
    }

    fn string_io(&mut self, op: &Op, direction: Direction) -> Step {
        let port = self.port_in_dx();
        self.require_ports(port, op.size)?;
        let repeated = op.flags.intersects(OpFlags::REP | OpFlags::REPNE);
        let mask = op.addr_mask;
        let mut left = if repeated { self.state.reg(Gpr::Rcx) & mask } else { 1 };
        let mut room = if self.state.rflags.contains(RFlags::TF) { 1 } else { CHUNK };
        let step = if self.state.rflags.contains(RFlags::DF) {
            u64::from(op.size).wrapping_neg()
        } else {
            u64::from(op.size)
        };
        while left != 0 {
            if room == 0 {
                self.state.rip = op.rip;
                return Err(Abort::EndBlock);
            }
            room = room.saturating_sub(1);
            let register = match direction {
                Direction::In => {
                    self.input_item(op, port)?;
                    Gpr::Rdi
                }
                Direction::Out => {
                    self.output_item(op, port)?;
                    Gpr::Rsi
                }
            };
            let next = self.state.reg(register).wrapping_add(step);
            self.set_counter(register, mask, next);
            left = left.wrapping_sub(1);
            if repeated {
                self.set_counter(Gpr::Rcx, mask, left);
            }
        }
        self.end_block(op)
    }
}

/// `insb`, `insw`, `insd`, perhaps with `rep`. `size` is an item's, `addr_mask` the
/// address size's.
pub(crate) fn ins(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.string_io(op, Direction::In)
}

/// `outsb`, `outsw`, `outsd`, perhaps with `rep`. `seg` is the source segment's slot.
pub(crate) fn outs(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.string_io(op, Direction::Out)
}
