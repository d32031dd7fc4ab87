//! The x87 environment in memory: FNSTENV, FLDENV, FNSAVE, FRSTOR, and the last-opcode
//! register.
//!
//! On the host these would store (or fault on) the addresses of our stubs, so they are
//! done on the image. Formats: SDM vol. 1, 8.1.10. FCS and FDS read as zero, as CPUID
//! announces.

use crate::decode::op::Op;
use crate::mmu::Access;
use crate::state::control::Cr0;
use crate::state::fpu::{FpuState, Pointers, X87_EXCEPTIONS, put, u16_at, u32_at};
use crate::vcpu::{Abort, Step, Vcpu};

use super::classify::Traits;
use super::exec::{require, x87_error};

/// Eighty-bit registers in FNSAVE's image: eight of ten bytes.
const REGISTERS: usize = 80;
/// The largest image.
const LARGEST: usize = 108;

/// FOP of the x87 instruction encoded by `bytes`: the low three bits of its first
/// opcode byte and its ModR/M byte (SDM vol. 1, 8.1.9).
pub(super) fn fop(bytes: &[u8]) -> u16 {
    let mut rest = bytes.iter().skip_while(|byte| !matches!(byte, 0xd8..=0xdf));
    match (rest.next(), rest.next()) {
        (Some(opcode), Some(modrm)) => u16::from(opcode & 7) << 8 | u16::from(*modrm),
        _ => 0,
    }
}

/// FNSTENV: `SIZE` is 14 or 28 by operand size. Masks every exception afterwards.
pub(super) fn fnstenv<const SIZE: usize>(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, Traits::X87)?;
    let addr = cpu.linear(op, SIZE as u64, Access::Write)?;
    let mut image = [0; LARGEST];
    store_environment(cpu, &mut image, SIZE == 28);
    cpu.write_bytes(addr, image.get(..SIZE).unwrap_or_default())?;
    let fcw = cpu.state.fpu.control() | X87_EXCEPTIONS;
    cpu.state.fpu.set_control(fcw);
    Ok(())
}

/// FNSAVE: `SIZE` is 94 or 108. Initialises the unit afterwards.
pub(super) fn fnsave<const SIZE: usize>(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, Traits::X87)?;
    let addr = cpu.linear(op, SIZE as u64, Access::Write)?;
    let mut image = [0; LARGEST];
    store_environment(cpu, &mut image, SIZE == LARGEST);
    let start = SIZE.saturating_sub(REGISTERS);
    for i in 0..8_u8 {
        put(
            &mut image,
            start.saturating_add(usize::from(i).saturating_mul(10)),
            &cpu.state.fpu.st(i),
        );
    }
    cpu.write_bytes(addr, image.get(..SIZE).unwrap_or_default())?;
    cpu.state.fpu.init();
    Ok(())
}

/// FLDENV: `SIZE` is 14 or 28.
pub(super) fn fldenv<const SIZE: usize>(cpu: &mut Vcpu, op: &Op) -> Step {
    let image = read_image(cpu, op, SIZE)?;
    load_environment(cpu, &image, SIZE == 28);
    Ok(())
}

/// FRSTOR: `SIZE` is 94 or 108.
pub(super) fn frstor<const SIZE: usize>(cpu: &mut Vcpu, op: &Op) -> Step {
    let image = read_image(cpu, op, SIZE)?;
    load_environment(cpu, &image, SIZE == LARGEST);
    let registers = image.get(SIZE.saturating_sub(REGISTERS)..).unwrap_or_default();
    for (i, value) in registers.chunks_exact(10).take(8).enumerate() {
        if let Some(value) = value.first_chunk() {
            cpu.state.fpu.set_st(i as u8, value);
        }
    }
    Ok(())
}

fn read_image(cpu: &mut Vcpu, op: &Op, size: usize) -> Result<[u8; LARGEST], Abort> {
    require(cpu, Traits::X87)?;
    if cpu.state.fpu.pending() {
        return Err(x87_error(cpu));
    }
    let addr = cpu.linear(op, size as u64, Access::Read)?;
    let mut image = [0; LARGEST];
    cpu.read_bytes(addr, image.get_mut(..size).unwrap_or_default())?;
    Ok(image)
}

/// The seven words of the environment, four bytes apart when `wide`, else two.
fn store_environment(cpu: &Vcpu, image: &mut [u8; LARGEST], wide: bool) {
    let fpu = &cpu.state.fpu;
    let Pointers { opcode, instruction, data } = fpu.pointers();
    let (ip, dp) = (instruction as u32, data as u32);
    let fop = u32::from(opcode);
    let head = [fpu.control(), fpu.status(), full_tags(fpu)];
    let tail = match (wide, cpu.state.cr0.contains(Cr0::PE)) {
        (true, true) => [ip, fop << 16, dp, 0xffff_0000],
        // Real mode packs linear addresses and the opcode together.
        (true, false) => [ip & 0xffff, (ip >> 16) << 12 | fop, dp & 0xffff, (dp >> 16) << 12],
        (false, true) => [ip, 0, dp, 0],
        (false, false) => [ip, (ip >> 4) & 0xf000 | fop, dp, (dp >> 4) & 0xf000],
    };
    let stride = if wide { 4 } else { 2 };
    // Upper halves of the first three are reserved and stored as ones.
    let words = head.iter().map(|word| 0xffff_0000 | u32::from(*word)).chain(tail);
    for (slot, word) in image.chunks_exact_mut(stride).zip(words) {
        put(slot, 0, &word.to_le_bytes());
    }
}

fn load_environment(cpu: &mut Vcpu, image: &[u8; LARGEST], wide: bool) {
    let word = |i: usize| {
        let stride = if wide { 4_usize } else { 2 };
        let at = i.saturating_mul(stride);
        if wide { u32_at(image, at) } else { u32::from(u16_at(image, at)) }
    };
    let pointers = match (wide, cpu.state.cr0.contains(Cr0::PE)) {
        (true, true) => Pointers {
            opcode: (word(4) >> 16) as u16,
            instruction: u64::from(word(3)),
            data: u64::from(word(5)),
        },
        (true, false) => Pointers {
            opcode: word(4) as u16,
            instruction: u64::from(word(3) & 0xffff | (word(4) & 0x0fff_f000) << 4),
            data: u64::from(word(5) & 0xffff | (word(6) & 0x0fff_f000) << 4),
        },
        (false, true) => {
            Pointers { opcode: 0, instruction: u64::from(word(3)), data: u64::from(word(5)) }
        }
        (false, false) => Pointers {
            opcode: word(4) as u16,
            instruction: u64::from(word(3) | (word(4) & 0xf000) << 4),
            data: u64::from(word(5) | (word(6) & 0xf000) << 4),
        },
    };
    let fpu = &mut cpu.state.fpu;
    fpu.set_environment(word(0) as u16, word(1) as u16, abridged_tags(word(2) as u16));
    fpu.set_pointers(pointers);
}

/// The tag word in full, two bits per physical register: valid, zero, special, empty.
fn full_tags(fpu: &FpuState) -> u16 {
    (0..8_u8).fold(0, |tags, physical| {
        let tag = if fpu.tags() >> physical & 1 == 0 {
            3
        } else {
            classify(&fpu.st(physical.wrapping_sub(fpu.top()) & 7))
        };
        tags | tag << (physical << 1)
    })
}

/// 0 valid, 1 zero, 2 special (not a normal number).
fn classify(value: &[u8; 10]) -> u16 {
    let [significand @ .., low, high] = value;
    let exponent = u16::from_le_bytes([*low, *high]) & 0x7fff;
    let significand = u64::from_le_bytes(*significand);
    match (exponent, significand >> 63) {
        (0, _) if significand == 0 => 1,
        (0 | 0x7fff, _) | (_, 0) => 2,
        _ => 0,
    }
}

fn abridged_tags(full: u16) -> u8 {
    (0..8).fold(0, |tags, i| tags | u8::from(full >> (i << 1) & 3 != 3) << i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opcodes_are_found_behind_prefixes() {
        assert_eq!(fop(&[0xd9, 0xe8]), 0x1e8);
        assert_eq!(fop(&[0x66, 0x41, 0xdd, 0x04, 0x24]), 0x504);
        assert_eq!(fop(&[0x90]), 0);
    }

    #[test]
    fn tags_tell_kinds_of_numbers_apart() {
        assert_eq!(classify(&[0; 10]), 1);
        assert_eq!(classify(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]), 0);
        assert_eq!(classify(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 2);
        assert_eq!(classify(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f]), 2);
        assert_eq!(abridged_tags(0xffff), 0);
        assert_eq!(abridged_tags(0b0111), 0xfe);
    }
}
