//! How each instruction is copied, remembered.
//!
//! Asking iced-x86's tables what an instruction reads, writes and needs takes longer than
//! emitting it. The answer is the same for all that differ in immediates and addresses only, and
//! programs use few others: so it is kept by that *shape*, in a small table.

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic as M, OpKind};

use super::assembler::NotCopied;
use super::x87;
use crate::native::features::FeatureSet;
use crate::native::{Plan, is_hint, is_special, normalise, plan, without_prefix};

/// Shapes remembered; a power of two.
const PLACES: usize = 1 << PLACE_BITS;
const PLACE_BITS: u32 = 10;

/// What is known of an instruction.
#[derive(Clone, Debug)]
pub(super) enum Known {
    /// It is copied as this says.
    Copied(Plan),
    /// It does nothing that a guest can see.
    Nothing,
    /// It is rewritten, or interpreted.
    Other,
}

impl Known {
    /// How it is copied, if it is.
    pub(super) fn plan(&self) -> Option<&Plan> {
        match self {
            Self::Copied(plan) => Some(plan),
            _ => None,
        }
    }
}

/// What is known of instructions, for one CPU model.
pub(super) struct Plans {
    places: Vec<Option<(u64, Known)>>,
    factory: InstructionInfoFactory,
}

impl std::fmt::Debug for Plans {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plans").field("places", &self.places.len()).finish_non_exhaustive()
    }
}

impl Plans {
    pub(super) fn new() -> Self {
        Self { places: vec![None; PLACES], factory: InstructionInfoFactory::new() }
    }

    /// What is known of `instruction`. All calls have the same `features`.
    pub(super) fn known(&mut self, instruction: &Instruction, features: &FeatureSet) -> Known {
        let mut it = *instruction;
        it.set_code(general_form(without_prefix(it.code(), features)));
        let shape = shape(&it);
        // The upper bits of a product depend on all bits of its factors.
        let place = shape.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - PLACE_BITS);
        if let Some(Some((known, what))) = self.places.get(place as usize)
            && *known == shape
        {
            let mut what = what.clone();
            if let Known::Copied(plan) = &mut what {
                plan.instruction = normalise(&it);
            }
            return what;
        }
        let what = self.find_out(&it, features);
        if let Some(place) = self.places.get_mut(place as usize) {
            *place = Some((shape, what.clone()));
        }
        what
    }

    fn find_out(&mut self, it: &Instruction, features: &FeatureSet) -> Known {
        if is_hint(it) && it.mnemonic() != M::Pause {
            return Known::Nothing;
        }
        self.plan(it, features).map_or(Known::Other, Known::Copied)
    }

    fn plan(&mut self, it: &Instruction, features: &FeatureSet) -> Result<Plan, NotCopied> {
        let swaps = matches!(it.code(), Code::Xchg_r64_RAX | Code::Xchg_r32_EAX);
        if swaps || is_special(it, features) {
            return Err(NotCopied);
        }
        let plan = plan(it, features, &mut self.factory).map_err(|_| NotCopied)?;
        if x87::may_copy(&plan) { Ok(plan) } else { Err(NotCopied) }
    }
}

/// What two instructions have in common that differ in immediates and addresses only.
fn shape(it: &Instruction) -> u64 {
    let head = (it.code() as u64) << 1 | u64::from(it.has_lock_prefix());
    // A fifth operand is an immediate, if there is one.
    (0..it.op_count().min(4)).fold(head, |shape, n| {
        let operand = match it.op_kind(n) {
            OpKind::Register => 0x100 | it.op_register(n) as u64,
            kind => kind as u64,
        };
        shape << 9 | operand
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
        let mut plans = Plans::new();
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
                let instruction = decoded(code);
                let fresh = Plans::new().known(&instruction, &features);
                let known = plans.known(&instruction, &features);
                assert_eq!(format!("{known:?}"), format!("{fresh:?}"), "{instruction}");
                assert!(known.plan().is_some(), "{instruction}");
            }
        }
    }

    #[test]
    fn what_is_no_copy_is_told_apart() {
        let features = FeatureSet::v3();
        let mut plans = Plans::new();
        let mut known = |code: &[u8]| plans.known(&decoded(code), &features);
        assert!(matches!(known(&[0x90]), Known::Nothing), "nop");
        assert!(matches!(known(&[0xf3, 0x90]), Known::Other), "pause");
        assert!(matches!(known(&[0xc3]), Known::Other), "ret");
        assert!(matches!(known(&[0xdb, 0xe3]), Known::Other), "fninit");
    }
}
