//! Decimal adjustments, which exist only outside 64-bit mode and therefore cannot be
//! run on the host: `daa`, `das`, `aaa`, `aas`, `aam`, `aad` (SDM vol. 2).

use super::alu::Alu;
use crate::decode::op::{HIGH_BYTE, Op, read_reg, write_reg};
use crate::exception::Exception;
use crate::state::rflags::RFlags;
use crate::vcpu::{Step, Vcpu};

fn carries(flags: RFlags) -> (bool, bool) {
    (flags.contains(RFlags::AF), flags.contains(RFlags::CF))
}

/// Flags after an adjustment whose result is `al`: the sign, zero and parity of `al`.
fn set_result(cpu: &mut Vcpu, al: u8, adjust: bool, carry: bool) {
    let (_, flags) = u8::or(al, al);
    let mut flags = cpu.state.rflags.with_status(flags);
    flags.set(RFlags::AF, adjust);
    flags.set(RFlags::CF, carry);
    cpu.state.rflags = flags;
}

/// `daa` (`SUBTRACT` false) and `das`.
pub(crate) fn decimal<const SUBTRACT: bool>(cpu: &mut Vcpu, _: &Op) -> Step {
    let old = read_reg::<u8>(&cpu.state, 0);
    let (adjust, carry) = carries(cpu.state.rflags);
    let (mut al, mut carry_out) = (old, carry);
    let low = old & 0xf > 9 || adjust;
    if low {
        let (next, overflow) = if SUBTRACT { al.overflowing_sub(6) } else { al.overflowing_add(6) };
        al = next;
        carry_out |= overflow;
    }
    if old > 0x99 || carry {
        al = if SUBTRACT { al.wrapping_sub(0x60) } else { al.wrapping_add(0x60) };
        carry_out = true;
    }
    write_reg(&mut cpu.state, 0, al);
    set_result(cpu, al, low, carry_out);
    Ok(())
}

/// `aaa` (`SUBTRACT` false) and `aas`.
pub(crate) fn ascii<const SUBTRACT: bool>(cpu: &mut Vcpu, _: &Op) -> Step {
    let ax = read_reg::<u16>(&cpu.state, 0);
    let (adjust, _) = carries(cpu.state.rflags);
    let fix = ax & 0xf > 9 || adjust;
    let fixed = match (fix, SUBTRACT) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    let result = fixed & 0xff0f;
    write_reg(&mut cpu.state, 0, result);
    set_result(cpu, result as u8, fix, fix);
    Ok(())
}

/// `aam`: AL into two digits of base `imm`.
pub(crate) fn after_multiply(cpu: &mut Vcpu, op: &Op) -> Step {
    let al = read_reg::<u8>(&cpu.state, 0);
    let base = op.imm as u8;
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(cpu.raise(Exception::divide_error()));
    };
    write_reg(&mut cpu.state, 0, low);
    write_reg(&mut cpu.state, HIGH_BYTE, high);
    set_result(cpu, low, false, false);
    Ok(())
}

/// `aad`: two digits of base `imm` into AL.
pub(crate) fn before_divide(cpu: &mut Vcpu, op: &Op) -> Step {
    let [al, ah] = read_reg::<u16>(&cpu.state, 0).to_le_bytes();
    let result = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    write_reg(&mut cpu.state, 0, u16::from(result));
    set_result(cpu, result, false, false);
    Ok(())
}
