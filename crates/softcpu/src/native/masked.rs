//! Masked loads, masked stores and gathers.
//!
//! Only the elements whose mask bit is set are touched, and only those may fault. The
//! host instruction cannot be given a memory operand that is partly absent, so these,
//! which compute nothing, go element by element through the TLB. A gather that faults
//! keeps the elements it has and clears their mask bits, so that it resumes where it
//! stopped (SDM vol. 2, VPGATHERDD).

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic as M, OpKind, Register};

use super::Lowered;
use super::classify::{Refused, Traits};
use super::exec::{require, x87_error};
use crate::decode::op::Op;
use crate::mmu::Access;
use crate::state::GPR_ZERO;
use crate::state::fpu::{VectorRegister, put, u32_at, u64_at};
use crate::vcpu::{Step, Vcpu};

/// The operands that [`Op`] has no fields for, packed into `Op::imm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operands {
    /// Destination of loads and gathers, source of stores.
    data: u8,
    mask: u8,
    /// The gather's vector of indices.
    indices: u8,
    /// Elements.
    count: u8,
    /// Bytes of an element.
    size: u8,
    /// Bytes of an index.
    index_size: u8,
}

impl Operands {
    const fn pack(self) -> u64 {
        u64::from_le_bytes([
            self.data,
            self.mask,
            self.indices,
            self.count,
            self.size,
            self.index_size,
            0,
            0,
        ])
    }

    const fn unpack(imm: u64) -> Self {
        let [data, mask, indices, count, size, index_size, ..] = imm.to_le_bytes();
        Self { data, mask, indices, count, size, index_size }
    }
}

/// How `instruction` is run if it is one of these.
///
/// # Errors
/// For gathers that name a register twice, which raise `#UD`.
pub(super) fn lower(instruction: &Instruction) -> Result<Option<Lowered>, Refused> {
    let (a, b, c) =
        (instruction.op0_register(), instruction.op1_register(), instruction.op2_register());
    let vex = instruction.encoding() == EncodingKind::VEX;
    match instruction.code() {
        Code::Maskmovq_rDI_mm_mm => {
            let operands = Operands {
                data: number(b),
                mask: number(c),
                indices: 0,
                count: 8,
                size: 1,
                index_size: 0,
            };
            return Ok(Some(Lowered::in_rust(maskmovq, operands.pack())));
        }
        Code::Maskmovdqu_rDI_xmm_xmm | Code::VEX_Vmaskmovdqu_rDI_xmm_xmm => {
            let operands = Operands {
                data: number(b),
                mask: number(c),
                indices: 0,
                count: 16,
                size: 1,
                index_size: 0,
            };
            let run = if vex { store::<true> } else { store::<false> };
            return Ok(Some(Lowered::in_rust(run, operands.pack())));
        }
        _ if !vex => return Ok(None),
        _ => {}
    }
    let size = match instruction.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq => 8,
        M::Vpgatherdd | M::Vgatherdps | M::Vpgatherqd | M::Vgatherqps => {
            return gather_of(instruction, 4).map(Some);
        }
        M::Vpgatherdq | M::Vgatherdpd | M::Vpgatherqq | M::Vgatherqpd => {
            return gather_of(instruction, 8).map(Some);
        }
        _ => return Ok(None),
    };
    let operands = |data: Register, mask: Register| Operands {
        data: number(data),
        mask: number(mask),
        indices: 0,
        count: elements(data, size),
        size: size as u8,
        index_size: 0,
    };
    Ok(Some(if instruction.op0_kind() == OpKind::Memory {
        Lowered::in_rust(store::<true>, operands(c, b).pack())
    } else {
        Lowered::in_rust(load, operands(a, b).pack())
    }))
}

fn gather_of(instruction: &Instruction, size: usize) -> Result<Lowered, Refused> {
    let index_size = match instruction.mnemonic() {
        M::Vpgatherdd | M::Vgatherdps | M::Vpgatherdq | M::Vgatherdpd => 4,
        _ => 8,
    };
    let (data, indices, mask) =
        (instruction.op0_register(), instruction.memory_index(), instruction.op2_register());
    let (d, i, m) = (number(data), number(indices), number(mask));
    if d == i || d == m || i == m || !indices.is_vector_register() {
        return Err(Refused::Encoding);
    }
    let count = elements(data, size).min(elements(indices, index_size));
    let operands = Operands {
        data: d,
        mask: m,
        indices: i,
        count,
        size: size as u8,
        index_size: index_size as u8,
    };
    Ok(Lowered::in_rust(gather, operands.pack()))
}

/// How many elements of `size` bytes fit.
fn elements(register: Register, size: usize) -> u8 {
    register.size().checked_div(size).unwrap_or(0) as u8
}

fn number(register: Register) -> u8 {
    register.number() as u8 & 15
}

fn vector(cpu: &Vcpu, number: u8) -> [u8; 32] {
    cpu.state.vec.get(usize::from(number)).copied().unwrap_or_default().to_bytes()
}

fn set_vector(cpu: &mut Vcpu, number: u8, bytes: &[u8; 32]) {
    if let Some(register) = cpu.state.vec.get_mut(usize::from(number)) {
        *register = VectorRegister::from_bytes(bytes);
    }
}

/// Whether element `i` of `size` bytes is selected: its topmost bit is set.
fn selected(mask: &[u8], i: usize, size: usize) -> bool {
    let last = i.saturating_mul(size).saturating_add(size.saturating_sub(1));
    mask.get(last).is_some_and(|byte| byte & 0x80 != 0)
}

/// The linear address of `size` bytes, `offset` bytes into the op's memory operand.
fn element(
    cpu: &mut Vcpu,
    op: &Op,
    offset: usize,
    size: usize,
    access: Access,
) -> Result<u64, crate::vcpu::Abort> {
    let moved = Op { disp: op.disp.wrapping_add(offset as u64), ..*op };
    cpu.linear(&moved, size as u64, access)
}

/// VMASKMOVPS/PD, VPMASKMOVD/Q from memory. Elements not selected become zero.
fn load(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, Traits::VEX | Traits::AVX)?;
    let operands = Operands::unpack(op.imm);
    let (mask, size) = (vector(cpu, operands.mask), usize::from(operands.size));
    let mut data = [0; 32];
    for i in (0..usize::from(operands.count)).filter(|i| selected(&mask, *i, size)) {
        let offset = i.saturating_mul(size);
        let addr = element(cpu, op, offset, size, Access::Read)?;
        load_element(cpu, addr, size, &mut data, offset)?;
    }
    set_vector(cpu, operands.data, &data);
    Ok(())
}

/// VMASKMOVPS/PD, VPMASKMOVD/Q to memory, MASKMOVDQU.
fn store<const VEX: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, if VEX { Traits::VEX | Traits::AVX } else { Traits::SSE })?;
    let operands = Operands::unpack(op.imm);
    let (data, mask) = (vector(cpu, operands.data), vector(cpu, operands.mask));
    scatter(cpu, op, operands, &data, &mask)
}

/// MASKMOVQ.
fn maskmovq(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, Traits::MMX | Traits::X87)?;
    if cpu.state.fpu.pending() {
        return Err(x87_error(cpu));
    }
    let operands = Operands::unpack(op.imm);
    let data = cpu.state.fpu.mmx(operands.data).to_le_bytes();
    let mask = cpu.state.fpu.mmx(operands.mask).to_le_bytes();
    scatter(cpu, op, operands, &data, &mask)?;
    cpu.state.fpu.enter_mmx();
    Ok(())
}

/// Stores the selected elements, once all of them are known to be writable.
fn scatter(cpu: &mut Vcpu, op: &Op, operands: Operands, data: &[u8], mask: &[u8]) -> Step {
    let size = usize::from(operands.size);
    let chosen = || (0..usize::from(operands.count)).filter(|i| selected(mask, *i, size));
    for i in chosen() {
        let addr = element(cpu, op, i.saturating_mul(size), size, Access::Write)?;
        cpu.probe_write(addr, size as u64)?;
    }
    for i in chosen() {
        let offset = i.saturating_mul(size);
        let addr = element(cpu, op, offset, size, Access::Write)?;
        match size {
            4 => cpu.write(addr, u32_at(data, offset))?,
            8 => cpu.write(addr, u64_at(data, offset))?,
            _ => cpu.write(addr, data.get(offset).copied().unwrap_or(0))?,
        }
    }
    Ok(())
}

fn load_element(
    cpu: &mut Vcpu,
    addr: u64,
    size: usize,
    data: &mut [u8; 32],
    offset: usize,
) -> Step {
    if size == 8 {
        put(data, offset, &cpu.read::<u64>(addr)?.to_le_bytes());
    } else {
        put(data, offset, &cpu.read::<u32>(addr)?.to_le_bytes());
    }
    Ok(())
}

/// VPGATHERxx, VGATHERxPx.
fn gather(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, Traits::VEX | Traits::AVX)?;
    let operands = Operands::unpack(op.imm);
    let (size, index_size) = (usize::from(operands.size), usize::from(operands.index_size));
    let indices = vector(cpu, operands.indices);
    let (mut data, mut mask) = (vector(cpu, operands.data), vector(cpu, operands.mask));
    let count = usize::from(operands.count);
    let mut outcome = Ok(());
    for i in
        (0..count).filter(|i| selected(&vector(cpu, operands.mask), *i, size)).collect::<Vec<_>>()
    {
        let at = i.saturating_mul(index_size);
        let index =
            if index_size == 8 { u64_at(&indices, at) } else { u32_at(&indices, at) as i32 as u64 };
        let place =
            Op { index: GPR_ZERO, disp: op.disp.wrapping_add(index << (op.scale & 3)), ..*op };
        let offset = i.saturating_mul(size);
        outcome = cpu
            .linear(&place, size as u64, Access::Read)
            .and_then(|addr| load_element(cpu, addr, size, &mut data, offset));
        if outcome.is_err() {
            break;
        }
        put(&mut mask, offset, [0; 8].get(..size).unwrap_or_default());
    }
    if outcome.is_ok() {
        mask = [0; 32];
        put(&mut data, count.saturating_mul(size), &[0; 32]);
    }
    set_vector(cpu, operands.data, &data);
    set_vector(cpu, operands.mask, &mask);
    outcome
}
