//! Shifts and rotates.
//!
//! The count is masked to five bits (six for 64-bit operands); a masked count of zero
//! changes no flag but still counts as a write of the destination.

use super::alu::Alu;
use super::operand::Target;
use crate::decode::op::{Op, read_reg};
use crate::state::rflags::RFlags;
use crate::vcpu::{Abort, Step, Vcpu};

/// Where the count is.
pub(crate) trait Count {
    /// The count, unmasked.
    fn get(cpu: &mut Vcpu, op: &Op) -> Result<u8, Abort>;
}

/// The immediate (or an implied one).
#[derive(Debug)]
pub(crate) struct ByImm;
/// CL.
#[derive(Debug)]
pub(crate) struct ByCl;

impl Count for ByImm {
    #[inline(always)]
    fn get(_: &mut Vcpu, op: &Op) -> Result<u8, Abort> {
        Ok(op.imm as u8)
    }
}

impl Count for ByCl {
    #[inline(always)]
    fn get(cpu: &mut Vcpu, _: &Op) -> Result<u8, Abort> {
        Ok(read_reg(&cpu.state, 1))
    }
}

/// A shift or rotate by a count that is not zero.
pub(crate) trait Shift {
    /// The flags it changes.
    const CHANGES: RFlags;
    /// Result and status flags.
    fn apply<T: Alu>(a: T, count: u8, flags: RFlags) -> (T, u64);
}

macro_rules! shifts {
    ($($name:ident => $method:ident, $changes:expr;)*) => {$(
        #[doc = concat!("`", stringify!($method), "`.")]
        #[derive(Debug)]
        pub(crate) struct $name;
        impl Shift for $name {
            const CHANGES: RFlags = $changes;
            #[inline(always)]
            fn apply<T: Alu>(a: T, count: u8, flags: RFlags) -> (T, u64) {
                T::$method(a, count, flags.bits())
            }
        }
    )*};
}
shifts! {
    Shl => shl, RFlags::STATUS;
    Shr => shr, RFlags::STATUS;
    Sar => sar, RFlags::STATUS;
    Rol => rol, RFlags::CF.union(RFlags::OF);
    Ror => ror, RFlags::CF.union(RFlags::OF);
    Rcl => rcl, RFlags::CF.union(RFlags::OF);
    Rcr => rcr, RFlags::CF.union(RFlags::OF);
}

/// `target = target OP count`.
pub(crate) fn shift<T: Alu, O: Shift, D: Target, C: Count>(cpu: &mut Vcpu, op: &Op) -> Step {
    let count = C::get(cpu, op)? & if T::SIZE == 8 { 63 } else { 31 };
    let (a, spot) = D::fetch::<T>(cpu, op)?;
    if count == 0 {
        return D::put(cpu, op, spot, a);
    }
    let (result, flags) = O::apply(a, count, cpu.state.rflags);
    D::put(cpu, op, spot, result)?;
    let changed = cpu.state.rflags.with_status(flags) & O::CHANGES;
    cpu.state.rflags = cpu.state.rflags.difference(O::CHANGES) | changed;
    Ok(())
}
