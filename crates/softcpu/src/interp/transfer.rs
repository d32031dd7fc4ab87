//! Moves: `mov`, `movzx`, `movsx`, `lea`, `xchg`, `bswap`, sign extensions of the
//! accumulator, flags through AH, `xlat`, and the no-ops.

use super::operand::{Mem, Source, Target};
use crate::decode::op::{Op, read_reg, write_reg};
use crate::memory::access::Scalar;
use crate::mmu::Access;
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::system::tsc::wait_for_earlier;
use crate::vcpu::{Step, Vcpu};

/// `mov`.
pub(crate) fn mov<T: Scalar, D: Target, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<T>(cpu, op)?;
    D::set(cpu, op, value)
}

/// `movzx`: from `F` to `T`.
pub(crate) fn move_zero<T: Scalar, F: Scalar, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<F>(cpu, op)?;
    write_reg(&mut cpu.state, op.dst, T::truncate(value.zero_extend()));
    Ok(())
}

/// `movsx` and `movsxd`.
pub(crate) fn move_sign<T: Scalar, F: Scalar, S: Source>(cpu: &mut Vcpu, op: &Op) -> Step {
    let value = S::get::<F>(cpu, op)?;
    write_reg(&mut cpu.state, op.dst, T::truncate(value.sign_extend()));
    Ok(())
}

/// `lea`.
pub(crate) fn lea<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let address = op.effective(&cpu.state);
    write_reg(&mut cpu.state, op.dst, T::truncate(address));
    Ok(())
}

/// `xchg` of two registers. (With memory it is locked, and a native stub.)
pub(crate) fn exchange<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let (a, b) = (read_reg::<T>(&cpu.state, op.dst), read_reg::<T>(&cpu.state, op.src));
    write_reg(&mut cpu.state, op.dst, b);
    write_reg(&mut cpu.state, op.src, a);
    Ok(())
}

/// `bswap`. With a 16-bit operand the result is undefined; CPUs give zero.
pub(crate) fn byte_swap(cpu: &mut Vcpu, op: &Op) -> Step {
    match op.size {
        8 => {
            let value = read_reg::<u64>(&cpu.state, op.dst).swap_bytes();
            write_reg(&mut cpu.state, op.dst, value);
        }
        4 => {
            let value = read_reg::<u32>(&cpu.state, op.dst).swap_bytes();
            write_reg(&mut cpu.state, op.dst, value);
        }
        _ => write_reg(&mut cpu.state, op.dst, 0_u16),
    }
    Ok(())
}

/// `cbw`, `cwde`, `cdqe`: sign-extends the lower half of the accumulator into it.
pub(crate) fn extend_accumulator(cpu: &mut Vcpu, op: &Op) -> Step {
    let rax = cpu.state.reg(Gpr::Rax);
    match op.size {
        8 => write_reg(&mut cpu.state, 0, (rax as u32).sign_extend()),
        4 => write_reg(&mut cpu.state, 0, (rax as u16).sign_extend() as u32),
        _ => write_reg(&mut cpu.state, 0, (rax as u8).sign_extend() as u16),
    }
    Ok(())
}

/// `cwd`, `cdq`, `cqo`: fills DX with the accumulator's sign.
pub(crate) fn sign_to_dx(cpu: &mut Vcpu, op: &Op) -> Step {
    let rax = cpu.state.reg(Gpr::Rax);
    match op.size {
        8 => write_reg(&mut cpu.state, 2, (rax as i64 >> 63) as u64),
        4 => write_reg(&mut cpu.state, 2, (rax as i32 >> 31) as u32),
        _ => write_reg(&mut cpu.state, 2, (rax as i16 >> 15) as u16),
    }
    Ok(())
}

/// The flags that LAHF and SAHF carry.
const AH_FLAGS: RFlags =
    RFlags::SF.union(RFlags::ZF).union(RFlags::AF).union(RFlags::PF).union(RFlags::CF);

/// `lahf`.
pub(crate) fn load_ah(cpu: &mut Vcpu, _: &Op) -> Step {
    let image = (cpu.state.rflags & AH_FLAGS | RFlags::FIXED).bits();
    write_reg(&mut cpu.state, crate::decode::op::HIGH_BYTE, image as u8);
    Ok(())
}

/// `sahf`.
pub(crate) fn store_ah(cpu: &mut Vcpu, _: &Op) -> Step {
    let image = RFlags::from_bits_retain(u64::from(read_reg::<u8>(
        &cpu.state,
        crate::decode::op::HIGH_BYTE,
    )));
    cpu.state.rflags = cpu.state.rflags.difference(AH_FLAGS) | (image & AH_FLAGS);
    Ok(())
}

/// `xlat`: AL = the byte at BX + AL. Decode gives BX as the base and no index.
pub(crate) fn translate(cpu: &mut Vcpu, op: &Op) -> Step {
    let al = read_reg::<u8>(&cpu.state, 0);
    let indexed = Op { disp: op.disp.wrapping_add(u64::from(al)), ..*op };
    let value = Mem::get::<u8>(cpu, &indexed)?;
    write_reg(&mut cpu.state, 0, value);
    Ok(())
}

/// `nop`, prefetches and hints.
pub(crate) fn nop(_: &mut Vcpu, _: &Op) -> Step {
    Ok(())
}

/// `clflush` and its kin: memory here is always coherent, but the address must be readable.
pub(crate) fn touch(cpu: &mut Vcpu, op: &Op) -> Step {
    Mem::get::<u8>(cpu, op).map(|_| ())
}

/// Fences: a full one serves them all, with one more for what is no access (`rdtsc`).
pub(crate) fn fence(_: &mut Vcpu, _: &Op) -> Step {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    wait_for_earlier();
    Ok(())
}

/// `pause`: a spinning vCPU lets its host core's sibling work.
pub(crate) fn pause(_: &mut Vcpu, _: &Op) -> Step {
    std::hint::spin_loop();
    Ok(())
}

/// `clc`, `stc`, `cmc`, `cld`, `std`: `imm` holds the flags to clear and, above bit 32,
/// those to set; a flag in both is complemented.
pub(crate) fn change_flags(cpu: &mut Vcpu, op: &Op) -> Step {
    let clear = RFlags::from_bits_retain(op.imm & 0xffff_ffff);
    let set = RFlags::from_bits_retain(op.imm >> 32);
    let flip = clear & set;
    let kept = cpu.state.rflags.difference(clear.difference(flip));
    cpu.state.rflags = (kept | set.difference(flip)) ^ flip;
    Ok(())
}

/// `salc`, undocumented: AL = carry ? FF : 0.
pub(crate) fn set_al_on_carry(cpu: &mut Vcpu, _: &Op) -> Step {
    let al = if cpu.state.rflags.contains(RFlags::CF) { 0xff_u8 } else { 0 };
    write_reg(&mut cpu.state, 0, al);
    Ok(())
}

/// `movbe` and other single loads of a given size are native; this one is `mov` from a
/// segment register: `imm` is its number.
pub(crate) fn from_segment<D: Target>(cpu: &mut Vcpu, op: &Op) -> Step {
    let selector = cpu.state.seg.get(op.imm as usize).map_or(0, |segment| segment.selector);
    match op.size {
        8 => D::set(cpu, op, u64::from(selector)),
        4 => D::set(cpu, op, u32::from(selector)),
        _ => D::set(cpu, op, selector),
    }
}

/// `bound`: raises `#BR` when the register is outside the two bounds in memory.
pub(crate) fn bound<T: Scalar>(cpu: &mut Vcpu, op: &Op) -> Step {
    let addr = cpu.linear(op, u64::from(T::SIZE) * 2, Access::Read)?;
    let low = cpu.read::<T>(addr)?.sign_extend() as i64;
    let high = cpu.read::<T>(addr.wrapping_add(u64::from(T::SIZE)))?.sign_extend() as i64;
    let index = read_reg::<T>(&cpu.state, op.dst).sign_extend() as i64;
    if index < low || index > high {
        return Err(cpu.raise(crate::exception::Exception::bound_range()));
    }
    Ok(())
}

/// `ud0`, `ud1`, `ud2` and everything decode does not accept.
pub(crate) fn undefined(cpu: &mut Vcpu, _: &Op) -> Step {
    Err(cpu.ud())
}

/// Ends a block that runs into another: `imm` is where it goes on.
pub(crate) fn fall_through(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.state.rip = op.imm;
    Ok(())
}
