//! Two-operand and one-operand integer arithmetic: add, or, adc, sbb, and, sub, xor,
//! cmp, test, inc, dec, neg, not.

use super::alu::Alu;
use super::operand::{Source, Target};
use crate::decode::op::Op;
use crate::state::rflags::RFlags;
use crate::vcpu::{Step, Vcpu};

/// An operation on two values.
pub(crate) trait Binary {
    /// Result and status flags.
    fn apply<T: Alu>(a: T, b: T, flags: RFlags) -> (T, u64);
}

macro_rules! binary {
    ($($name:ident => $method:ident),*) => {$(
        #[doc = concat!("`", stringify!($method), "`.")]
        #[derive(Debug)]
        pub(crate) struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn apply<T: Alu>(a: T, b: T, _: RFlags) -> (T, u64) {
                T::$method(a, b)
            }
        }
    )*};
}
binary!(Add => add, Or => or, And => and, Sub => sub, Xor => xor);

/// `adc`.
#[derive(Debug)]
pub(crate) struct Adc;
impl Binary for Adc {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: RFlags) -> (T, u64) {
        T::adc(a, b, flags.bits())
    }
}

/// `sbb`.
#[derive(Debug)]
pub(crate) struct Sbb;
impl Binary for Sbb {
    #[inline(always)]
    fn apply<T: Alu>(a: T, b: T, flags: RFlags) -> (T, u64) {
        T::sbb(a, b, flags.bits())
    }
}

/// `target = target OP source`.
pub(crate) fn binary<T: Alu, O: Binary, D: Target, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(cpu, op)?;
    let (a, spot) = D::fetch::<T>(cpu, op)?;
    let (result, flags) = O::apply(a, b, cpu.state.rflags);
    D::put(cpu, op, spot, result)?;
    cpu.state.rflags = cpu.state.rflags.with_status(flags);
    Ok(())
}

/// `cmp` and `test`: flags only.
pub(crate) fn compare<T: Alu, O: Binary, D: Source, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let b = S::get::<T>(cpu, op)?;
    let a = D::get::<T>(cpu, op)?;
    let (_, flags) = O::apply(a, b, cpu.state.rflags);
    cpu.state.rflags = cpu.state.rflags.with_status(flags);
    Ok(())
}

/// An operation on one value. The old flags come in because some are kept.
pub(crate) trait Unary {
    /// Result and status flags.
    fn apply<T: Alu>(a: T, flags: RFlags) -> (T, RFlags);
}

/// Flags of `inc` and `dec`: all but the carry.
fn keep_carry(old: RFlags, new: u64) -> RFlags {
    let carry = old & RFlags::CF;
    old.with_status(new).difference(RFlags::CF) | carry
}

/// `inc`.
#[derive(Debug)]
pub(crate) struct Inc;
impl Unary for Inc {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: RFlags) -> (T, RFlags) {
        let (result, new) = T::inc(a);
        (result, keep_carry(flags, new))
    }
}

/// `dec`.
#[derive(Debug)]
pub(crate) struct Dec;
impl Unary for Dec {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: RFlags) -> (T, RFlags) {
        let (result, new) = T::dec(a);
        (result, keep_carry(flags, new))
    }
}

/// `neg`.
#[derive(Debug)]
pub(crate) struct Neg;
impl Unary for Neg {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: RFlags) -> (T, RFlags) {
        let (result, new) = T::neg(a);
        (result, flags.with_status(new))
    }
}

/// `not`, which leaves the flags alone.
#[derive(Debug)]
pub(crate) struct Not;
impl Unary for Not {
    #[inline(always)]
    fn apply<T: Alu>(a: T, flags: RFlags) -> (T, RFlags) {
        (T::truncate(!a.zero_extend()), flags)
    }
}

/// `target = OP target`.
pub(crate) fn unary<T: Alu, O: Unary, D: Target>(cpu: &mut Vcpu, op: &Op) -> Step {
    let (a, spot) = D::fetch::<T>(cpu, op)?;
    let (result, flags) = O::apply(a, cpu.state.rflags);
    D::put(cpu, op, spot, result)?;
    cpu.state.rflags = flags;
    Ok(())
}
