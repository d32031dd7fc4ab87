//! Choosing handlers for system instructions.
//!
//! Their handlers expect operand sizes that an instruction without explicit operands
//! does not show, so much of this is a table of encodings and sizes.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::lower::{Choice, operand_size};
use super::op::Op;
use crate::system::{
    control, debug, far, flags, hypercall, interrupt, invalidate, io, iret, msr, segment,
    string_io, syscall, tables, tsc,
};

/// The operand size of an instruction that only its encoding tells.
fn encoded_size(code: Code) -> Option<u8> {
    Some(match code {
        Code::Pushfw
        | Code::Popfw
        | Code::Iretw
        | Code::Retfw
        | Code::Retfw_imm16
        | Code::Jmp_ptr1616
        | Code::Call_ptr1616
        | Code::Jmp_m1616
        | Code::Call_m1616
        | Code::Lgdt_m1632_16
        | Code::Lidt_m1632_16
        | Code::Sgdt_m1632_16
        | Code::Sidt_m1632_16 => 2,
        Code::Pushfd
        | Code::Popfd
        | Code::Iretd
        | Code::Retfd
        | Code::Retfd_imm16
        | Code::Jmp_ptr1632
        | Code::Call_ptr1632
        | Code::Jmp_m1632
        | Code::Call_m1632
        | Code::Lgdt_m1632
        | Code::Lidt_m1632
        | Code::Sgdt_m1632
        | Code::Sidt_m1632
        | Code::Sysretd
        | Code::Sysexitd => 4,
        Code::Pushfq
        | Code::Popfq
        | Code::Iretq
        | Code::Retfq
        | Code::Retfq_imm16
        | Code::Jmp_m1664
        | Code::Call_m1664
        | Code::Lgdt_m1664
        | Code::Lidt_m1664
        | Code::Sgdt_m1664
        | Code::Sidt_m1664
        | Code::Sysretq
        | Code::Sysexitq => 8,
        _ => return None,
    })
}

fn moves_control_register(instruction: &Instruction) -> bool {
    instruction.op_register(0).is_cr() || instruction.op_register(1).is_cr()
}

fn moves_debug_register(instruction: &Instruction) -> bool {
    instruction.op_register(0).is_dr() || instruction.op_register(1).is_dr()
}

/// The handler for `instruction` if it is a system instruction.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Choice> {
    use Choice::{End, Next};
    if let Some(size) = encoded_size(instruction.code()) {
        op.size = size;
    }
    Some(match instruction.mnemonic() {
        Mnemonic::Mov if moves_control_register(instruction) => {
            if instruction.op_register(0).is_cr() {
                End(control::mov_to_cr)
            } else {
                Next(control::mov_from_cr)
            }
        }
        Mnemonic::Mov if moves_debug_register(instruction) => {
            if instruction.op_register(0).is_dr() {
                End(debug::mov_to_dr)
            } else {
                Next(debug::mov_from_dr)
            }
        }
        Mnemonic::Clts => End(control::clts),
        Mnemonic::Lmsw => End(tables::lmsw),
        Mnemonic::Smsw => Next(tables::smsw),
        Mnemonic::Lgdt => Next(tables::lgdt),
        Mnemonic::Lidt => Next(tables::lidt),
        Mnemonic::Sgdt => Next(tables::sgdt),
        Mnemonic::Sidt => Next(tables::sidt),
        Mnemonic::Lldt => Next(tables::lldt),
        Mnemonic::Ltr => Next(tables::ltr),
        Mnemonic::Sldt => Next(tables::sldt),
        Mnemonic::Str => Next(tables::str),
        Mnemonic::Verr => Next(segment::verr),
        Mnemonic::Verw => Next(segment::verw),
        Mnemonic::Lar => Next(segment::lar),
        Mnemonic::Lsl => Next(segment::lsl),
        Mnemonic::Arpl => Next(segment::arpl),
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => Next(flags::pushf),
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => Next(flags::popf),
        Mnemonic::Cli => Next(flags::cli),
        Mnemonic::Sti => End(flags::sti),
        Mnemonic::Clac => Next(flags::clac),
        Mnemonic::Stac => Next(flags::stac),
        Mnemonic::Hlt => End(control::hlt),
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => End(iret::iret),
        Mnemonic::Int => End(interrupt::int),
        Mnemonic::Int3 => End(interrupt::int3),
        Mnemonic::Into => Next(interrupt::into),
        Mnemonic::Int1 => End(interrupt::int1),
        Mnemonic::Syscall => End(syscall::syscall),
        Mnemonic::Sysret | Mnemonic::Sysretq => End(syscall::sysret),
        Mnemonic::Sysenter => End(syscall::sysenter),
        Mnemonic::Sysexit | Mnemonic::Sysexitq => End(syscall::sysexit),
        Mnemonic::Swapgs => Next(syscall::swapgs),
        Mnemonic::Rdfsbase => Next(syscall::rdfsbase),
        Mnemonic::Rdgsbase => Next(syscall::rdgsbase),
        Mnemonic::Wrfsbase => Next(syscall::wrfsbase),
        Mnemonic::Wrgsbase => Next(syscall::wrgsbase),
        Mnemonic::Jmp if instruction.is_jmp_far() => End(far::jmp_far),
        Mnemonic::Call if instruction.is_call_far() => End(far::call_far),
        Mnemonic::Jmp if instruction.is_jmp_far_indirect() => End(far::jmp_far_mem),
        Mnemonic::Call if instruction.is_call_far_indirect() => End(far::call_far_mem),
        Mnemonic::Retf => End(far::ret_far),
        Mnemonic::Invlpg => End(invalidate::invlpg),
        Mnemonic::Invpcid => End(invalidate::invpcid),
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => Next(control::wbinvd),
        Mnemonic::Rdmsr => Next(msr::rdmsr),
        Mnemonic::Wrmsr => End(msr::wrmsr),
        Mnemonic::Rdtsc => Next(tsc::rdtsc),
        Mnemonic::Rdtscp => Next(tsc::rdtscp),
        Mnemonic::Rdpid => Next(tsc::rdpid),
        Mnemonic::Rdpmc => Next(tsc::rdpmc),
        Mnemonic::Cpuid => Next(crate::cpuid::cpuid),
        Mnemonic::Vmcall | Mnemonic::Vmmcall => End(hypercall::hypercall),
        Mnemonic::In if instruction.op1_kind() == OpKind::Register => Next(io::in_dx),
        Mnemonic::In => Next(io::in_imm),
        Mnemonic::Out => {
            op.size = operand_size(instruction, 1);
            if instruction.op0_kind() == OpKind::Register {
                Next(io::out_dx)
            } else {
                Next(io::out_imm)
            }
        }
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => Next(string_io::ins),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => Next(string_io::outs),
        Mnemonic::Xgetbv => Next(control::xgetbv),
        Mnemonic::Xsetbv => End(control::xsetbv),
        _ => return None,
    })
}
