//! Multiplication and division.

use super::alu::Alu;
use super::operand::Source;
use crate::decode::op::{HIGH_BYTE, Op, read_reg, write_reg};
use crate::exception::Exception;
use crate::vcpu::{Step, Vcpu};

/// `mul` (`SIGNED` false) and one-operand `imul`: into AX or DX:AX.
pub(crate) fn multiply<T: Alu, const SIGNED: bool, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(cpu, op)?;
    let a = read_reg::<T>(&cpu.state, 0);
    let (low, high, flags) = if SIGNED { T::imul(a, b) } else { T::mul(a, b) };
    write_reg(&mut cpu.state, 0, low);
    write_reg(&mut cpu.state, if T::SIZE == 1 { HIGH_BYTE } else { 2 }, high);
    cpu.state.rflags = cpu.state.rflags.with_status(flags);
    Ok(())
}

/// Two- and three-operand `imul`: the low half into a register.
pub(crate) fn multiply_into<T: Alu, A: Source, B: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let a = A::get::<T>(cpu, op)?;
    let b = B::get::<T>(cpu, op)?;
    let (low, _, flags) = T::imul(a, b);
    write_reg(&mut cpu.state, op.dst, low);
    cpu.state.rflags = cpu.state.rflags.with_status(flags);
    Ok(())
}

/// `div` and `idiv`: of AX or DX:AX.
pub(crate) fn divide<T: Alu, const SIGNED: bool, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let by = S::get::<T>(cpu, op)?;
    let high_register = if T::SIZE == 1 { HIGH_BYTE } else { 2 };
    let low = read_reg::<T>(&cpu.state, 0);
    let high = read_reg::<T>(&cpu.state, high_register);
    let done = if SIGNED { T::idiv(low, high, by) } else { T::div(low, high, by) };
    let Some((quotient, remainder)) = done else {
        return Err(cpu.raise(Exception::divide_error()));
    };
    write_reg(&mut cpu.state, 0, quotient);
    write_reg(&mut cpu.state, high_register, remainder);
    Ok(())
}
