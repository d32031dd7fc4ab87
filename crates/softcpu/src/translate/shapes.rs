//! How each instruction is translated, remembered.
//!
//! Asking iced-x86's tables what an instruction reads, writes and needs takes longer than
//! emitting it, and so does finding out which of our own ways of doing it is meant. The answer is
//! the same for all that differ in immediates and addresses only, and programs use few others: so
//! it is kept by that *shape*, in a small table.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic as M, OpKind};

use super::assembler::NotCopied;
use super::copy::{self, Copying};
use super::division::is_division;
use super::effects::Effects;
use super::privileged::{Touches, touches};
use super::stack::StackUse;
use super::strings::StringUse;
use super::x87;
use crate::native::features::FeatureSet;
use crate::native::{is_hint, is_special, normalise, plan, without_prefix};

/// Shapes remembered; a power of two.
const PLACES: usize = 1 << PLACE_BITS;
const PLACE_BITS: u32 = 13;

/// In which way an instruction is translated.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    /// It works on the stack, with words of so many bytes.
    Stack(StackUse, u8),
    /// `lea`
    Lea,
    /// As a string instruction.
    String(StringUse),
    /// `vzeroupper`
    ZeroUpper,
    /// As a division.
    Divide,
    /// It does nothing that a guest can see.
    Nothing,
    /// It works on the x87 unit, and is done in line.
    X87Control,
    /// It touches what is the machine's, and is done in line.
    Privileged(Touches),
    /// It is copied.
    Copied(Copying),
    /// It is a branch, or interpreted.
    Other,
}

/// What is known of all instructions of one shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) how: How,
    /// What it uses of the vector and x87 units.
    pub(super) need: u8,
    /// What it does to flags and registers, if the next one follows it.
    pub(super) effects: Effects,
}

impl Shape {
    /// That of `it`, which is done like that.
    fn of(how: How, it: &Instruction) -> Self {
        let need = copy::vector_need(&how);
        let effects = Effects::of_shape(&how, it);
        Self { how, need, effects }
    }

    /// How it is copied, if it is.
    pub(super) fn copying(&self) -> Option<&Copying> {
        match &self.how {
            How::Copied(copying) => Some(copying),
            _ => None,
        }
    }

    /// What it does on the stack, and with words of how many bytes.
    pub(super) fn stack(&self) -> Option<(StackUse, u8)> {
        match self.how {
            How::Stack(what, word) => Some((what, word)),
            _ => None,
        }
    }
}

/// A shape that is known, and what the instructions of it have in common.
///
/// Nearly every one is looked for in vain in the first cache of the CPU: it lies in one line.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Known {
    key: u64,
    shape: Shape,
}

const _: () = assert!(size_of::<Option<Known>>() == 64);

/// The shapes of instructions, for one CPU model.
pub(super) struct Shapes {
    places: Vec<Option<Known>>,
    factory: InstructionInfoFactory,
}

impl std::fmt::Debug for Shapes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shapes").field("places", &self.places.len()).finish_non_exhaustive()
    }
}

impl Shapes {
    pub(super) fn new() -> Self {
        Self { places: vec![None; PLACES], factory: InstructionInfoFactory::new() }
    }

    /// The shape of `instruction`, which gets the form in which it is copied, if it is. All calls
    /// have the same `features`.
    pub(super) fn of(&mut self, instruction: &mut Instruction, features: &FeatureSet) -> Shape {
        let code = general_form(without_prefix(instruction.code(), features));
        let key = key(code, instruction);
        // The upper bits of a product depend on all bits of its factors.
        let place = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - PLACE_BITS);
        let place = place as usize;
        let shape = match self.places.get(place) {
            Some(Some(known)) if known.key == key => known.shape,
            _ => {
                let mut it = *instruction;
                it.set_code(code);
                let shape = Shape::of(self.find_out(&it, features), &it);
                if let Some(place) = self.places.get_mut(place) {
                    *place = Some(Known { key, shape });
                }
                shape
            }
        };
        if matches!(shape.how, How::Copied(_)) {
            instruction.set_code(code);
            *instruction = normalise(instruction);
        }
        shape
    }

    fn find_out(&mut self, it: &Instruction, features: &FeatureSet) -> How {
        if let Some((what, word)) = StackUse::of(it) {
            return How::Stack(what, word);
        }
        if let Some(string) = StringUse::of(it) {
            return How::String(string);
        }
        match it.code() {
            Code::Lea_r64_m | Code::Lea_r32_m | Code::Lea_r16_m => return How::Lea,
            Code::VEX_Vzeroupper => return How::ZeroUpper,
            code if is_division(code) => return How::Divide,
            _ => {}
        }
        if is_hint(it) && it.mnemonic() != M::Pause {
            How::Nothing
        } else if x87::is_control(it) {
            How::X87Control
        } else if let Some(touches) = touches(it) {
            How::Privileged(touches)
        } else {
            self.copying(it, features).map_or(How::Other, How::Copied)
        }
    }

    fn copying(&mut self, it: &Instruction, features: &FeatureSet) -> Result<Copying, NotCopied> {
        let swaps = matches!(it.code(), Code::Xchg_r64_RAX | Code::Xchg_r32_EAX);
        if swaps || is_special(it, features) {
            return Err(NotCopied);
        }
        let plan = plan(it, features, &mut self.factory).map_err(|_| NotCopied)?;
        if x87::may_copy(&plan) { Copying::of(plan) } else { Err(NotCopied) }
    }
}

/// What two instructions have in common that differ in immediates and addresses only: their
/// `code` in its general form, for one, and their operands. Of a count it matters whether a shift
/// by it is none.
fn key(code: Code, it: &Instruction) -> u64 {
    let bits = [
        it.has_lock_prefix(),
        it.has_rep_prefix(),
        it.has_repne_prefix(),
        it.immediate8() & 31 == 0,
        it.immediate8() & 63 == 0,
    ];
    let head = bits.iter().fold(code as u64, |head, bit| head << 1 | u64::from(*bit));
    // A fifth operand is an immediate, if there is one.
    (0..it.op_count().min(4)).fold(head, |key, n| {
        let operand = match it.op_kind(n) {
            OpKind::Register => 0x100 | it.op_register(n) as u64,
            kind => kind as u64,
        };
        key << 9 | operand
    })
}

/// Forms with RAX built in, as forms that name their register; forms with an address built in,
/// as forms that may have any operand.
fn general_form(code: Code) -> Code {
    match code {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        Code::Add_AL_imm8 => Code::Add_rm8_imm8,
        Code::Add_AX_imm16 => Code::Add_rm16_imm16,
        Code::Add_EAX_imm32 => Code::Add_rm32_imm32,
        Code::Add_RAX_imm32 => Code::Add_rm64_imm32,
        Code::Or_AL_imm8 => Code::Or_rm8_imm8,
        Code::Or_AX_imm16 => Code::Or_rm16_imm16,
        Code::Or_EAX_imm32 => Code::Or_rm32_imm32,
        Code::Or_RAX_imm32 => Code::Or_rm64_imm32,
        Code::Adc_AL_imm8 => Code::Adc_rm8_imm8,
        Code::Adc_AX_imm16 => Code::Adc_rm16_imm16,
        Code::Adc_EAX_imm32 => Code::Adc_rm32_imm32,
        Code::Adc_RAX_imm32 => Code::Adc_rm64_imm32,
        Code::Sbb_AL_imm8 => Code::Sbb_rm8_imm8,
        Code::Sbb_AX_imm16 => Code::Sbb_rm16_imm16,
        Code::Sbb_EAX_imm32 => Code::Sbb_rm32_imm32,
        Code::Sbb_RAX_imm32 => Code::Sbb_rm64_imm32,
        Code::And_AL_imm8 => Code::And_rm8_imm8,
        Code::And_AX_imm16 => Code::And_rm16_imm16,
        Code::And_EAX_imm32 => Code::And_rm32_imm32,
        Code::And_RAX_imm32 => Code::And_rm64_imm32,
        Code::Sub_AL_imm8 => Code::Sub_rm8_imm8,
        Code::Sub_AX_imm16 => Code::Sub_rm16_imm16,
        Code::Sub_EAX_imm32 => Code::Sub_rm32_imm32,
        Code::Sub_RAX_imm32 => Code::Sub_rm64_imm32,
        Code::Xor_AL_imm8 => Code::Xor_rm8_imm8,
        Code::Xor_AX_imm16 => Code::Xor_rm16_imm16,
        Code::Xor_EAX_imm32 => Code::Xor_rm32_imm32,
        Code::Xor_RAX_imm32 => Code::Xor_rm64_imm32,
        Code::Cmp_AL_imm8 => Code::Cmp_rm8_imm8,
        Code::Cmp_AX_imm16 => Code::Cmp_rm16_imm16,
        Code::Cmp_EAX_imm32 => Code::Cmp_rm32_imm32,
        Code::Cmp_RAX_imm32 => Code::Cmp_rm64_imm32,
        Code::Test_AL_imm8 => Code::Test_rm8_imm8,
        Code::Test_AX_imm16 => Code::Test_rm16_imm16,
        Code::Test_EAX_imm32 => Code::Test_rm32_imm32,
        Code::Test_RAX_imm32 => Code::Test_rm64_imm32,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn decoded(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode()
    }

    #[test]
    fn what_is_remembered_is_what_would_be_found_out_again() {
        let features = FeatureSet::v3();
        let mut shapes = Shapes::new();
        let codes: [&[u8]; 9] = [
            &[0x83, 0xc0, 0x05],       // add eax, 5
            &[0x83, 0xc0, 0x7f],       // add eax, 0x7f
            &[0x01, 0x43, 0x10],       // add [rbx + 0x10], eax
            &[0x01, 0x06],             // add [rsi], eax
            &[0xf0, 0x01, 0x06],       // lock add [rsi], eax
            &[0xc1, 0xe0, 0x00],       // shl eax, 0
            &[0xc1, 0xe0, 0x07],       // shl eax, 7
            &[0x48, 0x05, 1, 2, 3, 4], // add rax, 0x04030201
            &[0xc5, 0xf4, 0x58, 0xc2], // vaddps ymm0, ymm1, ymm2
        ];
        for _ in 0..2 {
            for code in codes {
                let [mut instruction, mut other] = [decoded(code); 2];
                let fresh = Shapes::new().of(&mut instruction, &features);
                let known = shapes.of(&mut other, &features);
                assert_eq!(instruction, other);
                assert_eq!(format!("{known:?}"), format!("{fresh:?}"), "{instruction}");
                assert!(known.copying().is_some(), "{instruction}");
            }
        }
    }

    #[test]
    fn what_is_no_copy_is_told_apart() {
        let features = FeatureSet::v3();
        let mut shapes = Shapes::new();
        let mut how = |code: &[u8]| shapes.of(&mut decoded(code), &features).how;
        assert!(matches!(how(&[0x90]), How::Nothing), "nop");
        assert!(matches!(how(&[0xf3, 0x90]), How::Privileged(_)), "pause");
        assert!(matches!(how(&[0xc3]), How::Stack(StackUse::Return, 8)), "ret");
        assert!(matches!(how(&[0xdb, 0xe3]), How::Other), "fninit");
        assert!(matches!(how(&[0xa4]), How::String(one) if !one.repeated), "movsb");
        assert!(matches!(how(&[0xf3, 0xa4]), How::String(run) if run.repeated), "rep movsb");
    }
}
