//! How copied instructions are written without asking the encoder.
//!
//! iced-x86's encoder looks up, for each instruction, what is the same for all of its shape:
//! prefixes, opcode, which operand is in which field. A *template* has that from the first time
//! one of them was encoded, and writes the others with their registers, address and constant in
//! place. It knows what most code is made of, instructions with ModRM or a register in the opcode
//! and no VEX prefix; whatever else there is in an instruction goes to the encoder as ever.

use iced_x86::{
    Encoder, EncodingKind, Instruction, OpCodeOperandKind as Kind, OpKind, Register as R,
};

use super::access::Place;
use super::assembler::{Assembler, NotCopied};
use super::registers::is_high_byte;

/// The longest instruction, bytes.
const LONGEST: usize = 15;

/// What comes before the last byte of an opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    /// 0F
    Two,
    /// 0F 38
    Three38,
    /// 0F 3A
    Three3A,
}

/// Which operand is in a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    First,
    Second,
    /// None: it has these bits instead.
    Constant(u8),
}

/// What all instructions of one shape have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Template {
    /// 66, F2 or F3; or zero, if it has none.
    prefix: u8,
    escape: Escape,
    opcode: u8,
    /// REX.W
    wide: bool,
    /// ModRM.reg
    reg: Field,
    /// ModRM.rm; or the opcode's low bits, if they name a register.
    rm: Field,
    in_opcode: bool,
}

/// An instruction on its way, or part of it.
#[derive(Clone, Copy, Debug, Default)]
struct Written {
    bytes: [u8; LONGEST],
    /// More than there is room for, if it was too long.
    len: usize,
}

impl Written {
    fn push(&mut self, byte: u8) {
        self.extend([byte]);
    }

    fn extend<const N: usize>(&mut self, bytes: [u8; N]) {
        let end = self.len.saturating_add(N);
        if let Some(room) = self.bytes.get_mut(self.len..end) {
            room.copy_from_slice(&bytes);
        }
        self.len = end;
    }

    fn as_slice(&self) -> Option<&[u8]> {
        self.bytes.get(..self.len)
    }
}

impl Template {
    /// That of all instructions of the shape of `it`. `None`: only the encoder knows.
    pub(super) fn of(it: &Instruction) -> Option<Self> {
        let mut it = *it;
        if it.op_kinds().any(|kind| kind == OpKind::Memory) {
            it.set_segment_prefix(R::None);
            Place::at(0).give_to(&mut it);
        }
        let info = it.op_code();
        if info.encoding() != EncodingKind::Legacy || it.has_lock_prefix() {
            return None;
        }
        let (mut reg, mut rm, mut in_opcode) = (None, None, false);
        for n in 0..it.op_count() {
            // No instruction without a VEX prefix has a field for a third one.
            let field = match n {
                0 => Some(Field::First),
                1 => Some(Field::Second),
                _ => None,
            };
            match info.op_kind(n) {
                Kind::r8_reg | Kind::r16_reg | Kind::r32_reg | Kind::r64_reg | Kind::xmm_reg => {
                    reg = Some(field?);
                }
                Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem => {
                    rm = Some(field?);
                }
                Kind::mem | Kind::xmm_or_mem => rm = Some(field?),
                Kind::r8_opcode | Kind::r16_opcode | Kind::r32_opcode | Kind::r64_opcode => {
                    (rm, in_opcode) = (Some(field?), true);
                }
                Kind::imm8 | Kind::imm16 | Kind::imm32 | Kind::imm64 => {}
                Kind::imm8sex16 | Kind::imm8sex32 | Kind::imm8sex64 | Kind::imm32sex64 => {}
                Kind::cl => {}
                _ => return None,
            }
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&it, 0).ok()?;
        let bytes = encoder.take_buffer();
        let template = Self::from(&bytes, reg, rm?, in_opcode)?;
        // Whatever was not thought of above shows here.
        (template.write(&it)?.as_slice()? == bytes).then_some(template)
    }

    /// That of `bytes`, which has operands in those fields.
    fn from(bytes: &[u8], reg: Option<Field>, rm: Field, in_opcode: bool) -> Option<Self> {
        let mut bytes = bytes.iter().copied();
        let mut opcode = bytes.next()?;
        let mut prefix = 0;
        if matches!(opcode, 0x66 | 0xf2 | 0xf3) {
            (prefix, opcode) = (opcode, bytes.next()?);
        }
        let mut wide = false;
        if opcode & 0xf0 == 0x40 {
            (wide, opcode) = (opcode & 8 != 0, bytes.next()?);
        }
        let mut escape = Escape::None;
        if opcode == 0x0f {
            (escape, opcode) = (Escape::Two, bytes.next()?);
            let three = match opcode {
                0x38 => Some(Escape::Three38),
                0x3a => Some(Escape::Three3A),
                _ => None,
            };
            if let Some(three) = three {
                (escape, opcode) = (three, bytes.next()?);
            }
        }
        if in_opcode {
            let reg = Field::Constant(0);
            return Some(Self { prefix, escape, opcode: opcode & !7, wide, reg, rm, in_opcode });
        }
        let constant = Field::Constant(bytes.next()? >> 3 & 7);
        Some(Self { prefix, escape, opcode, wide, reg: reg.unwrap_or(constant), rm, in_opcode })
    }

    /// The bytes of `it`, which is of the shape that this is of, but for its registers, address
    /// and constant. `None`: only the encoder knows.
    fn write(&self, it: &Instruction) -> Option<Written> {
        let mut rex = if self.wide { 0x48 } else { 0 };
        let mut register = |register: R, bit: u8| {
            let number = number(register);
            if number > 7 {
                rex |= 0x40 | bit;
            } else if matches!(register, R::SPL | R::BPL | R::SIL | R::DIL) {
                rex |= 0x40;
            }
            (!is_high_byte(register)).then_some(number & 7)
        };
        let reg = match self.reg {
            Field::First => register(it.op0_register(), 4)?,
            Field::Second => register(it.op1_register(), 4)?,
            Field::Constant(bits) => bits,
        };
        let (kind, rm) = match self.rm {
            Field::First => (it.op0_kind(), it.op0_register()),
            Field::Second => (it.op1_kind(), it.op1_register()),
            Field::Constant(_) => return None,
        };
        let mut opcode = self.opcode;
        let mut address = Address::default();
        match kind {
            OpKind::Register if self.in_opcode => opcode |= register(rm, 1)?,
            OpKind::Register => address.mod_rm = Some(0xc0 | reg << 3 | register(rm, 1)?),
            OpKind::Memory => {
                address = memory(it, reg)?;
                rex |= address.rex;
            }
            _ => return None,
        }
        let mut written = Written::default();
        match it.segment_prefix() {
            R::None => {}
            R::GS => written.push(0x65),
            _ => return None,
        }
        if self.prefix != 0 {
            written.push(self.prefix);
        }
        if rex != 0 {
            written.push(rex);
        }
        match self.escape {
            Escape::None => {}
            Escape::Two => written.push(0x0f),
            Escape::Three38 => written.extend([0x0f, 0x38]),
            Escape::Three3A => written.extend([0x0f, 0x3a]),
        }
        written.push(opcode);
        if let Some(mod_rm) = address.mod_rm {
            written.push(mod_rm);
        }
        if let Some(sib) = address.sib {
            written.push(sib);
        }
        match address.displacement {
            Displacement::None => {}
            Displacement::Short(short) => written.push(short as u8),
            Displacement::Long(long) => written.extend(long.to_le_bytes()),
        }
        for n in 0..it.op_count() {
            let constant = || it.try_immediate(n).ok();
            match it.op_kind(n) {
                OpKind::Immediate8 | OpKind::Immediate8to16 => written.push(constant()? as u8),
                OpKind::Immediate8to32 | OpKind::Immediate8to64 => written.push(constant()? as u8),
                OpKind::Immediate16 => written.extend((constant()? as u16).to_le_bytes()),
                OpKind::Immediate32 | OpKind::Immediate32to64 => {
                    written.extend((constant()? as u32).to_le_bytes());
                }
                OpKind::Immediate64 => written.extend(constant()?.to_le_bytes()),
                _ => {}
            }
        }
        Some(written)
    }
}

/// What stands for `register` in an instruction.
fn number(register: R) -> u8 {
    let number = register.number() as u8;
    // iced-x86 counts AH to BH, which come before SPL.
    if register <= R::R15L && number > 7 { number.wrapping_sub(4) } else { number }
}

/// What is behind the opcode, but for constants.
#[derive(Clone, Copy, Debug, Default)]
struct Address {
    /// Bits of REX that it takes.
    rex: u8,
    mod_rm: Option<u8>,
    sib: Option<u8>,
    displacement: Displacement,
}

#[derive(Clone, Copy, Debug, Default)]
enum Displacement {
    #[default]
    None,
    Short(i8),
    Long(i32),
}

/// The memory operand of `it`, with `reg` in ModRM.
fn memory(it: &Instruction, reg: u8) -> Option<Address> {
    let (base, index) = (it.memory_base(), it.memory_index());
    let displacement = it.memory_displacement64() as i64;
    let long = i32::try_from(displacement).ok()?;
    let reg = reg << 3;
    if base == R::None {
        // The vCPU's own memory: an address without registers.
        (index == R::None && it.memory_displ_size() == 8).then_some(())?;
        let displacement = Displacement::Long(long);
        return Some(Address { rex: 0, mod_rm: Some(reg | 4), sib: Some(0x25), displacement });
    }
    if base.size() != 8 || index != R::None && index.size() != 8 {
        return None;
    }
    let (low, high) = (base.number() as u8 & 7, base.number() as u8 >> 3 & 1);
    let (mode, displacement) = match i8::try_from(displacement) {
        // RBP and R13 have a displacement always.
        Ok(0) if low != 5 => (0, Displacement::None),
        Ok(short) => (0x40, Displacement::Short(short)),
        Err(_) => (0x80, Displacement::Long(long)),
    };
    let mut rex = if high != 0 { 0x41 } else { 0 };
    let (rm, sib) = if index == R::None && low != 4 {
        (low, None)
    } else {
        let number = if index == R::None { 4 } else { index.number() as u8 };
        if number > 7 {
            rex |= 0x42;
        }
        let scale = it.memory_index_scale().trailing_zeros() as u8 & 3;
        let scale = if index == R::None { 0 } else { scale };
        (4, Some(scale << 6 | (number & 7) << 3 | low))
    };
    Some(Address { rex, mod_rm: Some(mode | reg | rm), sib, displacement })
}

impl Assembler {
    /// Writes `it` by `template`, if that is one for it.
    ///
    /// # Errors
    /// As [`Assembler::emit`].
    pub(super) fn emit_by(
        &mut self,
        template: Option<Template>,
        it: &Instruction,
    ) -> Result<(), NotCopied> {
        let written = template.and_then(|template| template.write(it));
        match written.as_ref().and_then(Written::as_slice) {
            Some(bytes) => {
                self.bytes(bytes);
                Ok(())
            }
            None => self.emit(it),
        }
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Decoder, DecoderOptions};

    use super::*;
    use crate::testing::Random;
    use crate::translate::fields;
    use crate::translate::memory_form::put_in_memory;

    fn encoded(it: &Instruction) -> Option<Vec<u8>> {
        let mut encoder = Encoder::new(64);
        encoder.encode(it, 0).ok()?;
        Some(encoder.take_buffer())
    }

    /// An instruction at random, as it would be copied.
    fn some_instruction(random: &mut Random) -> Option<Instruction> {
        let mut bytes = [0_u8; LONGEST];
        bytes.fill_with(|| random.next() as u8);
        // What there is much of.
        let begin: &[u8] = match random.below(8) {
            0 => &[0x48],
            1 => &[0x66],
            2 => &[0x0f],
            3 => &[0x48, 0x0f],
            4 => &[0x66, 0x0f],
            5 => &[0xf2, 0x0f],
            _ => &[],
        };
        bytes.iter_mut().zip(begin).for_each(|(byte, begin)| *byte = *begin);
        let it = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
        (!it.is_invalid()).then(|| crate::native::normalise(&it))
    }

    /// The same with other registers, another constant and another place, at random.
    fn another(it: &Instruction, random: &mut Random) -> Option<Instruction> {
        let mut it = *it;
        for n in 0..it.op_count() {
            let register = it.op_register(n);
            let kinds = [Kind::cl, Kind::al, Kind::ax, Kind::eax, Kind::rax];
            if it.op_kind(n) == OpKind::Register && !kinds.contains(&it.op_code().op_kind(n)) {
                let number = random.below(16) as u32;
                let other = match register.size() {
                    1 => R::AL + random.below(20) as u32,
                    2 => R::AX + number,
                    4 => R::EAX + number,
                    8 => R::RAX + number,
                    _ => R::XMM0 + number,
                };
                it.try_set_op_register(n, other).ok()?;
            } else if it.op_kind(n) == OpKind::Memory {
                let index = random.pick(&[R::None, R::RAX, R::RBP, R::R9, R::R12, R::R13]);
                let at = random.pick(&[0, 1, -128, 128, 0x1234, -0x1_0000]);
                let factor = if index == R::None { 1 } else { 1 << random.below(4) };
                let code = it.code();
                if random.one_in(4) {
                    put_in_memory(&mut it, n, code, fields::gpr(11)).ok()?;
                } else {
                    Place::from(index, factor, at).give_to(&mut it);
                }
            } else if it.op_code().op_kind(n) == Kind::imm32 {
                it.set_immediate32(random.next() as u32);
            }
        }
        Some(it)
    }

    #[test]
    fn what_a_template_writes_is_what_the_encoder_would() {
        let mut random = Random(0x5eed);
        let (mut by_template, mut by_encoder) = (0, 0);
        for _ in 0..100_000 {
            let Some(it) = some_instruction(&mut random) else { continue };
            let Some(template) = Template::of(&it) else { continue };
            for _ in 0..4 {
                let Some(other) = another(&it, &mut random) else { continue };
                let written = template.write(&other);
                match (written.as_ref().and_then(Written::as_slice), encoded(&other)) {
                    (Some(written), Some(bytes)) => {
                        assert_eq!(written, bytes, "{other} like {it}: {template:?}");
                        by_template += 1;
                    }
                    // A high byte beside what has a REX prefix is no instruction.
                    (written, _) => {
                        assert_eq!(written, None, "{other}");
                        by_encoder += 1;
                    }
                }
            }
        }
        assert!(by_template > 10 * by_encoder, "{by_template} of {by_encoder}");
    }

    #[test]
    fn what_code_is_made_of_has_a_template() {
        let codes: [&[u8]; 12] = [
            &[0x01, 0xd8],                                     // add eax, ebx
            &[0x48, 0x8b, 0x43, 0x10],                         // mov rax, [rbx + 16]
            &[0x48, 0x89, 0x04, 0xcb],                         // mov [rbx + rcx * 8], rax
            &[0x0f, 0xb6, 0x06],                               // movzx eax, byte [rsi]
            &[0x40, 0x88, 0x37],                               // mov [rdi], sil
            &[0xb8, 1, 0, 0, 0],                               // mov eax, 1
            &[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8],             // movabs rax, 0x0807060504030201
            &[0x83, 0xc0, 0x05],                               // add eax, 5
            &[0x66, 0x81, 0x7b, 0x02, 0x34, 0x12],             // cmp word [rbx + 2], 0x1234
            &[0x48, 0xc7, 0x44, 0x24, 0x08, 0xff, 0xff, 0, 0], // mov qword [rsp + 8], 0xffff
            &[0xf3, 0x0f, 0x7e, 0x06],                         // movq xmm0, [rsi]
            &[0x48, 0xd3, 0xe8],                               // shr rax, cl
        ];
        for code in codes {
            let it = Decoder::with_ip(64, code, 0, DecoderOptions::NONE).decode();
            let template = Template::of(&crate::native::normalise(&it));
            assert!(template.is_some(), "{it}");
        }
        // The encoder's.
        let codes: [(&[u8], Code); 3] = [
            (&[0xf0, 0x01, 0x06], Code::Add_rm32_r32),
            (&[0xc5, 0xf4, 0x58, 0xc2], Code::VEX_Vaddps_ymm_ymm_ymmm256),
            (&[0xd1, 0xe0], Code::Shl_rm32_1),
        ];
        for (bytes, code) in codes {
            let it = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
            assert_eq!(it.code(), code);
            assert_eq!(Template::of(&it), None, "{it}");
        }
    }
}
