//! Where an instruction's operands are: registers, immediate, memory.
//!
//! Handlers are generic over these marker types; each combination in use becomes a
//! function of its own with nothing left to decide at run time.

use crate::decode::op::{Op, read_reg, write_reg};
use crate::memory::access::Scalar;
use crate::mmu::Access;
use crate::vcpu::{Abort, Vcpu};

/// An operand that can be read.
pub(crate) trait Source {
    /// Its value.
    fn get<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Result<T, Abort>;
}

/// An operand that is read, changed and written back.
pub(crate) trait Target: Source {
    /// How to find it again for the write.
    type Spot: Copy;

    /// Its value, with the assurance that [`Target::put`] will not fault.
    fn fetch<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Result<(T, Self::Spot), Abort>;

    /// Writes it back.
    fn put<T: Scalar>(cpu: &mut Vcpu, op: &Op, spot: Self::Spot, value: T) -> Result<(), Abort>;

    /// Writes it without having read it.
    fn set<T: Scalar>(cpu: &mut Vcpu, op: &Op, value: T) -> Result<(), Abort>;
}

/// The register in [`Op::dst`].
#[derive(Debug)]
pub(crate) struct Dst;
/// The register in [`Op::src`].
#[derive(Debug)]
pub(crate) struct Src;
/// The immediate.
#[derive(Debug)]
pub(crate) struct Imm;
/// The memory operand.
#[derive(Debug)]
pub(crate) struct Mem;

impl Source for Dst {
    #[inline(always)]
    fn get<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Result<T, Abort> {
        Ok(read_reg(&cpu.state, op.dst))
    }
}

impl Target for Dst {
    type Spot = ();

    #[inline(always)]
    fn fetch<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Result<(T, ()), Abort> {
        Ok((read_reg(&cpu.state, op.dst), ()))
    }

    #[inline(always)]
    fn put<T: Scalar>(cpu: &mut Vcpu, op: &Op, (): (), value: T) -> Result<(), Abort> {
        write_reg(&mut cpu.state, op.dst, value);
        Ok(())
    }

    #[inline(always)]
    fn set<T: Scalar>(cpu: &mut Vcpu, op: &Op, value: T) -> Result<(), Abort> {
        write_reg(&mut cpu.state, op.dst, value);
        Ok(())
    }
}

impl Source for Src {
    #[inline(always)]
    fn get<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Result<T, Abort> {
        Ok(read_reg(&cpu.state, op.src))
    }
}

impl Source for Imm {
    #[inline(always)]
    fn get<T: Scalar>(_: &mut Vcpu, op: &Op) -> Result<T, Abort> {
        Ok(T::truncate(op.imm))
    }
}

impl Source for Mem {
    #[inline(always)]
    fn get<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Result<T, Abort> {
        let addr = cpu.linear(op, u64::from(T::SIZE), Access::Read)?;
        cpu.read(addr)
    }
}

/// Where a memory operand is: its linear address and, when it may be written there
/// directly, its host address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    addr: u64,
    host: Option<*mut u8>,
}

impl Target for Mem {
    type Spot = Spot;

    #[inline(always)]
    fn fetch<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Result<(T, Spot), Abort> {
        let addr = cpu.linear(op, u64::from(T::SIZE), Access::Write)?;
        let host = cpu.mmu.data.lookup(cpu.mmu.view, addr, u64::from(T::SIZE), Access::Write);
        let value = match host {
            // SAFETY: a TLB hit: all of the operand lies in one page of guest RAM,
            // which outlives the vCPU.
            Some(host) => unsafe { T::load(host) },
            None => {
                cpu.probe_write(addr, u64::from(T::SIZE))?;
                cpu.read(addr)?
            }
        };
        Ok((value, Spot { addr, host }))
    }

    #[inline(always)]
    fn put<T: Scalar>(cpu: &mut Vcpu, _: &Op, spot: Spot, value: T) -> Result<(), Abort> {
        match spot.host {
            Some(host) => {
                // SAFETY: the write hit of `fetch`, within the same instruction, so
                // nothing can have changed the TLB in between.
                unsafe { T::store(host, value) };
                Ok(())
            }
            None => cpu.write(spot.addr, value),
        }
    }

    #[inline(always)]
    fn set<T: Scalar>(cpu: &mut Vcpu, op: &Op, value: T) -> Result<(), Abort> {
        let addr = cpu.linear(op, u64::from(T::SIZE), Access::Write)?;
        cpu.write(addr, value)
    }
}
