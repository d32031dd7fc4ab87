//! Bit tests, with a memory operand's bit string, and bit scans.
//!
//! A bit offset in a register may point far outside the memory operand it comes with:
//! the address is computed here. Locked forms are the host's own locked instruction on
//! the guest's memory.

use core::arch::asm;

use crate::decode::op::{Op, OpFlags, write_reg};
use crate::interp::operand::{Dst, Source, Target};
use crate::memory::access::Scalar;
use crate::mmu::Access;
use crate::state::rflags::RFlags;
use crate::vcpu::{Step, Vcpu};

/// What happens to the bit after it has been copied to the carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// `bt`
    Keep,
    /// `bts`
    Set,
    /// `btr`
    Reset,
    /// `btc`
    Complement,
}

/// [`Then`] as a type.
pub(crate) trait Action {
    const THEN: Then;
}

macro_rules! actions {
    ($($name:ident => $then:ident),*) => {$(
        #[doc = concat!("[`Then::", stringify!($then), "`].")]
        #[derive(Debug)]
        pub(crate) struct $name;
        impl Action for $name {
            const THEN: Then = Then::$then;
        }
    )*};
}
actions!(Bt => Keep, Bts => Set, Btr => Reset, Btc => Complement);

fn changed(value: u64, bit: u64, then: Then) -> u64 {
    match then {
        Then::Keep => value,
        Then::Set => value | bit,
        Then::Reset => value & !bit,
        Then::Complement => value ^ bit,
    }
}

/// `bt` and its kin on a register.
pub(crate) fn test_register<T: Scalar, A: Action, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let offset = S::get::<T>(cpu, op)?.zero_extend() & u64::from(T::BITS).wrapping_sub(1);
    let value = Dst::get::<T>(cpu, op)?.zero_extend();
    let bit = 1 << offset;
    cpu.state.rflags.set(RFlags::CF, value & bit != 0);
    if A::THEN != Then::Keep {
        Dst::set(cpu, op, T::truncate(changed(value, bit, A::THEN)))?;
    }
    Ok(())
}

/// `bt` and its kin on memory; `S` gives the bit offset, signed and unbounded if it
/// comes from a register (`STRING`).
pub(crate) fn test_memory<T: Scalar, A: Action, S: Source, const STRING: bool>(
    cpu: &mut Vcpu,
    op: &Op,
) -> Step {
    let size = u64::from(T::SIZE);
    let offset = S::get::<T>(cpu, op)?;
    let bit = offset.zero_extend() & u64::from(T::BITS).wrapping_sub(1);
    let operand = if STRING {
        let units = (offset.sign_extend() as i64) >> T::BITS.trailing_zeros();
        Op { disp: op.disp.wrapping_add((units as u64).wrapping_mul(size)), ..*op }
    } else {
        *op
    };
    let access = if A::THEN == Then::Keep { Access::Read } else { Access::Write };
    let addr = cpu.linear(&operand, size, access)?;
    let old = if A::THEN == Then::Keep {
        cpu.read::<T>(addr)?
    } else if op.flags.contains(OpFlags::LOCK) {
        cpu.locked_update::<T>(addr, |value| {
            T::truncate(changed(value.zero_extend(), 1 << bit, A::THEN))
        })?
    } else {
        cpu.probe_write(addr, size)?;
        let old = cpu.read::<T>(addr)?;
        cpu.write(addr, T::truncate(changed(old.zero_extend(), 1 << bit, A::THEN)))?;
        old
    };
    cpu.state.rflags.set(RFlags::CF, old.zero_extend() >> bit & 1 != 0);
    Ok(())
}

impl Vcpu {
    /// Replaces the value at `addr` by `change` of it, atomically with respect to the
    /// other vCPUs, and returns the old one. An access that crosses a page (or goes to
    /// a device) is only atomic with respect to nothing: real CPUs lock the bus there,
    /// and Linux avoids it as it avoids fire.
    pub(crate) fn locked_update<T: Scalar>(
        &mut self,
        addr: u64,
        change: impl Fn(T) -> T,
    ) -> Result<T, crate::vcpu::Abort> {
        let Some(host) = self.in_place(addr, u64::from(T::SIZE), Access::Write)? else {
            self.probe_write(addr, u64::from(T::SIZE))?;
            let old = self.read::<T>(addr)?;
            self.write(addr, change(old))?;
            return Ok(old);
        };
        loop {
            // SAFETY: `in_place` says that these bytes are guest RAM within one page.
            let old = unsafe { T::load(host) };
            // SAFETY: as above.
            if unsafe { compare_exchange(host, old, change(old)) } {
                return Ok(old);
            }
        }
    }
}

/// `lock cmpxchg` at any alignment.
///
/// # Safety
/// `T::SIZE` bytes at `host` are mapped writable.
unsafe fn compare_exchange<T: Scalar>(host: *mut u8, old: T, new: T) -> bool {
    let (old, new) = (old.zero_extend(), new.zero_extend());
    macro_rules! exchange {
        ($width:literal, $modifier:literal) => {{
            let equal: u8;
            // SAFETY: the caller vouches for the address; nothing else is touched.
            unsafe {
                asm!(concat!("lock cmpxchg ", $width, " ptr [{host}], {new", $modifier, "}"), "sete {equal}",
                     host = in(reg) host, new = in(reg) new, equal = lateout(reg_byte) equal,
                     inout("rax") old => _, options(nostack));
            }
            equal != 0
        }};
    }
    match T::SIZE {
        1 => exchange!("byte", ":l"),
        2 => exchange!("word", ":x"),
        4 => exchange!("dword", ":e"),
        _ => exchange!("qword", ":r"),
    }
}

/// `bsf` (`REVERSE` false) and `bsr`. With a zero source the destination keeps its
/// value, which AMD documents, Intel does, and Linux relies on.
pub(crate) fn scan<T: Scalar, const REVERSE: bool, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<T>(cpu, op)?.zero_extend();
    cpu.state.rflags.set(RFlags::ZF, value == 0);
    if value == 0 {
        // A 32-bit destination is not even zero-extended here on the CPUs of our time.
        return Ok(());
    }
    let index = if REVERSE { value.checked_ilog2().unwrap_or(0) } else { value.trailing_zeros() };
    write_reg(&mut cpu.state, op.dst, T::truncate(u64::from(index)));
    Ok(())
}
