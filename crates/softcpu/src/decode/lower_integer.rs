//! Choosing handlers for integer instructions.

use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::lower::{Choice, Form, form, operand_size};
use super::op::{Handler, Op, OpFlags};
use crate::interp::arith::{
    self, Adc, Add, And, Binary, Dec, Inc, Neg, Not, Or, Sbb, Sub, Unary, Xor,
};
use crate::interp::bits::{self, Action, Bt, Btc, Btr, Bts};
use crate::interp::operand::{Dst, Imm, Mem, Src};
use crate::interp::shift::{self, ByCl, ByImm, Count, Rcl, Rcr, Rol, Ror, Sar, Shift, Shl, Shr};
use crate::interp::{bcd, branch, cond, muldiv, stack, string, transfer};
use crate::state::GPR_ZERO;
use crate::state::rflags::RFlags;

/// `function::<T, ...>` for the T of `size` bytes.
macro_rules! sized {
    ($size:expr, $($function:ident)::+ $(, $argument:tt)*) => {
        match $size {
            1 => $($function)::+::<u8 $(, $argument)*>,
            2 => $($function)::+::<u16 $(, $argument)*>,
            4 => $($function)::+::<u32 $(, $argument)*>,
            _ => $($function)::+::<u64 $(, $argument)*>,
        }
    };
}

/// The same for instructions without an 8-bit form.
macro_rules! word_sized {
    ($size:expr, $($function:ident)::+ $(, $argument:tt)*) => {
        match $size {
            2 => $($function)::+::<u16 $(, $argument)*>,
            4 => $($function)::+::<u32 $(, $argument)*>,
            _ => $($function)::+::<u64 $(, $argument)*>,
        }
    };
}

/// `function::<CC, ...>` for the condition of the instruction.
macro_rules! conditional {
    ($cc:expr, $($function:ident)::+ $(, $argument:tt)*) => {
        match $cc {
            0 => $($function)::+::<0 $(, $argument)*>,
            1 => $($function)::+::<1 $(, $argument)*>,
            2 => $($function)::+::<2 $(, $argument)*>,
            3 => $($function)::+::<3 $(, $argument)*>,
            4 => $($function)::+::<4 $(, $argument)*>,
            5 => $($function)::+::<5 $(, $argument)*>,
            6 => $($function)::+::<6 $(, $argument)*>,
            7 => $($function)::+::<7 $(, $argument)*>,
            8 => $($function)::+::<8 $(, $argument)*>,
            9 => $($function)::+::<9 $(, $argument)*>,
            10 => $($function)::+::<10 $(, $argument)*>,
            11 => $($function)::+::<11 $(, $argument)*>,
            12 => $($function)::+::<12 $(, $argument)*>,
            13 => $($function)::+::<13 $(, $argument)*>,
            14 => $($function)::+::<14 $(, $argument)*>,
            _ => $($function)::+::<15 $(, $argument)*>,
        }
    };
}

fn binary<O: Binary>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => sized!(size, arith::binary, O, Dst, Src),
        Form::RegMem => sized!(size, arith::binary, O, Dst, Mem),
        Form::MemReg => sized!(size, arith::binary, O, Mem, Src),
        Form::RegImm => sized!(size, arith::binary, O, Dst, Imm),
        Form::MemImm => sized!(size, arith::binary, O, Mem, Imm),
        _ => return None,
    })
}

fn compare<O: Binary>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => sized!(size, arith::compare, O, Dst, Src),
        Form::RegMem => sized!(size, arith::compare, O, Dst, Mem),
        Form::MemReg => sized!(size, arith::compare, O, Mem, Src),
        Form::RegImm => sized!(size, arith::compare, O, Dst, Imm),
        Form::MemImm => sized!(size, arith::compare, O, Mem, Imm),
        _ => return None,
    })
}

fn unary<O: Unary>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::Reg => sized!(size, arith::unary, O, Dst),
        Form::Mem => sized!(size, arith::unary, O, Mem),
        _ => return None,
    })
}

fn mov(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => sized!(size, transfer::mov, Dst, Src),
        Form::RegMem => sized!(size, transfer::mov, Dst, Mem),
        Form::MemReg => sized!(size, transfer::mov, Mem, Src),
        Form::RegImm => sized!(size, transfer::mov, Dst, Imm),
        Form::MemImm => sized!(size, transfer::mov, Mem, Imm),
        _ => return None,
    })
}

fn shifted_by<O: Shift, C: Count>(memory: bool, size: u8) -> Handler {
    if memory {
        sized!(size, shift::shift, O, Mem, C)
    } else {
        sized!(size, shift::shift, O, Dst, C)
    }
}

fn shift<O: Shift>(instruction: &Instruction, size: u8) -> Handler {
    let memory = instruction.op0_kind() == OpKind::Memory;
    if instruction.op1_kind() == OpKind::Register {
        shifted_by::<O, ByCl>(memory, size)
    } else {
        shifted_by::<O, ByImm>(memory, size)
    }
}

fn bit<A: Action>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => word_sized!(size, bits::test_register, A, Src),
        Form::RegImm => word_sized!(size, bits::test_register, A, Imm),
        Form::MemReg => word_sized!(size, bits::test_memory, A, Src, true),
        Form::MemImm => word_sized!(size, bits::test_memory, A, Imm, false),
        _ => return None,
    })
}

fn extend(signed: bool, form: Form, from: u8, to: u8) -> Option<Handler> {
    macro_rules! extension {
        ($function:ident, $source:tt) => {
            match (to, from) {
                (2, 1) => transfer::$function::<u16, u8, $source>,
                (4, 1) => transfer::$function::<u32, u8, $source>,
                (8, 1) => transfer::$function::<u64, u8, $source>,
                (2, 2) => transfer::$function::<u16, u16, $source>,
                (4, 2) => transfer::$function::<u32, u16, $source>,
                (8, 2) => transfer::$function::<u64, u16, $source>,
                (2, 4) => transfer::$function::<u16, u32, $source>,
                (4, 4) => transfer::$function::<u32, u32, $source>,
                (8, 4) => transfer::$function::<u64, u32, $source>,
                _ => return None,
            }
        };
    }
    Some(match (form, signed) {
        (Form::RegReg, false) => extension!(move_zero, Src),
        (Form::RegMem, false) => extension!(move_zero, Mem),
        (Form::RegReg, true) => extension!(move_sign, Src),
        (Form::RegMem, true) => extension!(move_sign, Mem),
        _ => return None,
    })
}

/// One-operand multiplication and division; `SIGNED` picks `imul` and `idiv`.
fn multiply<const SIGNED: bool>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::Reg => sized!(size, muldiv::multiply, SIGNED, Dst),
        Form::Mem => sized!(size, muldiv::multiply, SIGNED, Mem),
        _ => return None,
    })
}

fn divide<const SIGNED: bool>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::Reg => sized!(size, muldiv::divide, SIGNED, Dst),
        Form::Mem => sized!(size, muldiv::divide, SIGNED, Mem),
        _ => return None,
    })
}

fn multiply_into(instruction: &Instruction, form: Form, size: u8) -> Option<Handler> {
    Some(match (instruction.op_count(), form) {
        (2, Form::RegReg) => word_sized!(size, muldiv::multiply_into, Dst, Src),
        (2, Form::RegMem) => word_sized!(size, muldiv::multiply_into, Dst, Mem),
        (3, Form::RegReg) => word_sized!(size, muldiv::multiply_into, Src, Imm),
        (3, Form::RegMem) => word_sized!(size, muldiv::multiply_into, Mem, Imm),
        _ => return None,
    })
}

fn scan<const REVERSE: bool>(form: Form, size: u8) -> Option<Handler> {
    Some(match form {
        Form::RegReg => word_sized!(size, bits::scan, REVERSE, Src),
        Form::RegMem => word_sized!(size, bits::scan, REVERSE, Mem),
        _ => return None,
    })
}

/// The number of a segment register, as [`Op::imm`] carries it.
fn segment_number(register: Register) -> Option<u64> {
    register
        .is_segment_register()
        .then(|| u64::from((register as u32).wrapping_sub(Register::ES as u32)))
}

/// The operand size of stack and branch instructions: what they push or pop.
fn stack_size(instruction: &Instruction) -> u8 {
    instruction.stack_pointer_increment().unsigned_abs() as u8
}

/// `change_flags`' immediate.
fn flag_change(clear: RFlags, set: RFlags) -> u64 {
    clear.bits() | set.bits() << 32
}

/// Moves to and from segment registers, and stack operations on them.
fn segment_moves(instruction: &Instruction, op: &mut Op) -> Option<Choice> {
    use Choice::{End, Next};
    let size = op.size;
    match instruction.mnemonic() {
        Mnemonic::Mov if instruction.op1_kind() == OpKind::Register => {
            if let Some(number) = segment_number(instruction.op1_register()) {
                op.imm = number;
                if op.flags.contains(OpFlags::MEM) {
                    op.size = 2;
                    return Some(Next(transfer::from_segment::<Mem>));
                }
                return Some(Next(transfer::from_segment::<Dst>));
            }
        }
        _ => {}
    }
    let first = (instruction.op0_kind() == OpKind::Register).then(|| instruction.op0_register())?;
    let number = segment_number(first);
    match instruction.mnemonic() {
        Mnemonic::Mov => {
            op.imm = number?;
            Some(if op.flags.contains(OpFlags::MEM) {
                End(stack::move_to_segment::<Mem>)
            } else {
                End(stack::move_to_segment::<Src>)
            })
        }
        Mnemonic::Push => {
            op.imm = number?;
            Some(Next(word_sized!(stack_size(instruction), stack::push_segment)))
        }
        Mnemonic::Pop => {
            op.imm = number?;
            Some(End(word_sized!(stack_size(instruction), stack::pop_segment)))
        }
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs => {
            op.imm = match instruction.mnemonic() {
                Mnemonic::Les => 0,
                Mnemonic::Lss => 2,
                Mnemonic::Lds => 3,
                Mnemonic::Lfs => 4,
                _ => 5,
            };
            Some(End(word_sized!(size, stack::load_far_pointer)))
        }
        _ => None,
    }
}

fn condition(instruction: &Instruction) -> Option<u8> {
    Some(match instruction.condition_code() {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
        _ => return None,
    })
}

fn conditionals(instruction: &Instruction, op: &Op, form: Form) -> Option<Choice> {
    let cc = condition(instruction)?;
    if instruction.is_jcc_short_or_near() {
        return Some(Choice::End(conditional!(cc, cond::jump)));
    }
    if instruction.code() >= Code::Seto_rm8 && instruction.code() <= Code::Setg_rm8 {
        return Some(Choice::Next(if form == Form::Mem {
            conditional!(cc, cond::set, Mem)
        } else {
            conditional!(cc, cond::set, Dst)
        }));
    }
    Some(Choice::Next(match (form, op.size) {
        (Form::RegReg, 2) => conditional!(cc, cond::conditional_move, u16, Src),
        (Form::RegReg, 4) => conditional!(cc, cond::conditional_move, u32, Src),
        (Form::RegReg, 8) => conditional!(cc, cond::conditional_move, u64, Src),
        (Form::RegMem, 2) => conditional!(cc, cond::conditional_move, u16, Mem),
        (Form::RegMem, 4) => conditional!(cc, cond::conditional_move, u32, Mem),
        (Form::RegMem, 8) => conditional!(cc, cond::conditional_move, u64, Mem),
        _ => return None,
    }))
}

fn branches(instruction: &Instruction, op: &mut Op, form: Form) -> Option<Choice> {
    use Choice::End;
    if instruction.is_jmp_far() || instruction.is_call_far() || instruction.is_jmp_far_indirect() {
        return None;
    }
    Some(End(match instruction.mnemonic() {
        Mnemonic::Jmp if instruction.is_jmp_short_or_near() => branch::jump,
        Mnemonic::Jmp if instruction.is_jmp_near_indirect() => match form {
            Form::Reg => word_sized!(op.size, branch::jump_indirect, Src0),
            _ => word_sized!(op.size, branch::jump_indirect, Mem),
        },
        Mnemonic::Call if instruction.is_call_near() => {
            word_sized!(stack_size(instruction), branch::call)
        }
        Mnemonic::Call if instruction.is_call_near_indirect() => match form {
            Form::Reg => word_sized!(op.size, branch::call_indirect, Src0),
            _ => word_sized!(op.size, branch::call_indirect, Mem),
        },
        Mnemonic::Ret => {
            let size = match instruction.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            word_sized!(size, branch::ret)
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
            op.aux = match instruction.mnemonic() {
                Mnemonic::Loopne => 0,
                Mnemonic::Loope => 1,
                _ => 2,
            };
            op.addr_mask = counter_mask(instruction);
            branch::loop_back
        }
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
            op.addr_mask = counter_mask(instruction);
            branch::jump_if_counter_zero
        }
        _ => return None,
    }))
}

/// A branch's register operand is the first one.
type Src0 = Dst;

/// The width of the counter of `loop` and `jcxz`: their address size.
fn counter_mask(instruction: &Instruction) -> u64 {
    match instruction.code() {
        Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32
        | Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 0xffff,
        Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64
        | Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => u64::MAX,
        _ => 0xffff_ffff,
    }
}

fn strings(instruction: &Instruction, op: &Op) -> Option<Choice> {
    Some(Choice::Next(match instruction.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsq => sized!(op.size, string::movs),
        Mnemonic::Movsd if instruction.is_string_instruction() => string::movs::<u32>,
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
            sized!(op.size, string::stos)
        }
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
            sized!(op.size, string::lods)
        }
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => {
            sized!(op.size, string::scas)
        }
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsq => sized!(op.size, string::cmps),
        Mnemonic::Cmpsd if instruction.is_string_instruction() => string::cmps::<u32>,
        _ => return None,
    }))
}

fn stack_operations(instruction: &Instruction, op: &mut Op, form: Form) -> Option<Handler> {
    let size = stack_size(instruction);
    Some(match (instruction.mnemonic(), form) {
        (Mnemonic::Push, Form::Reg) => word_sized!(size, stack::push, Dst),
        (Mnemonic::Push, Form::Mem) => word_sized!(size, stack::push, Mem),
        (Mnemonic::Push, Form::Imm) => word_sized!(size, stack::push, Imm),
        (Mnemonic::Pop, Form::Reg) => word_sized!(size, stack::pop, Dst),
        (Mnemonic::Pop, Form::Mem) => word_sized!(size, stack::pop, Mem),
        (Mnemonic::Pusha, _) => stack::push_all::<u16>,
        (Mnemonic::Pushad, _) => stack::push_all::<u32>,
        (Mnemonic::Popa, _) => stack::pop_all::<u16>,
        (Mnemonic::Popad, _) => stack::pop_all::<u32>,
        (Mnemonic::Leave, _) => match instruction.code() {
            Code::Leavew => stack::leave::<u16>,
            Code::Leaved => stack::leave::<u32>,
            _ => stack::leave::<u64>,
        },
        (Mnemonic::Enter, _) => {
            op.imm = u64::from(instruction.immediate16());
            op.aux = instruction.immediate8_2nd();
            match instruction.code() {
                Code::Enterw_imm16_imm8 => stack::enter::<u16>,
                Code::Enterd_imm16_imm8 => stack::enter::<u32>,
                _ => stack::enter::<u64>,
            }
        }
        _ => return None,
    })
}

/// The handler for `instruction` if it is an integer instruction that the interpreter
/// runs itself.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Choice> {
    use Choice::{End, Next};
    let (form, size) = (form(instruction), op.size);
    // Locked read-modify-writes run on the guest's memory itself, as native stubs; the
    // bit tests look after their own lock.
    let bit_test = matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    );
    if instruction.has_lock_prefix() && !bit_test {
        return None;
    }
    if let Some(choice) = segment_moves(instruction, op)
        .or_else(|| conditionals(instruction, op, form))
        .or_else(|| branches(instruction, op, form))
        .or_else(|| strings(instruction, op))
    {
        return Some(choice);
    }
    if let Some(handler) = stack_operations(instruction, op, form) {
        return Some(Next(handler));
    }
    let other = |n| operand_size(instruction, n);
    let handler = match instruction.mnemonic() {
        Mnemonic::Mov
            if instruction.op_register(0).is_cr() || instruction.op_register(1).is_cr() =>
        {
            return None;
        }
        Mnemonic::Mov
            if instruction.op_register(0).is_dr() || instruction.op_register(1).is_dr() =>
        {
            return None;
        }
        Mnemonic::Mov
            if instruction.op_register(0).is_tr() || instruction.op_register(1).is_tr() =>
        {
            return None;
        }
        Mnemonic::Mov => mov(form, size)?,
        Mnemonic::Movzx => extend(false, form, other(1), size)?,
        Mnemonic::Movsx | Mnemonic::Movsxd => extend(true, form, other(1), size)?,
        Mnemonic::Lea => word_sized!(size, transfer::lea),
        Mnemonic::Add => binary::<Add>(form, size)?,
        Mnemonic::Or => binary::<Or>(form, size)?,
        Mnemonic::Adc => binary::<Adc>(form, size)?,
        Mnemonic::Sbb => binary::<Sbb>(form, size)?,
        Mnemonic::And => binary::<And>(form, size)?,
        Mnemonic::Sub => binary::<Sub>(form, size)?,
        Mnemonic::Xor => binary::<Xor>(form, size)?,
        Mnemonic::Cmp => compare::<Sub>(form, size)?,
        Mnemonic::Test => compare::<And>(form, size)?,
        Mnemonic::Inc => unary::<Inc>(form, size)?,
        Mnemonic::Dec => unary::<Dec>(form, size)?,
        Mnemonic::Neg => unary::<Neg>(form, size)?,
        Mnemonic::Not => unary::<Not>(form, size)?,
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(instruction, size),
        Mnemonic::Shr => shift::<Shr>(instruction, size),
        Mnemonic::Sar => shift::<Sar>(instruction, size),
        Mnemonic::Rol => shift::<Rol>(instruction, size),
        Mnemonic::Ror => shift::<Ror>(instruction, size),
        Mnemonic::Rcl => shift::<Rcl>(instruction, size),
        Mnemonic::Rcr => shift::<Rcr>(instruction, size),
        Mnemonic::Bt => bit::<Bt>(form, size)?,
        Mnemonic::Bts => bit::<Bts>(form, size)?,
        Mnemonic::Btr => bit::<Btr>(form, size)?,
        Mnemonic::Btc => bit::<Btc>(form, size)?,
        Mnemonic::Bsf => scan::<false>(form, size)?,
        Mnemonic::Bsr => scan::<true>(form, size)?,
        Mnemonic::Bswap => transfer::byte_swap,
        Mnemonic::Mul => multiply::<false>(form, size)?,
        Mnemonic::Imul if instruction.op_count() == 1 => multiply::<true>(form, size)?,
        Mnemonic::Imul => multiply_into(instruction, form, size)?,
        Mnemonic::Div => divide::<false>(form, size)?,
        Mnemonic::Idiv => divide::<true>(form, size)?,
        Mnemonic::Xchg if form == Form::RegReg => sized!(size, transfer::exchange),
        Mnemonic::Cbw | Mnemonic::Cwde | Mnemonic::Cdqe => {
            op.size = accumulator_size(instruction.mnemonic());
            transfer::extend_accumulator
        }
        Mnemonic::Cwd | Mnemonic::Cdq | Mnemonic::Cqo => {
            op.size = accumulator_size(instruction.mnemonic());
            transfer::sign_to_dx
        }
        Mnemonic::Lahf => transfer::load_ah,
        Mnemonic::Sahf => transfer::store_ah,
        Mnemonic::Xlatb => {
            op.index = GPR_ZERO;
            transfer::translate
        }
        Mnemonic::Clc => flags(op, RFlags::CF, RFlags::empty()),
        Mnemonic::Stc => flags(op, RFlags::empty(), RFlags::CF),
        Mnemonic::Cmc => flags(op, RFlags::CF, RFlags::CF),
        Mnemonic::Cld => flags(op, RFlags::DF, RFlags::empty()),
        Mnemonic::Std => flags(op, RFlags::empty(), RFlags::DF),
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2 => transfer::nop,
        Mnemonic::Pause => transfer::pause,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => transfer::touch,
        Mnemonic::Mfence | Mnemonic::Sfence | Mnemonic::Lfence => transfer::fence,
        Mnemonic::Salc => transfer::set_al_on_carry,
        Mnemonic::Daa => bcd::decimal::<false>,
        Mnemonic::Das => bcd::decimal::<true>,
        Mnemonic::Aaa => bcd::ascii::<false>,
        Mnemonic::Aas => bcd::ascii::<true>,
        Mnemonic::Aam => bcd::after_multiply,
        Mnemonic::Aad => bcd::before_divide,
        Mnemonic::Bound => word_sized!(size, transfer::bound),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => return Some(End(transfer::undefined)),
        _ => return None,
    };
    Some(Next(handler))
}

fn accumulator_size(mnemonic: Mnemonic) -> u8 {
    match mnemonic {
        Mnemonic::Cdqe | Mnemonic::Cqo => 8,
        Mnemonic::Cwde | Mnemonic::Cdq => 4,
        _ => 2,
    }
}

fn flags(op: &mut Op, clear: RFlags, set: RFlags) -> Handler {
    op.imm = flag_change(clear, set);
    transfer::change_flags
}
