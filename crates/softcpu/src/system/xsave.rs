//! Saving and restoring x87 and vector state: FXSAVE, FXRSTOR, XSAVE and its variants,
//! XRSTOR, LDMXCSR, STMXCSR (SDM vol. 1, chapter 13; vol. 2).
//!
//! XCR0 knows x87, SSE and AVX, so the standard and the compacted format put everything
//! in the same place. Of the variants there are XSAVEOPT (init optimisation only) and
//! XSAVEC; not XSAVES, nor XGETBV with ECX = 1: CPUID leaf 0Dh, sub-leaf 1 says EAX = 3.
//!
//! The decoder reaches these through [`crate::native`].

use crate::decode::op::{Op, OpFlags};
use crate::exception::Exception;
use crate::mmu::Access;
use crate::native::{Unit, require};
use crate::state::VcpuState;
use crate::state::control::{Cr0, Cr4};
use crate::state::fpu::{
    FpuState, MXCSR_MASK, MXCSR_RESET, Pointers, XCR0_AVX, XCR0_SSE, XCR0_X87, image, put, u16_at,
    u32_at, u64_at,
};
use crate::vcpu::{Abort, Step, Vcpu};

/// The legacy region.
const LEGACY: usize = 512;
/// Legacy region and header.
const WITH_HEADER: usize = 576;
/// Everything: AVX's 256 bytes come right after the header.
const WHOLE: usize = 832;
/// Bytes of the AVX component.
const AVX_SIZE: usize = WHOLE - WITH_HEADER;
/// In the header: XCOMP_BV.
const XCOMP_BV: usize = LEGACY + 8;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;

/// How many vector registers the code at hand can name.
const fn registers(op: &Op) -> usize {
    if op.flags.contains(OpFlags::LEGACY) { 8 } else { 16 }
}

/// FXSAVE; `WIDE` with REX.W: pointers of 64 bits.
pub(crate) fn fxsave<const WIDE: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, Unit::X87)?;
    let addr = area(cpu, op, LEGACY, 16, Access::Write)?;
    let mut data = [0; LEGACY];
    store_x87(&cpu.state.fpu, &mut data, WIDE);
    store_mxcsr(&cpu.state, &mut data);
    store_sse(&cpu.state, &mut data, registers(op));
    // What lies beyond the last register is left alone.
    let end = image::XMM.saturating_add(registers(op).saturating_mul(16));
    cpu.probe_write(addr, LEGACY as u64)?;
    cpu.write_bytes(addr, data.get(..end).unwrap_or_default())
}

/// FXRSTOR.
pub(crate) fn fxrstor<const WIDE: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, Unit::X87)?;
    let addr = area(cpu, op, LEGACY, 16, Access::Read)?;
    let mut data = [0; LEGACY];
    cpu.read_bytes(addr, &mut data)?;
    let mxcsr = checked_mxcsr(cpu, u32_at(&data, image::MXCSR))?;
    load_x87(&mut cpu.state.fpu, &data, WIDE);
    cpu.state.mxcsr = mxcsr;
    load_sse(&mut cpu.state, &data, registers(op));
    Ok(())
}

/// XSAVE.
pub(crate) fn xsave<const WIDE: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    save(cpu, op, WIDE, Variant::Plain)
}

/// XSAVEOPT: components in their initial state are not written.
pub(crate) fn xsaveopt<const WIDE: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    save(cpu, op, WIDE, Variant::Optimised)
}

/// XSAVEC: the same in the compacted format.
pub(crate) fn xsavec<const WIDE: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    save(cpu, op, WIDE, Variant::Compacted)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Plain,
    Optimised,
    Compacted,
}

fn save(cpu: &mut Vcpu, op: &Op, wide: bool, variant: Variant) -> Step {
    let requested = requested(cpu)?;
    let size = if requested & XCR0_AVX != 0 { WHOLE } else { WITH_HEADER };
    let addr = area(cpu, op, size, 64, Access::Write)?;
    let count = registers(op);
    let in_use = in_use(&cpu.state, count, variant) & requested;
    let written = if variant == Variant::Plain { requested } else { in_use };

    let mut data = [0; WHOLE];
    // Nothing is stored before everything is known to be writable.
    cpu.probe_write(addr, size as u64)?;
    let header = if variant == Variant::Compacted {
        in_use
    } else {
        let old = cpu.read::<u64>(addr.wrapping_add(LEGACY as u64))?;
        old & !requested | in_use
    };
    store_x87(&cpu.state.fpu, &mut data, wide);
    store_mxcsr(&cpu.state, &mut data);
    store_sse(&cpu.state, &mut data, count);
    store_avx(&cpu.state, &mut data, count);

    let mut copy = |from: usize, len: usize| {
        let piece = data.get(from..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        cpu.write_bytes(addr.wrapping_add(from as u64), piece)
    };
    if written & XCR0_X87 != 0 {
        copy(0, image::MXCSR)?;
        copy(image::ST, image::XMM - image::ST)?;
    }
    let with_mxcsr = match variant {
        Variant::Compacted => written & XCR0_SSE,
        // Tied to the request and not to what is in use (SDM vol. 1, 13.7).
        Variant::Plain | Variant::Optimised => requested & (XCR0_SSE | XCR0_AVX),
    };
    if with_mxcsr != 0 {
        copy(image::MXCSR, 8)?;
    }
    if written & XCR0_SSE != 0 {
        copy(image::XMM, count.saturating_mul(16))?;
    }
    if written & XCR0_AVX != 0 {
        copy(WITH_HEADER, count.saturating_mul(16))?;
    }
    cpu.write(addr.wrapping_add(LEGACY as u64), header)?;
    if variant == Variant::Compacted {
        cpu.write(addr.wrapping_add(XCOMP_BV as u64), requested | COMPACTED)?;
    }
    Ok(())
}

/// XRSTOR, of either format.
pub(crate) fn xrstor<const WIDE: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    let requested = requested(cpu)?;
    let addr = area(cpu, op, WITH_HEADER, 64, Access::Read)?;
    let mut data = [0; WHOLE];
    cpu.read_bytes(addr, data.get_mut(..WITH_HEADER).unwrap_or_default())?;
    let (present, layout) = (u64_at(&data, LEGACY), u64_at(&data, XCOMP_BV));
    let compacted = layout & COMPACTED != 0;
    let header = data.get(LEGACY..WITH_HEADER).unwrap_or_default();
    let components = if compacted { layout & !COMPACTED } else { cpu.state.xcr0 };
    // Reserved: bytes 63..16 of a compacted header, 23..8 of a standard one.
    let reserved = if compacted { header.get(16..) } else { header.get(8..24) };
    let dirty = reserved.is_some_and(|bytes| bytes.iter().any(|byte| *byte != 0));
    if dirty || components & !cpu.state.xcr0 != 0 || present & !components != 0 {
        return Err(cpu.gp(0));
    }
    let loaded = requested & present;
    if loaded & XCR0_AVX != 0 {
        let at = area(cpu, op, WHOLE, 64, Access::Read)?.wrapping_add(WITH_HEADER as u64);
        cpu.read_bytes(at, data.get_mut(WITH_HEADER..).unwrap_or_default())?;
    }
    // MXCSR goes with SSE and AVX, whether they are present or not; when compacted, with
    // SSE alone (SDM vol. 1, 13.8).
    let mxcsr = if compacted { loaded & XCR0_SSE } else { requested & (XCR0_SSE | XCR0_AVX) };
    if mxcsr != 0 {
        cpu.state.mxcsr = checked_mxcsr(cpu, u32_at(&data, image::MXCSR))?;
    } else if compacted && requested & XCR0_SSE != 0 {
        cpu.state.mxcsr = MXCSR_RESET;
    }
    let (state, count) = (&mut cpu.state, registers(op));
    if requested & XCR0_X87 != 0 {
        if loaded & XCR0_X87 != 0 {
            load_x87(&mut state.fpu, &data, WIDE);
        } else {
            state.fpu = FpuState::at_reset();
        }
    }
    // What is not present is zero in `data` only if it was not read: clear it.
    if requested & XCR0_SSE != 0 {
        if loaded & XCR0_SSE == 0 {
            put(&mut data, image::XMM, &[0; 256]);
        }
        load_sse(state, &data, count);
    }
    if requested & XCR0_AVX != 0 {
        load_avx(state, &data, count);
    }
    Ok(())
}

/// LDMXCSR; `VEX` for VLDMXCSR.
pub(crate) fn ldmxcsr<const VEX: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, if VEX { Unit::Avx } else { Unit::Sse })?;
    let addr = cpu.linear(op, 4, Access::Read)?;
    let value = cpu.read::<u32>(addr)?;
    cpu.state.mxcsr = checked_mxcsr(cpu, value)?;
    Ok(())
}

/// STMXCSR; `VEX` for VSTMXCSR.
pub(crate) fn stmxcsr<const VEX: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, if VEX { Unit::Avx } else { Unit::Sse })?;
    let addr = cpu.linear(op, 4, Access::Write)?;
    cpu.write(addr, cpu.state.mxcsr)
}

/// The components that EDX:EAX asks for, once XSAVE is known to be enabled.
fn requested(cpu: &mut Vcpu) -> Result<u64, Abort> {
    if !cpu.state.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    if cpu.state.cr0.contains(Cr0::TS) {
        return Err(cpu.raise(Exception::device_not_available()));
    }
    let [eax, _, edx, ..] = cpu.state.gpr;
    Ok((eax & 0xffff_ffff | edx << 32) & cpu.state.xcr0)
}

/// The linear address of the save area, checked for alignment.
fn area(
    cpu: &mut Vcpu,
    op: &Op,
    size: usize,
    alignment: u64,
    access: Access,
) -> Result<u64, Abort> {
    let addr = cpu.linear(op, size as u64, access)?;
    if addr & alignment.saturating_sub(1) != 0 { Err(cpu.gp(0)) } else { Ok(addr) }
}

fn checked_mxcsr(cpu: &mut Vcpu, value: u32) -> Result<u32, Abort> {
    if value & !MXCSR_MASK != 0 { Err(cpu.gp(0)) } else { Ok(value) }
}

/// XINUSE: the components that are not in their initial state.
fn in_use(state: &VcpuState, count: usize, variant: Variant) -> u64 {
    let fpu = &state.fpu;
    let initial = FpuState::at_reset();
    let mut mask = 0;
    if fpu.fxsave.get(..image::MXCSR) != initial.fxsave.get(..image::MXCSR)
        || fpu.fxsave.iter().take(image::XMM).skip(image::ST).any(|byte| *byte != 0)
    {
        mask |= XCR0_X87;
    }
    let vectors = || state.vec.iter().take(count);
    let control = variant == Variant::Compacted && state.mxcsr != MXCSR_RESET;
    if control || vectors().any(|v| matches!(v.0, [a, b, ..] if a | b != 0)) {
        mask |= XCR0_SSE;
    }
    if vectors().any(|v| matches!(v.0, [.., c, d] if c | d != 0)) {
        mask |= XCR0_AVX;
    }
    mask
}

fn store_x87(fpu: &FpuState, data: &mut [u8], wide: bool) {
    put(data, 0, fpu.fxsave.get(..image::XMM).unwrap_or_default());
    if !wide {
        // 32-bit offset, then the selector, which is not kept.
        put(data, image::FIP + 4, &[0; 4]);
        put(data, image::FDP + 4, &[0; 4]);
    }
}

fn store_mxcsr(state: &VcpuState, data: &mut [u8]) {
    put(data, image::MXCSR, &state.mxcsr.to_le_bytes());
    put(data, image::MXCSR + 4, &MXCSR_MASK.to_le_bytes());
}

fn store_sse(state: &VcpuState, data: &mut [u8], count: usize) {
    let area = data.get_mut(image::XMM..).unwrap_or_default();
    for (slot, register) in area.chunks_exact_mut(16).zip(state.vec.iter().take(count)) {
        put(slot, 0, register.to_bytes().get(..16).unwrap_or_default());
    }
}

fn store_avx(state: &VcpuState, data: &mut [u8], count: usize) {
    let area = data.get_mut(WITH_HEADER..).unwrap_or_default();
    for (slot, register) in area.chunks_exact_mut(16).zip(state.vec.iter().take(count)) {
        put(slot, 0, register.to_bytes().get(16..).unwrap_or_default());
    }
}

fn load_x87(fpu: &mut FpuState, data: &[u8], wide: bool) {
    fpu.set_control(u16_at(data, image::FCW));
    fpu.set_status(u16_at(data, image::FSW));
    fpu.set_tags(data.get(image::FTW).copied().unwrap_or(0));
    let pointer = |at| if wide { u64_at(data, at) } else { u64::from(u32_at(data, at)) };
    fpu.set_pointers(Pointers {
        opcode: u16_at(data, image::FOP),
        instruction: pointer(image::FIP),
        data: pointer(image::FDP),
    });
    let registers = data.get(image::ST..image::XMM).unwrap_or_default();
    for (i, slot) in registers.chunks_exact(16).enumerate() {
        if let Some(value) = slot.first_chunk() {
            fpu.set_st(i as u8, value);
        }
    }
}

fn load_sse(state: &mut VcpuState, data: &[u8], count: usize) {
    let area = data.get(image::XMM..).unwrap_or_default();
    for (slot, register) in area.chunks_exact(16).zip(state.vec.iter_mut().take(count)) {
        let [.., c, d] = register.0;
        register.0 = [u64_at(slot, 0), u64_at(slot, 8), c, d];
    }
}

fn load_avx(state: &mut VcpuState, data: &[u8], count: usize) {
    let area = data.get(WITH_HEADER..).unwrap_or_default();
    for (slot, register) in area.chunks_exact(16).zip(state.vec.iter_mut().take(count)) {
        let [a, b, ..] = register.0;
        register.0 = [a, b, u64_at(slot, 0), u64_at(slot, 8)];
    }
}

const _: () = assert!(AVX_SIZE == 16 * 16);
