//! Random instructions of a given encoding.
//!
//! Memory operands are addressed in every way there is; what the base and index
//! registers must hold for that is noted beside the instruction.

use iced_x86::{
    Code, Decoder, Encoder, Instruction, Mnemonic as M, OpCodeOperandKind as K, OpKind,
    Register as R,
};

use crate::layout::{AREA, CODE, DATA, DATA_END, Mode};
use crate::oracle::Placed;
use crate::random::Random;

/// An instruction and what it wants of registers.
#[derive(Clone, Debug)]
pub(crate) struct Encoded {
    pub(crate) instruction: Instruction,
    pub(crate) bytes: Vec<u8>,
    pub(crate) placed: Placed,
    /// The linear address of the memory operand, if it has one.
    pub(crate) operand: u64,
    /// The base of FS and GS in 64-bit code.
    pub(crate) gs_base: u64,
    /// What registers must hold: number, value, and which bits of it matter.
    pub(crate) pins: Vec<(usize, u64, u64)>,
}

/// Somewhere in the data: mostly well inside, sometimes across a page, sometimes at the
/// edge, where there is no more memory.
pub(crate) fn somewhere(random: &mut Random) -> u64 {
    match random.below(16) {
        0 => DATA_END - random.below(72),
        1 => DATA - random.below(16) + random.below(16),
        2..=4 => DATA + 0x3000 - random.below(36),
        5..=9 => DATA + 0x2000 + random.below(0x1000),
        _ => (DATA + 0x2000 + random.below(0x1000)) & !63,
    }
}

struct Maker<'a> {
    mode: Mode,
    it: Instruction,
    pins: Vec<(usize, u64, u64)>,
    operand: u64,
    gs_base: u64,
    random: &'a mut Random,
    /// Registers that hold something else.
    taken: Vec<R>,
}

/// An instruction of `code` for `mode`, or why there is none.
pub(crate) fn encode(code: Code, mode: Mode, random: &mut Random) -> Result<Encoded, &'static str> {
    let offset =
        if random.one_in(8) { 0x1000 - random.below(15) } else { 0x400 + random.below(0x800) };
    let target = if random.one_in(2) {
        offset + 0x20 + random.below(0x30)
    } else {
        offset - 0x20 - random.below(0x30)
    };
    let placed = Placed { mode, offset, target };
    let ip = CODE - mode.base() + offset;
    let operand = somewhere(random);
    let gs_base = AREA - random.below(0x1000);
    let mut it = Instruction::new();
    it.set_code(code);
    let mut maker =
        Maker { mode, it, pins: Vec::new(), operand, gs_base, random, taken: Vec::new() };
    // Register operands first: bit tests must not use their offset as an address.
    let kinds = code.op_code().op_kinds();
    let mut later = Vec::new();
    for (n, kind) in kinds.iter().enumerate() {
        if maker.wants_memory(*kind) {
            later.push((n as u32, *kind));
        } else {
            maker.operand(n as u32, *kind, CODE - mode.base() + target)?;
        }
    }
    for (n, kind) in later {
        maker.memory(n, kind)?;
    }
    maker.prefixes();
    let Maker { it, pins, operand, gs_base, .. } = maker;
    let mut encoder = Encoder::new(mode.bitness());
    encoder
        .encode(&it, ip)
        .map_err(|_| "operands nobody here makes up: EVEX gathers, SSE4A, MOVDIR64B")?;
    let bytes = encoder.take_buffer();
    let instruction = Decoder::with_ip(mode.bitness(), &bytes, ip, 0).decode();
    if instruction.code() != code {
        return Err(
            "decodes as another instruction: pairs with FWAIT, and what only CPUs of long ago had",
        );
    }
    Ok(Encoded { instruction, bytes, placed, operand, gs_base, pins })
}

impl Maker<'_> {
    /// Whether this operand is to be memory.
    fn wants_memory(&mut self, kind: K) -> bool {
        match kind {
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem => self.random.below(5) < 3,
            K::mem
            | K::mem_offs
            | K::mem_vsib32x
            | K::mem_vsib64x
            | K::mem_vsib32y
            | K::mem_vsib64y => true,
            _ => false,
        }
    }

    fn register(&mut self, n: u32, register: R) {
        self.it.set_op_kind(n, OpKind::Register);
        self.it.set_op_register(n, register);
        if register.is_gpr() {
            self.taken.push(register.full_register());
        }
    }

    fn operand(&mut self, n: u32, kind: K, target: u64) -> Result<(), &'static str> {
        let long = self.mode == Mode::Long;
        let any = self.random.below(if long { 16 } else { 8 }) as u32;
        let bits = self.random.next();
        match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => {
                let high = [R::AH, R::CH, R::DH, R::BH];
                let low: &[R] = if long {
                    &[R::AL, R::CL, R::DL, R::BL, R::SPL, R::BPL, R::SIL, R::DIL, R::R8L, R::R15L]
                } else {
                    &[R::AL, R::CL, R::DL, R::BL]
                };
                // A REX prefix turns the high bytes into others.
                let one = if self.random.below(3) == 0 {
                    self.random.pick(&high)
                } else {
                    self.random.pick(low)
                };
                self.register(n, one);
            }
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_reg_mem => {
                self.register(n, R::AX + any)
            }
            K::r32_or_mem
            | K::r32_reg
            | K::r32_rm
            | K::r32_vvvv
            | K::r32_opcode
            | K::r32_reg_mem => {
                self.register(n, R::EAX + any);
            }
            K::r64_or_mem
            | K::r64_reg
            | K::r64_rm
            | K::r64_vvvv
            | K::r64_opcode
            | K::r64_reg_mem => {
                self.register(n, R::RAX + any);
            }
            K::seg_reg => {
                let segments: &[R] = &[R::ES, R::SS, R::DS, R::FS, R::GS, R::CS];
                let writes = n == 0;
                // CS cannot be loaded.
                let segments = if writes { &segments[..5] } else { segments };
                let one = self.random.pick(segments);
                self.register(n, one);
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => self.register(n, R::MM0 + any % 8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                self.register(n, R::XMM0 + any)
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                self.register(n, R::YMM0 + any)
            }
            K::al => self.register(n, R::AL),
            K::cl => self.register(n, R::CL),
            K::ax => self.register(n, R::AX),
            K::dx => self.register(n, R::DX),
            K::eax => self.register(n, R::EAX),
            K::rax => self.register(n, R::RAX),
            K::es => self.register(n, R::ES),
            K::cs => self.register(n, R::CS),
            K::ss => self.register(n, R::SS),
            K::ds => self.register(n, R::DS),
            K::fs => self.register(n, R::FS),
            K::gs => self.register(n, R::GS),
            K::st0 => self.register(n, R::ST0),
            K::sti_opcode => self.register(n, R::ST0 + any % 8),
            K::cr_reg => {
                let one = self.random.pick(&[R::CR0, R::CR2, R::CR3, R::CR4]);
                self.register(n, one);
            }
            K::dr_reg => self.register(n, R::DR0 + any % 8),
            K::seg_rSI | K::es_rDI | K::seg_rDI => self.string(n, kind),
            K::seg_rBX_al => {
                let width = self.address_width();
                let base = match width {
                    2 => R::BX,
                    4 => R::EBX,
                    _ => R::RBX,
                };
                self.it.set_op_kind(n, OpKind::Memory);
                self.it.set_memory_base(base);
                self.it.set_memory_index(R::AL);
                self.it.set_memory_index_scale(1);
                let at = self.operand.wrapping_sub(128).wrapping_sub(self.mode.base());
                self.pins.push((3, at, mask(width)));
            }
            K::imm8 => {
                if self.it.op_count() > 1 && matches!(self.it.mnemonic(), M::Enter) {
                    self.it.set_op_kind(n, OpKind::Immediate8_2nd);
                    self.it.set_immediate8_2nd(if bits & 0x100 == 0 {
                        bits as u8 & 3
                    } else {
                        bits as u8
                    });
                } else {
                    self.it.set_op_kind(n, OpKind::Immediate8);
                    self.it.set_immediate8(bits as u8);
                }
            }
            K::imm8_const_1 => {
                self.it.set_op_kind(n, OpKind::Immediate8);
                self.it.set_immediate8(1);
            }
            K::imm8sex16 => {
                self.it.set_op_kind(n, OpKind::Immediate8to16);
                self.it.set_immediate8to16(i16::from(bits as i8));
            }
            K::imm8sex32 => {
                self.it.set_op_kind(n, OpKind::Immediate8to32);
                self.it.set_immediate8to32(i32::from(bits as i8));
            }
            K::imm8sex64 => {
                self.it.set_op_kind(n, OpKind::Immediate8to64);
                self.it.set_immediate8to64(i64::from(bits as i8));
            }
            K::imm16 => {
                self.it.set_op_kind(n, OpKind::Immediate16);
                // What RET and ENTER move the stack by must stay within the data.
                let small = matches!(self.it.mnemonic(), M::Ret | M::Retf | M::Enter);
                self.it.set_immediate16(if small { bits as u16 & 0x3ff } else { bits as u16 });
            }
            K::imm32 => {
                self.it.set_op_kind(n, OpKind::Immediate32);
                self.it.set_immediate32(bits as u32);
            }
            K::imm32sex64 => {
                self.it.set_op_kind(n, OpKind::Immediate32to64);
                self.it.set_immediate32to64(i64::from(bits as i32));
            }
            K::imm64 => {
                self.it.set_op_kind(n, OpKind::Immediate64);
                self.it.set_immediate64(bits);
            }
            K::br16_1 | K::br16_2 => {
                if target > 0xffff {
                    return Err(
                        "a 16-bit branch out of a flat segment: nothing may be mapped where it goes",
                    );
                }
                self.it.set_op_kind(n, OpKind::NearBranch16);
                self.it.set_near_branch16(target as u16);
            }
            K::br32_1 | K::br32_4 => {
                self.it.set_op_kind(n, OpKind::NearBranch32);
                self.it.set_near_branch32(target as u32);
            }
            K::br64_1 | K::br64_4 => {
                self.it.set_op_kind(n, OpKind::NearBranch64);
                self.it.set_near_branch64(target);
            }
            K::farbr2_2 => {
                if target > 0xffff {
                    return Err(
                        "a 16-bit branch out of a flat segment: nothing may be mapped where it goes",
                    );
                }
                self.it.set_op_kind(n, OpKind::FarBranch16);
                self.it.set_far_branch16(target as u16);
                self.it.set_far_branch_selector(self.mode.selectors()[1]);
            }
            K::farbr4_2 => {
                self.it.set_op_kind(n, OpKind::FarBranch32);
                self.it.set_far_branch32(target as u32);
                self.it.set_far_branch_selector(self.mode.selectors()[1]);
            }
            _ => {
                return Err(
                    "operands no user-mode instruction of any model has: test, mask, bound and tile registers",
                );
            }
        }
        Ok(())
    }

    /// Bytes of the addresses to use: mostly the mode's own.
    fn address_width(&mut self) -> usize {
        let other = self.random.one_in(4);
        match (self.mode, other) {
            (Mode::Long, false) => 8,
            (Mode::Long, true) | (Mode::Flat32, _) | (Mode::Based32, false) => 4,
            (Mode::Bits16, other) => {
                if other {
                    4
                } else {
                    2
                }
            }
            (Mode::Based32, true) => 2,
        }
    }

    fn string(&mut self, n: u32, kind: K) {
        // Both operands of one instruction have one width.
        let widths = [
            (OpKind::MemorySegSI, 2),
            (OpKind::MemorySegESI, 4),
            (OpKind::MemorySegRSI, 8),
            (OpKind::MemoryESDI, 2),
            (OpKind::MemoryESEDI, 4),
            (OpKind::MemoryESRDI, 8),
        ];
        let earlier =
            (0..n).find_map(|i| widths.iter().find(|(kind, _)| *kind == self.it.op_kind(i)));
        let width = earlier.map_or_else(|| self.address_width(), |(_, width)| *width);
        let kinds = match kind {
            K::seg_rSI => [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI],
            K::es_rDI => [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI],
            _ => [OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI],
        };
        self.it.set_op_kind(n, kinds[width.trailing_zeros() as usize - 1]);
        // Often near one another, so that they overlap.
        let near = self.random.below(3) != 0;
        let at = if near {
            self.operand.wrapping_add(self.random.below(48)).wrapping_sub(24)
        } else {
            somewhere(self.random)
        };
        let register = if kind == K::seg_rSI { 6 } else { 7 };
        self.pins.push((register, at.wrapping_sub(self.mode.base()), mask(width)));
    }

    fn memory(&mut self, n: u32, kind: K) -> Result<(), &'static str> {
        self.it.set_op_kind(n, OpKind::Memory);
        let ea = self.operand.wrapping_sub(self.segment());
        let index =
            R::XMM0 + self.random.below(if self.mode == Mode::Long { 16 } else { 8 }) as u32;
        match kind {
            K::mem_offs => {
                let width = self.address_width();
                self.it.set_memory_displacement64(ea & mask(width));
                self.it.set_memory_displ_size(width as u32);
                return Ok(());
            }
            K::mem_vsib32x | K::mem_vsib64x => return self.gather(index, ea),
            K::mem_vsib32y | K::mem_vsib64y => {
                return self.gather(R::YMM0 + (index as u32 - R::XMM0 as u32), ea);
            }
            _ => {}
        }
        match self.address_width() {
            2 => self.memory16(ea),
            width => self.memory_sib(width, ea),
        }
        Ok(())
    }

    /// Picks a segment override now and then, and returns the base of the operand's
    /// segment; all those that are not FS or GS have the same.
    fn segment(&mut self) -> u64 {
        if !self.random.one_in(6) {
            return self.mode.base();
        }
        if self.mode == Mode::Long {
            let one = self.random.pick(&[R::FS, R::GS]);
            self.it.set_segment_prefix(one);
            self.gs_base
        } else {
            let one = self.random.pick(&[R::ES, R::SS, R::DS, R::CS]);
            self.it.set_segment_prefix(one);
            self.mode.base()
        }
    }

    fn memory16(&mut self, ea: u64) {
        let forms = [
            (R::BX, R::SI),
            (R::BX, R::DI),
            (R::BP, R::SI),
            (R::BP, R::DI),
            (R::SI, R::None),
            (R::DI, R::None),
            (R::BP, R::None),
            (R::BX, R::None),
            (R::None, R::None),
        ];
        let usable: Vec<_> = forms
            .into_iter()
            .filter(|(base, index)| self.free(*base) && self.free(*index))
            .collect();
        let (base, index) = self.random.pick(&usable);
        self.it.set_memory_base(base);
        self.it.set_memory_index(index);
        let displacement =
            if base == R::None { ea } else { self.random.next() as i8 as u64 } & 0xffff;
        let in_index = if index == R::None { 0 } else { self.random.next() & 0xffff };
        if index != R::None {
            self.pin(index, in_index, 0xffff);
        }
        if base != R::None {
            self.pin(base, ea.wrapping_sub(displacement).wrapping_sub(in_index), 0xffff);
        }
        self.it.set_memory_displacement64(displacement);
        self.it.set_memory_displ_size(if base == R::None { 2 } else { 1 });
    }

    fn memory_sib(&mut self, width: usize, ea: u64) {
        let mask = mask(width);
        let first = if width == 8 { R::RAX } else { R::EAX };
        let count = if self.mode == Mode::Long { 16 } else { 8 };
        let base = first + self.random.below(count) as u32;
        let index = first + self.random.below(count) as u32;
        let shift = self.random.below(4);
        let scale = 1 << shift;
        let small = self.random.next() as i8 as u64;
        let large = self.random.next() as i32 as u64;
        let free = self.free(base) && self.free(index);
        match self.random.below(6) {
            0 if self.mode == Mode::Long => {
                self.it.set_memory_base(if width == 8 { R::RIP } else { R::EIP });
                self.it.set_memory_displacement64(ea & mask);
                self.it.set_memory_displ_size(width as u32);
            }
            1 | 2 if free && index.number() != 4 && base.number() != 4 && base != index => {
                let displacement = if self.random.one_in(2) { small } else { large };
                let in_index = self.random.next() & self.mode.register_mask();
                self.it.set_memory_base(base);
                self.it.set_memory_index(index);
                self.it.set_memory_index_scale(scale);
                self.displacement(displacement & mask, width);
                self.pin(index, in_index, self.mode.register_mask());
                self.pin(base, ea.wrapping_sub(in_index << shift).wrapping_sub(displacement), mask);
            }
            3 if free && index.number() != 4 => {
                let in_index = self.random.next() & 0xffff;
                self.it.set_memory_index(index);
                self.it.set_memory_index_scale(scale);
                self.it.set_memory_displacement64(ea.wrapping_sub(in_index << shift) & mask);
                self.it.set_memory_displ_size(width as u32);
                self.pin(index, in_index, mask);
            }
            _ if self.free(base) => {
                self.it.set_memory_base(base);
                let large = if base.number() == 4 || self.random.one_in(2) { small } else { large };
                self.displacement(large & mask, width);
                self.pin(base, ea.wrapping_sub(large), mask);
            }
            _ => {
                self.it.set_memory_displacement64(ea & mask);
                self.it.set_memory_displ_size(width as u32);
            }
        }
    }

    fn displacement(&mut self, value: u64, width: usize) {
        self.it.set_memory_displacement64(value);
        let size = if value == 0 { self.random.pick(&[0, 1]) } else { width as u32 };
        self.it.set_memory_displ_size(size);
    }

    fn gather(&mut self, index: R, ea: u64) -> Result<(), &'static str> {
        let width = if self.mode == Mode::Long { 8 } else { 4 };
        let base = (if width == 8 { R::RAX } else { R::EAX }) + self.random.below(8) as u32;
        self.it.set_memory_base(base);
        self.it.set_memory_index(index);
        let scale = 1 << self.random.below(4);
        self.it.set_memory_index_scale(scale);
        self.it.set_memory_displacement64(16);
        self.it.set_memory_displ_size(1);
        self.pin(base, ea.wrapping_sub(16), mask(width));
        Ok(())
    }

    /// Whether a register may be part of an address.
    fn free(&self, register: R) -> bool {
        let bit_test = matches!(self.it.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
        let pinned =
            self.pins.iter().any(|(number, ..)| register.is_gpr() && *number == register.number());
        !(pinned || bit_test && self.taken.contains(&register.full_register()))
    }

    fn pin(&mut self, register: R, value: u64, mask: u64) {
        self.pins.push((register.number(), value & mask, mask));
    }

    fn prefixes(&mut self) {
        let op_code = self.it.op_code();
        let lockable = op_code.can_use_lock_prefix() && self.it.op0_kind() == OpKind::Memory;
        let lock = lockable && self.random.one_in(2);
        self.it.set_has_lock_prefix(lock);
        if self.it.is_string_instruction() {
            match self.random.below(3) {
                0 if op_code.can_use_rep_prefix() => self.it.set_has_rep_prefix(true),
                1 if op_code.can_use_repne_prefix() => self.it.set_has_repne_prefix(true),
                _ => {}
            }
        }
    }
}

fn mask(width: usize) -> u64 {
    u64::MAX >> (64 - width * 8)
}
