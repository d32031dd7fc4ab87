//! From iced-x86's instruction to an [`Op`]: operands resolved, handler chosen.
//!
//! Three families look at an instruction in turn: the integer handlers of
//! [`crate::interp`] ([`super::lower_integer`]), the system handlers of
//! [`crate::system`] ([`super::lower_system`]), and the native stubs, which take
//! whatever user-mode instruction the host CPU can execute itself. What none of them
//! takes raises `#UD`, as on a CPU that does not have it.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::op::{HIGH_BYTE, Handler, Op, OpFlags};
use super::{lower_integer, lower_system};
use crate::interp::transfer;
use crate::native::Refused;
use crate::state::regs::Gpr;
use crate::state::{CodeSize, GPR_ZERO, SEG_FLAT};
use crate::vcpu::Vcpu;

/// What [`lower`] made of an instruction.
#[derive(Debug)]
pub(crate) struct Lowered {
    pub(crate) op: Op,
    /// The instruction ends its block: its handler sets RIP.
    pub(crate) ends: bool,
}

/// There is no room for another native stub: throw the vCPU's own away and start over.
#[derive(Debug)]
pub(crate) struct StubsFull;

/// What a family makes of an instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Choice {
    /// Run it by this handler, and go on.
    Next(Handler),
    /// Run it by this handler, which sets RIP or returns an error.
    End(Handler),
}

/// Where the operands of a one- or two-operand instruction are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// register, register
    RegReg,
    /// register, memory
    RegMem,
    /// memory, register
    MemReg,
    /// register, immediate
    RegImm,
    /// memory, immediate
    MemImm,
    /// register
    Reg,
    /// memory
    Mem,
    /// immediate
    Imm,
    /// none, or implied ones
    Other,
}

/// Lowers `instruction`, whose bytes are `bytes`, for the vCPU's present mode.
pub(crate) fn lower(
    cpu: &mut Vcpu,
    instruction: &Instruction,
    bytes: &[u8],
) -> Result<Lowered, StubsFull> {
    let mut op = operands(instruction, cpu.code_size);
    if instruction.is_invalid() {
        op.run = transfer::undefined;
        return Ok(Lowered { op, ends: true });
    }
    let choice = lower_integer::lower(instruction, &mut op)
        .or_else(|| lower_system::lower(instruction, &mut op));
    let choice = match choice {
        Some(choice) => choice,
        None => match cpu.native.lower(instruction, bytes, cpu.cpuid.features()) {
            Ok(native) => {
                op.imm = native.imm;
                op.flags |= native.flags;
                Choice::Next(native.run)
            }
            Err(Refused::Full) => return Err(StubsFull),
            Err(_) => Choice::End(transfer::undefined),
        },
    };
    let ends = matches!(choice, Choice::End(_));
    let (Choice::Next(run) | Choice::End(run)) = choice;
    op.run = run;
    Ok(Lowered { op, ends })
}

/// The form of the first two operands.
pub(crate) fn form(instruction: &Instruction) -> Form {
    let kind = |n| {
        if n >= instruction.op_count() {
            return Form::Other;
        }
        match instruction.op_kind(n) {
            OpKind::Register => Form::Reg,
            OpKind::Memory => Form::Mem,
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Form::Imm,
            _ => Form::Other,
        }
    };
    match (kind(0), kind(1)) {
        (Form::Reg, Form::Reg) => Form::RegReg,
        (Form::Reg, Form::Mem) => Form::RegMem,
        (Form::Mem, Form::Reg) => Form::MemReg,
        (Form::Reg, Form::Imm) => Form::RegImm,
        (Form::Mem, Form::Imm) => Form::MemImm,
        (first, Form::Other) => first,
        _ => Form::Other,
    }
}

/// The size in bytes of operand `n`: a register's, or what is accessed in memory.
pub(crate) fn operand_size(instruction: &Instruction, n: u32) -> u8 {
    if n >= instruction.op_count() {
        return 0;
    }
    match instruction.op_kind(n) {
        OpKind::Register => instruction.op_register(n).size() as u8,
        OpKind::Immediate8 => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        OpKind::Immediate64 | OpKind::Immediate8to64 | OpKind::Immediate32to64 => 8,
        _ => u8::try_from(instruction.memory_size().size()).unwrap_or(0),
    }
}

/// The slot of a general-purpose register of any size.
pub(crate) fn slot(register: Register) -> Option<u8> {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            Some((register as u32).wrapping_sub(Register::AH as u32) as u8 | HIGH_BYTE)
        }
        _ if register.is_gpr() => Some(register.full_register().number() as u8),
        _ => None,
    }
}

/// The slot of a general-purpose register, or the number of a segment, control or
/// debug register within its class.
fn register_operand(register: Register) -> Option<u8> {
    let numbered = register.is_segment_register() || register.is_cr() || register.is_dr();
    slot(register).or_else(|| numbered.then(|| register.number() as u8))
}

/// An op with everything but its handler.
fn operands(instruction: &Instruction, code_size: CodeSize) -> Op {
    let long = code_size == CodeSize::Bits64;
    let mut flags = if long { OpFlags::LONG } else { OpFlags::LEGACY };
    flags.set(OpFlags::LOCK, instruction.has_lock_prefix());
    flags.set(OpFlags::REP, instruction.has_rep_prefix());
    flags.set(OpFlags::REPNE, instruction.has_repne_prefix());
    let memory = instruction.op_kinds().any(|kind| kind == OpKind::Memory);
    flags.set(OpFlags::STACK, instruction.is_stack_instruction() && !memory);
    let mut op = Op {
        run: transfer::undefined,
        rip: instruction.ip(),
        imm: 0,
        disp: 0,
        addr_mask: u64::MAX,
        base: GPR_ZERO,
        index: GPR_ZERO,
        scale: 0,
        seg: SEG_FLAT,
        dst: GPR_ZERO + 1,
        src: GPR_ZERO + 1,
        aux: 0,
        len: instruction.len() as u8,
        code: instruction.code() as u16,
        flags,
        size: operand_size(instruction, 0),
    };
    for n in 0..instruction.op_count() {
        match instruction.op_kind(n) {
            OpKind::Register => {
                if let Some(register) = register_operand(instruction.op_register(n)) {
                    match n {
                        0 => op.dst = register,
                        1 => op.src = register,
                        _ => op.aux = register,
                    }
                }
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = instruction.near_branch_target();
                op.flags |= OpFlags::IMM_MOVES;
            }
            OpKind::Memory => memory_operand(instruction, long, &mut op),
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => {
                string_operand(instruction, long, 0xffff, &mut op);
            }
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                string_operand(instruction, long, 0xffff_ffff, &mut op);
            }
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => {
                string_operand(instruction, long, u64::MAX, &mut op);
            }
            OpKind::FarBranch16 => {
                far_branch(u64::from(instruction.far_branch16()), instruction, &mut op)
            }
            OpKind::FarBranch32 => {
                far_branch(u64::from(instruction.far_branch32()), instruction, &mut op)
            }
            // The first immediate goes to `imm`, a second (enter, extrq) to `aux`.
            OpKind::Immediate8_2nd => op.aux = instruction.immediate8_2nd(),
            _ => op.imm = instruction.immediate(n),
        }
    }
    op
}

/// The segment slot of an operand in segment `register`.
fn segment_slot(register: Register, long: bool) -> u8 {
    match register {
        Register::FS => 4,
        Register::GS => 5,
        _ if long => SEG_FLAT,
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        _ => 3,
    }
}

fn memory_operand(instruction: &Instruction, long: bool, op: &mut Op) {
    op.flags |= OpFlags::MEM;
    let (base, index) = (instruction.memory_base(), instruction.memory_index());
    if instruction.memory_segment() == Register::SS {
        op.flags |= OpFlags::STACK;
    }
    op.seg = segment_slot(instruction.memory_segment(), long);
    op.disp = instruction.memory_displacement64();
    op.flags.set(OpFlags::DISP_MOVES, instruction.is_ip_rel_memory_operand());
    let width = match (base, index) {
        (Register::RIP | Register::EIP, _) => base.size(),
        (Register::None, Register::None) => instruction.memory_displ_size() as usize,
        (Register::None, index) if index.is_gpr() => index.size(),
        (Register::None, _) => instruction.memory_displ_size() as usize,
        (base, _) => base.size(),
    };
    op.addr_mask = match width {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    op.base = slot(base).unwrap_or(GPR_ZERO);
    op.index = slot(index).unwrap_or(GPR_ZERO);
    op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
}

/// Direct far branches: the offset in `imm`, the selector in `disp`.
fn far_branch(offset: u64, instruction: &Instruction, op: &mut Op) {
    op.imm = offset;
    op.disp = u64::from(instruction.far_branch_selector());
}

/// Operands of string instructions: `rSI` in a segment that may be overridden, `rDI` in ES.
fn string_operand(instruction: &Instruction, long: bool, mask: u64, op: &mut Op) {
    op.addr_mask = mask;
    op.size = u8::try_from(instruction.memory_size().size()).unwrap_or(0);
    op.seg = segment_slot(instruction.memory_segment(), long);
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu
    ) {
        op.base = Gpr::Rdi as u8;
    }
}
