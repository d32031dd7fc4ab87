//! String instructions: `movs`, `stos`, `lods`, `scas`, `cmps`, alone and repeated.
//!
//! A repeated one is restartable: registers are updated after every element (or batch),
//! so a fault in the middle leaves RCX, RSI and RDI at the element that faulted. The
//! common cases, forward `rep movs` and `rep stos` over RAM, go a page at a time.
//! After a bounded number of elements the block ends with RIP still at the
//! instruction, so that interrupts get in.

use super::alu::Alu;
use super::branch::set_counter;
use crate::addr::room_in_page;
use crate::decode::op::{Op, OpFlags, read_reg, write_reg};
use crate::memory::access::{self, Scalar};
use crate::mmu::{Access, View};
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::state::segment::SegReg;
use crate::vcpu::{Abort, Step, Vcpu};

/// Elements done between looks at pending interrupts.
pub(crate) const BURST: u64 = 4096;

/// One element of a string instruction. Registers are advanced by the caller.
trait Element<T: Alu> {
    /// Whether RSI (first) and RDI (second) are used.
    const POINTERS: (bool, bool);
    /// Whether `repe`/`repne` look at ZF after each element.
    const COMPARES: bool;

    fn one(cpu: &mut Vcpu, op: &Op) -> Result<(), Abort>;

    /// Does up to `count` elements at once, forwards, and says how many (0: none, go
    /// one by one).
    fn bulk(_cpu: &mut Vcpu, _op: &Op, _count: u64) -> Result<u64, Abort> {
        Ok(0)
    }
}

fn source_address<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Result<u64, Abort> {
    let offset = cpu.state.reg(Gpr::Rsi) & op.addr_mask;
    if op.flags.contains(OpFlags::LEGACY) {
        cpu.check_segment(op.seg, offset, u64::from(T::SIZE), Access::Read)?;
        let base = cpu.state.seg_slot(op.seg).base;
        return Ok(base.wrapping_add(offset) & 0xffff_ffff);
    }
    let base = cpu.state.seg_slot(op.seg).base;
    Ok(base.wrapping_add(offset))
}

fn destination_address<T: Scalar>(cpu: &mut Vcpu, op: &Op, access: Access) -> Result<u64, Abort> {
    let offset = cpu.state.reg(Gpr::Rdi) & op.addr_mask;
    cpu.segmented(SegReg::Es, offset, u64::from(T::SIZE), access)
}

/// How many elements from `addr` on lie in the same page, going forwards.
fn within_page<T: Scalar>(addr: u64, count: u64) -> u64 {
    (room_in_page(addr) >> T::SIZE.trailing_zeros()).min(count)
}

/// Whether bulk work is possible at all: forwards, and with addresses that cannot wrap
/// or leave their segment within a page (64-bit code), nor be checked for the alignment of
/// more than an element.
fn may_bulk(cpu: &Vcpu, op: &Op) -> bool {
    !op.flags.contains(OpFlags::LEGACY)
        && op.addr_mask == u64::MAX
        && cpu.mmu.view != View::UserAligned
        && !cpu.state.rflags.contains(RFlags::DF)
}

#[derive(Debug)]
struct Movs;
impl<T: Alu> Element<T> for Movs {
    const POINTERS: (bool, bool) = (true, true);
    const COMPARES: bool = false;

    fn one(cpu: &mut Vcpu, op: &Op) -> Result<(), Abort> {
        let from = source_address::<T>(cpu, op)?;
        let to = destination_address::<T>(cpu, op, Access::Write)?;
        let value = cpu.read::<T>(from)?;
        cpu.write(to, value)
    }

    fn bulk(cpu: &mut Vcpu, op: &Op, count: u64) -> Result<u64, Abort> {
        if !may_bulk(cpu, op) {
            return Ok(0);
        }
        let from = source_address::<T>(cpu, op)?;
        let to = destination_address::<T>(cpu, op, Access::Write)?;
        let count = within_page::<T>(from, within_page::<T>(to, count));
        let len = count.wrapping_mul(u64::from(T::SIZE));
        // A destination just above the source repeats a pattern: element by element.
        if count < 2 || to.wrapping_sub(from) < len {
            return Ok(0);
        }
        let Some(source) = cpu.in_place(from, len, Access::Read)? else { return Ok(0) };
        let Some(target) = cpu.in_place(to, len, Access::Write)? else { return Ok(0) };
        // Filling the TLB for the target may have evicted nothing but the source's
        // entry; the host addresses themselves stay valid RAM.
        if (target as u64).wrapping_sub(source as u64) < len {
            return Ok(0);
        }
        // SAFETY: both are `len` bytes of guest RAM, each within one page.
        unsafe { access::copy(source, target, len as usize) };
        Ok(count)
    }
}

#[derive(Debug)]
struct Stos;
impl<T: Alu> Element<T> for Stos {
    const POINTERS: (bool, bool) = (false, true);
    const COMPARES: bool = false;

    fn one(cpu: &mut Vcpu, op: &Op) -> Result<(), Abort> {
        let to = destination_address::<T>(cpu, op, Access::Write)?;
        let value = read_reg::<T>(&cpu.state, 0);
        cpu.write(to, value)
    }

    fn bulk(cpu: &mut Vcpu, op: &Op, count: u64) -> Result<u64, Abort> {
        if !may_bulk(cpu, op) {
            return Ok(0);
        }
        let to = destination_address::<T>(cpu, op, Access::Write)?;
        let count = within_page::<T>(to, count);
        if count < 2 {
            return Ok(0);
        }
        let len = count.wrapping_mul(u64::from(T::SIZE));
        let Some(target) = cpu.in_place(to, len, Access::Write)? else { return Ok(0) };
        let value = read_reg::<T>(&cpu.state, 0);
        // SAFETY: `len` bytes of guest RAM within one page.
        unsafe { access::fill(target, value, count as usize) };
        Ok(count)
    }
}

#[derive(Debug)]
struct Lods;
impl<T: Alu> Element<T> for Lods {
    const POINTERS: (bool, bool) = (true, false);
    const COMPARES: bool = false;

    fn one(cpu: &mut Vcpu, op: &Op) -> Result<(), Abort> {
        let from = source_address::<T>(cpu, op)?;
        let value = cpu.read::<T>(from)?;
        write_reg(&mut cpu.state, 0, value);
        Ok(())
    }
}

#[derive(Debug)]
struct Scas;
impl<T: Alu> Element<T> for Scas {
    const POINTERS: (bool, bool) = (false, true);
    const COMPARES: bool = true;

    fn one(cpu: &mut Vcpu, op: &Op) -> Result<(), Abort> {
        let at = destination_address::<T>(cpu, op, Access::Read)?;
        let value = cpu.read::<T>(at)?;
        let (_, flags) = T::sub(read_reg(&cpu.state, 0), value);
        cpu.state.rflags = cpu.state.rflags.with_status(flags);
        Ok(())
    }
}

#[derive(Debug)]
struct Cmps;
impl<T: Alu> Element<T> for Cmps {
    const POINTERS: (bool, bool) = (true, true);
    const COMPARES: bool = true;

    fn one(cpu: &mut Vcpu, op: &Op) -> Result<(), Abort> {
        let left = source_address::<T>(cpu, op)?;
        let right = destination_address::<T>(cpu, op, Access::Read)?;
        let left = cpu.read::<T>(left)?;
        let right = cpu.read::<T>(right)?;
        let (_, flags) = T::sub(left, right);
        cpu.state.rflags = cpu.state.rflags.with_status(flags);
        Ok(())
    }
}

/// Moves the pointers on by `count` elements.
fn advance<T: Alu, E: Element<T>>(cpu: &mut Vcpu, op: &Op, count: u64) {
    let distance = count.wrapping_mul(u64::from(T::SIZE));
    let delta =
        if cpu.state.rflags.contains(RFlags::DF) { distance.wrapping_neg() } else { distance };
    for (used, reg) in [(E::POINTERS.0, Gpr::Rsi), (E::POINTERS.1, Gpr::Rdi)] {
        if used {
            let old = cpu.state.reg(reg);
            let moved = old.wrapping_add(delta) & op.addr_mask;
            cpu.state
                .set_reg(reg, if op.addr_mask == 0xffff { old & !0xffff | moved } else { moved });
        }
    }
}

fn string<T: Alu, E: Element<T>>(cpu: &mut Vcpu, op: &Op) -> Step {
    if !op.flags.intersects(OpFlags::REP.union(OpFlags::REPNE)) {
        E::one(cpu, op)?;
        advance::<T, E>(cpu, op, 1);
        return Ok(());
    }
    let mut left = cpu.state.reg(Gpr::Rcx) & op.addr_mask;
    let mut budget = cpu.burst;
    while left != 0 {
        if budget == 0 || cpu.code_hit {
            // RIP is still ours: what is left is taken up again after interrupts.
            cpu.state.rip = op.rip;
            return Err(Abort::EndBlock);
        }
        let mut done = E::bulk(cpu, op, left.min(budget))?;
        if done == 0 {
            E::one(cpu, op)?;
            done = 1;
        }
        advance::<T, E>(cpu, op, done);
        left = left.wrapping_sub(done);
        budget = budget.saturating_sub(done);
        set_counter(cpu, op, left);
        if E::COMPARES && cpu.state.rflags.contains(RFlags::ZF) == op.flags.contains(OpFlags::REPNE)
        {
            break;
        }
    }
    Ok(())
}

macro_rules! handlers {
    ($($name:ident => $element:ident),*) => {$(
        #[doc = concat!("`", stringify!($name), "`, with any prefix.")]
        pub(crate) fn $name<T: Alu>(cpu: &mut Vcpu, op: &Op) -> Step {
            string::<T, $element>(cpu, op)
        }
    )*};
}
handlers!(movs => Movs, stos => Stos, lods => Lods, scas => Scas, cmps => Cmps);
