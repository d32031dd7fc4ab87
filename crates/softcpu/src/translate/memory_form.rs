//! Instructions on a register that is kept in memory, in their form with a memory operand.
//!
//! Such a register is usually brought to a scratch register, and from there back. But most
//! instructions on general registers can have one of them in memory: that is one instruction
//! instead of two or three, and leaves the scratch registers alone.

use iced_x86::{
    Code, ConditionCode, Instruction, Mnemonic as M, OpCodeOperandKind as Kind, OpKind,
    Register as R,
};

use super::assembler::NotCopied;
use super::fields::Field;
use super::registers::is_high_byte;

/// How far the two directions of an instruction on two registers are apart in [`Code`]: those
/// with the register that is changed in ModRM.rm come first, by width.
const OTHER_DIRECTION: usize = 4;

/// The code with which operand `n` of `it`, a register that it reads or, if `written`, changes,
/// can be a word of memory instead. `None`: none, or it would do something else.
pub(super) fn memory_form(it: &Instruction, n: u32, written: bool) -> Option<Code> {
    let register = it.op_register(n);
    let named = (0..it.op_count()).filter(|m| it.op_kind(*m) == OpKind::Register);
    let mut others = named.filter(|m| *m != n).map(|m| it.op_register(m));
    // A segment register goes to a whole register, but to two bytes of memory.
    let apart = others.all(|o| o.is_gpr() && o.full_register() != register.full_register());
    let alone = apart && !it.op_kinds().any(|kind| kind == OpKind::Memory);
    if !alone || is_high_byte(register) || !reads_alike(it) {
        return None;
    }
    // What has a part of a register changed leaves or zeroes the rest of it.
    if written && !(changes_alike(it) && register.size() == 8) {
        return None;
    }
    let code = it.code();
    if takes_memory(code, n) {
        return Some(code);
    }
    let other = (code as usize).checked_add(OTHER_DIRECTION)?;
    let other = Code::try_from(other).ok()?;
    let kinds = |code: Code| (0..2).map(move |m| operand_size(code.op_code().op_kind(m)));
    let alike = other.mnemonic() == code.mnemonic() && kinds(other).eq(kinds(code));
    (alike && n == 1 && takes_memory(other, n)).then_some(other)
}

/// Whether it does the same with what it reads in memory as in a register.
fn reads_alike(it: &Instruction) -> bool {
    changes_alike(it)
        || matches!(it.mnemonic(), M::Cmp | M::Test | M::Imul | M::Movzx | M::Movsx | M::Movsxd)
        || it.op_count() == 2 && it.condition_code() != ConditionCode::None
}

/// Whether it does the same to 64 bits in memory as to a register.
fn changes_alike(it: &Instruction) -> bool {
    matches!(
        it.mnemonic(),
        M::Mov | M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Not | M::Neg
    ) || matches!(it.mnemonic(), M::Inc | M::Dec | M::Shl | M::Sal | M::Shr | M::Sar)
}

/// Whether operand `n` may be in memory.
fn takes_memory(code: Code, n: u32) -> bool {
    let kind = code.op_code().op_kind(n);
    matches!(kind, Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem)
}

/// Bytes of a general register or what can stand for it.
fn operand_size(kind: Kind) -> Option<u8> {
    match kind {
        Kind::r8_or_mem | Kind::r8_reg => Some(1),
        Kind::r16_or_mem | Kind::r16_reg => Some(2),
        Kind::r32_or_mem | Kind::r32_reg => Some(4),
        Kind::r64_or_mem | Kind::r64_reg => Some(8),
        _ => None,
    }
}

/// Makes operand `n` of `it` the field, with the code that [`memory_form`] has found.
///
/// # Errors
/// If it has no such operand.
pub(super) fn put_in_memory(
    it: &mut Instruction,
    n: u32,
    code: Code,
    Field(at): Field,
) -> Result<(), NotCopied> {
    it.set_code(code);
    it.set_memory_base(R::None);
    it.set_memory_index(R::None);
    it.set_memory_displacement64(at.into());
    it.set_memory_displ_size(8);
    it.set_segment_prefix(R::GS);
    it.try_set_op_kind(n, OpKind::Memory).map_err(|_| NotCopied)
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;
    use crate::translate::fields;

    fn form(bytes: &[u8], n: u32, written: bool) -> Option<String> {
        let mut it = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let code = memory_form(&it, n, written)?;
        assert_eq!(put_in_memory(&mut it, n, code, fields::gpr(0)), Ok(()));
        let mut encoder = iced_x86::Encoder::new(64);
        encoder.encode(&it, 0).expect("it can be encoded");
        let bytes = encoder.take_buffer();
        let again = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        assert_eq!(again.memory_displacement64(), u64::from(fields::gpr(0).0));
        assert_eq!(again.memory_segment(), R::GS);
        Some(format!("{:?}", again.code()))
    }

    #[test]
    fn either_register_may_be_in_memory_where_the_other_direction_is_there() {
        let cases: [(&[u8], u32, bool, Option<&str>); 14] = [
            // add rax, rcx
            (&[0x48, 0x01, 0xc8], 0, true, Some("Add_rm64_r64")),
            (&[0x48, 0x01, 0xc8], 1, false, Some("Add_r64_rm64")),
            (&[0x48, 0x03, 0xc1], 1, false, Some("Add_r64_rm64")),
            // add eax, ecx: zeroes the upper half
            (&[0x01, 0xc8], 0, true, None),
            (&[0x01, 0xc8], 1, false, Some("Add_r32_rm32")),
            // mov cl, al; cmp cl, al
            (&[0x88, 0xc1], 1, false, Some("Mov_r8_rm8")),
            (&[0x38, 0xc1], 0, false, Some("Cmp_rm8_r8")),
            // xor eax, eax; movzx eax, cl; test ecx, eax
            (&[0x31, 0xc0], 1, false, None),
            (&[0x0f, 0xb6, 0xc1], 1, false, Some("Movzx_r32_rm8")),
            (&[0x85, 0xc1], 1, false, None),
            // cmove rax, rcx
            (&[0x48, 0x0f, 0x44, 0xc1], 1, false, Some("Cmove_r64_rm64")),
            (&[0x48, 0x0f, 0x44, 0xc1], 0, true, None),
            // mov rax, ds; xchg rax, rcx
            (&[0x48, 0x8c, 0xd8], 0, true, None),
            (&[0x48, 0x87, 0xc8], 0, true, None),
        ];
        for (bytes, n, written, expected) in cases {
            assert_eq!(form(bytes, n, written).as_deref(), expected, "{bytes:x?} {n}");
        }
    }

    #[test]
    fn the_two_directions_of_all_codes_are_what_they_are_taken_for() {
        for code in Code::values() {
            let Ok(other) = Code::try_from(code as usize + OTHER_DIRECTION) else { continue };
            let registers = |code: Code| {
                let kinds = (0..2).map(|n| operand_size(code.op_code().op_kind(n)));
                kinds.collect::<Option<Vec<_>>>()
            };
            if takes_memory(code, 0)
                && takes_memory(other, 1)
                && code.mnemonic() == other.mnemonic()
                && registers(code).is_some_and(|kinds| registers(other) == Some(kinds))
            {
                let [a, b] = [code, other].map(|code| code.op_code().op_code());
                assert_eq!(a + 2, b, "{code:?} and {other:?}: one bit tells directions apart");
            }
        }
    }
}
