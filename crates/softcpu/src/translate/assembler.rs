//! Writes host code: whole instructions through iced-x86, the few fixed sequences as bytes.

use iced_x86::{Encoder, Instruction, Register as R};

use super::fields::{self, Field};
use super::mode::is_segmented;
use super::registers::{ADDRESS, Home, Homes, VALUE, part};
use super::relocate::{Kind, Relocation, Relocations};
use super::sharing::Origin;
use crate::decode::op::{Op, OpFlags};
use crate::state::{GPR_ZERO, SEG_FLAT};

/// Nothing that host code can do in place: the interpreter gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotCopied;

/// A place in the code, known now or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label(u32);

/// A condition, as the low four bits of Jcc's opcode have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Condition(pub(super) u8);

impl Condition {
    pub(super) const BELOW: Self = Self(2);
    pub(super) const EQUAL: Self = Self(4);
    pub(super) const NOT_EQUAL: Self = Self(5);
    pub(super) const ABOVE: Self = Self(7);

    pub(super) fn negated(self) -> Self {
        Self(self.0 ^ 1)
    }
}

/// Code on its way to `base`.
pub(super) struct Assembler {
    /// Where guest registers are.
    pub(super) homes: Homes,
    encoder: Encoder,
    code: Vec<u8>,
    base: u64,
    /// Where labels are, once they are bound.
    places: Vec<Option<usize>>,
    /// Four-byte distances to fill in.
    waiting: Vec<(usize, Label)>,
    /// What of it depends on where it is.
    relocations: Relocations,
}

impl std::fmt::Debug for Assembler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Assembler").field("code", &self.code).finish_non_exhaustive()
    }
}

impl Default for Assembler {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Assembler {
    /// For code that will be executed at `base`.
    pub(super) fn new(base: u64) -> Self {
        Self {
            homes: Homes::default(),
            encoder: Encoder::new(64),
            code: Vec::new(),
            base,
            places: Vec::new(),
            waiting: Vec::new(),
            relocations: Relocations::default(),
        }
    }

    /// Begins anew, with code that will be executed at `base`, in the memory of `code` and
    /// `relocations`.
    pub(super) fn restart(
        &mut self,
        base: u64,
        mut code: Vec<u8>,
        mut relocations: Vec<Relocation>,
    ) {
        code.clear();
        relocations.clear();
        self.places.clear();
        self.waiting.clear();
        self.homes = Homes::default();
        (self.base, self.code, self.relocations) = (base, code, relocations.into());
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> usize {
        self.code.len()
    }

    /// Where the next byte will be executed.
    fn here(&self) -> u64 {
        self.base.wrapping_add(self.len() as u64)
    }

    /// The code, with all distances filled in, and what of it depends on where it is.
    ///
    /// # Errors
    /// [`NotCopied`] for a label that was never bound.
    pub(super) fn finish(&mut self) -> Result<(Vec<u8>, Relocations), NotCopied> {
        for (at, Label(label)) in self.waiting.drain(..) {
            let place = self.places.get(label as usize).copied().flatten().ok_or(NotCopied)?;
            let distance = (place as i64).wrapping_sub(at as i64).wrapping_sub(4) as i32;
            self.code
                .get_mut(at..at.saturating_add(4))
                .ok_or(NotCopied)?
                .copy_from_slice(&distance.to_le_bytes());
        }
        Ok((std::mem::take(&mut self.code), std::mem::take(&mut self.relocations)))
    }

    /// Takes back everything behind the first `len` bytes.
    pub(super) fn take_back(&mut self, len: usize) {
        self.code.truncate(len);
        while self.waiting.pop_if(|(at, _)| *at >= len).is_some() {}
        self.relocations.take_back(len);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn bytes4(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// # Errors
    /// When there is no such instruction in 64-bit code.
    pub(super) fn emit(&mut self, instruction: &Instruction) -> Result<(), NotCopied> {
        let ip = self.here();
        self.encoder.set_buffer(std::mem::take(&mut self.code));
        let done = self.encoder.encode(instruction, ip);
        self.code = self.encoder.take_buffer();
        done.map(|_| ()).map_err(|_| NotCopied)
    }

    pub(super) fn label(&mut self) -> Label {
        let label = Label(self.places.len() as u32);
        self.places.push(None);
        label
    }

    /// `label` is here.
    pub(super) fn bind(&mut self, label: Label) {
        if let Some(place) = self.places.get_mut(label.0 as usize) {
            *place = Some(self.code.len());
        }
    }

    /// How far into the code `label` is, once it is bound.
    pub(super) fn place_of(&self, label: Label) -> Option<usize> {
        self.places.get(label.0 as usize).copied().flatten()
    }

    /// The four bytes just written are the distance to `label`.
    fn leads_to(&mut self, label: Label) {
        self.waiting.push((self.code.len().saturating_sub(4), label));
    }

    pub(super) fn jump(&mut self, label: Label) {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        self.leads_to(label);
    }

    pub(super) fn call_label(&mut self, label: Label) {
        self.bytes(&[0xe8, 0, 0, 0, 0]);
        self.leads_to(label);
    }

    pub(super) fn jump_if(&mut self, condition: Condition, label: Label) {
        self.bytes(&[0x0f, 0x80 | condition.0 & 15, 0, 0, 0, 0]);
        self.leads_to(label);
    }

    /// `opcode` and the distance to `address`, which is in the same code memory.
    fn with_distance(&mut self, opcode: u8, address: u64) {
        let next = self.here().wrapping_add(5);
        let [a, b, c, d] = (address.wrapping_sub(next) as u32).to_le_bytes();
        self.bytes(&[opcode, a, b, c, d]);
        self.depends(Kind::Thunk);
    }

    /// `jmp` to `address`, which is in the same code memory.
    pub(super) fn jump_to(&mut self, address: u64) {
        self.with_distance(0xe9, address);
    }

    pub(super) fn call(&mut self, address: u64) {
        self.with_distance(0xe8, address);
    }

    /// An instruction `opcode` on a 64-bit register and a field of the vCPU.
    fn with_field(&mut self, opcode: u8, register: R, field: Field) {
        self.with_field_by(0x48, opcode, register, field);
    }

    /// The same with another REX prefix.
    fn with_field_by(&mut self, rex: u8, opcode: u8, register: R, field: Field) {
        let number = register.number() as u8;
        let (rex, mod_rm) = (rex | (number >> 3 & 1) << 2, 0x04 | (number & 7) << 3);
        let [a, b, c, d] = field.0.to_le_bytes();
        self.bytes(&[0x65, rex, opcode, mod_rm, 0x25, a, b, c, d]);
    }

    /// `mov register, field`
    pub(super) fn load(&mut self, register: R, field: Field) {
        self.with_field(0x8b, register, field);
    }

    /// `mov field, register`
    pub(super) fn store(&mut self, field: Field, register: R) {
        self.with_field(0x89, register, field);
    }

    /// `add register, field`
    pub(super) fn add(&mut self, register: R, field: Field) {
        self.with_field(0x03, register, field);
    }

    /// `add register, field` for the register's lower half and what is there of the field; the
    /// upper half becomes zero.
    pub(super) fn add_low(&mut self, register: R, field: Field) {
        self.with_field_by(0x40, 0x03, register, field);
    }

    /// `sub register, field`
    pub(super) fn subtract(&mut self, register: R, field: Field) {
        self.with_field(0x2b, register, field);
    }

    /// One less in `field`, or on to `slow` if there was none left.
    pub(super) fn count_down(&mut self, field: Field, slow: Label) {
        // sub qword [field], 1
        self.bytes(&[0x65, 0x48, 0x83, 0x2c, 0x25]);
        self.bytes4(field.0);
        self.bytes(&[0x01]);
        self.jump_if(Condition::BELOW, slow);
    }

    /// `or register, field`
    pub(super) fn or(&mut self, register: R, field: Field) {
        self.with_field(0x0b, register, field);
    }

    /// `xor register, field`
    pub(super) fn xor(&mut self, register: R, field: Field) {
        self.with_field(0x33, register, field);
    }

    /// `cmp register, field`
    pub(super) fn compare(&mut self, register: R, field: Field) {
        self.with_field(0x3b, register, field);
    }

    /// `xor field, register`
    pub(super) fn xor_field(&mut self, field: Field, register: R) {
        self.with_field(0x31, register, field);
    }

    /// `and field, mask`, which has its upper half set.
    pub(super) fn and_field(&mut self, field: Field, mask: u64) {
        self.field_with_constant(0x81, 4, field, mask as u32);
    }

    /// `or field, bits`, below bit 31.
    pub(super) fn or_field(&mut self, field: Field, bits: u32) {
        self.field_with_constant(0x81, 1, field, bits);
    }

    /// `mov field, constant`, of 64 bits.
    pub(super) fn store_constant(&mut self, field: Field, constant: i32) {
        self.field_with_constant(0xc7, 0, field, constant as u32);
    }

    /// An instruction `opcode`, `extension` on a 64-bit field of the vCPU and a constant.
    fn field_with_constant(&mut self, opcode: u8, extension: u8, field: Field, constant: u32) {
        self.bytes(&[0x65, 0x48, opcode, 0x04 | (extension & 7) << 3, 0x25]);
        self.bytes4(field.0);
        self.bytes4(constant);
    }

    /// `test field, bits`, of its lower half.
    pub(super) fn test_field(&mut self, field: Field, bits: u32) {
        self.bytes(&[0x65, 0xf7, 0x04, 0x25]);
        self.bytes4(field.0);
        self.bytes4(bits);
    }

    /// Goes to `unusual` unless [`VALUE`] is a canonical address. Uses [`ADDRESS`].
    pub(super) fn canonical_only(&mut self, unusual: Label) {
        self.copy(ADDRESS, VALUE);
        // sar r13, 47; inc r13; cmp r13, 1
        self.bytes(&[0x49, 0xc1, 0xfd, 47, 0x49, 0xff, 0xc5, 0x49, 0x83, 0xfd, 1]);
        self.jump_if(Condition::ABOVE, unusual);
    }

    /// `mov to, from` between 64-bit registers.
    pub(super) fn copy(&mut self, to: R, from: R) {
        if to != from {
            let (a, b) = (to.number() as u8, from.number() as u8);
            self.bytes(&[0x48 | b >> 3 & 1 | (a >> 3 & 1) << 2, 0x8b, 0xc0 | (a & 7) << 3 | b & 7]);
        }
    }

    /// `mov register, value` in its shortest form.
    pub(super) fn constant(&mut self, register: R, value: u64) {
        let number = register.number() as u8;
        let (low, high) = (number & 7, number >> 3 & 1);
        if let Ok(value) = u32::try_from(value) {
            if high != 0 {
                self.bytes(&[0x41]);
            }
            let [a, b, c, d] = value.to_le_bytes();
            self.bytes(&[0xb8 | low, a, b, c, d]);
        } else if value as i32 as i64 as u64 == value {
            let [a, b, c, d] = (value as u32).to_le_bytes();
            self.bytes(&[0x48 | high, 0xc7, 0xc0 | low, a, b, c, d]);
        } else {
            let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
            self.bytes(&[0x48 | high, 0xb8 | low, a, b, c, d, e, f, g, h]);
        }
    }

    /// The number just written, at the end of the code, depends on where it is.
    pub(super) fn depends(&mut self, kind: Kind) {
        self.relocations.add(self.code.len().saturating_sub(kind.size()), kind);
    }

    /// The code written here does so in a way that moving it does not follow.
    pub(super) fn stays(&mut self) {
        self.relocations.stay();
    }

    /// `mov register, value`, a number of `kind`.
    pub(super) fn moving_constant(&mut self, register: R, value: u64, kind: Kind) {
        let before = self.code.len();
        self.constant(register, value);
        // A short form has no room for another value.
        if self.code.len().saturating_sub(before) > kind.size() {
            self.depends(kind);
        } else {
            self.stays();
        }
    }

    /// `mov register, address`, an address in the guest that moves with its code.
    pub(super) fn guest_address(&mut self, register: R, address: u64) {
        self.moving_constant(register, address, Kind::Address);
    }

    /// `mov to, from` between the lower halves of 64-bit registers; the upper one becomes zero.
    pub(super) fn copy_low(&mut self, to: R, from: R) {
        let (a, b) = (to.number() as u8, from.number() as u8);
        self.bytes(&[0x40 | b >> 3 & 1 | (a >> 3 & 1) << 2, 0x8b, 0xc0 | (a & 7) << 3 | b & 7]);
    }

    /// Leaves the lowest 16 bits of the 64-bit register `of`, and zeroes above them.
    pub(super) fn copy_lowest(&mut self, of: R) {
        // movzx of, of
        let number = of.number() as u8;
        let (high, low) = (number >> 3 & 1, number & 7);
        self.bytes(&[0x40 | high << 2 | high, 0x0f, 0xb7, 0xc0 | low << 3 | low]);
    }

    /// `lea to, [base + index * factor + displacement]`, `to` of 64, 32 or 16 bits.
    ///
    /// # Errors
    /// As [`Assembler::with_memory_operand`].
    pub(super) fn lea(
        &mut self,
        to: R,
        base: R,
        index: R,
        factor: u32,
        displacement: i64,
    ) -> Result<(), NotCopied> {
        let narrow = to.size() == 4;
        if index == R::None && displacement == 0 && base != R::None {
            if narrow {
                self.copy_low(to, base);
            } else {
                self.copy(to, base);
            }
            return Ok(());
        }
        self.with_memory_operand(0x8d, to, base, index, factor, displacement)
    }

    /// The instruction `opcode` on `register`, of 64, 32 or 16 bits, and what is at
    /// `[base + index * factor + displacement]`, either of which may be missing. What accesses are
    /// made of most, so it does not come by the encoder.
    ///
    /// # Errors
    /// [`NotCopied`] for a displacement of more than 32 bits.
    pub(super) fn with_memory_operand(
        &mut self,
        opcode: u8,
        register: R,
        base: R,
        index: R,
        factor: u32,
        displacement: i64,
    ) -> Result<(), NotCopied> {
        let displacement = i32::try_from(displacement).map_err(|_| NotCopied)?;
        let number = |register: R| register.number() as u8;
        if register.size() == 2 {
            self.bytes(&[0x66]);
        }
        let wide = if register.size() == 8 { 0x48 } else { 0x40 };
        let rex = wide | (number(register) >> 3 & 1) << 2;
        let rex = if index == R::None { rex } else { rex | (number(index) >> 3 & 1) << 1 };
        let rex = if base == R::None { rex } else { rex | number(base) >> 3 & 1 };
        if rex != 0x40 {
            self.bytes(&[rex]);
        }
        let short = i8::try_from(displacement);
        // RBP and R13 as a base have a displacement always; no base has one of four bytes.
        let mode = match (base, short) {
            (R::None, _) => 0,
            (base, Ok(0)) if number(base) & 7 != 5 => 0,
            (_, Ok(_)) => 0x40,
            (_, Err(_)) => 0x80,
        };
        let field = (number(register) & 7) << 3;
        let low = if base == R::None { 5 } else { number(base) & 7 };
        if index == R::None && base != R::None && low != 4 {
            self.bytes(&[opcode, mode | field | low]);
        } else {
            // Four in place of an index is none.
            let middle = if index == R::None { 4 } else { number(index) & 7 };
            let scale = (factor.trailing_zeros() as u8 & 3) << 6;
            self.bytes(&[opcode, mode | field | 4, scale | middle << 3 | low]);
        }
        match short {
            _ if base == R::None => self.bytes(&displacement.to_le_bytes()),
            Ok(short) if mode == 0x40 => self.bytes(&short.to_le_bytes()),
            Err(_) => self.bytes(&displacement.to_le_bytes()),
            Ok(_) => {}
        }
        Ok(())
    }

    /// Divides the guest's RDX:RAX by R13, whole or their lower halves, and goes to `unusual`
    /// where the quotient might not fit. Uses RAX.
    pub(super) fn divide(&mut self, wide: bool, signed: bool, unusual: Label) {
        // REX for R13 as the operand that the first field of ModRM names, and the second.
        let (reg, rm) = if wide { (0x4c, 0x49) } else { (0x44, 0x41) };
        let copy = |code: &mut Self| code.bytes(&[reg, 0x89, 0xd8]);
        if signed {
            // The dividend is a single word, and the divisor neither 0 nor -1:
            // mov rax, r11; sar rax, 63; cmp rax, rdx
            copy(self);
            if wide {
                self.bytes(&[0x48, 0xc1, 0xf8, 63, 0x48, 0x39, 0xd0]);
            } else {
                self.bytes(&[0xc1, 0xf8, 31, 0x39, 0xd0]);
            }
            self.jump_if(Condition::NOT_EQUAL, unusual);
            // lea rax, [r13 + 1]; cmp rax, 1
            self.bytes(&[rm, 0x8d, 0x45, 0x01]);
            if wide {
                self.bytes(&[0x48]);
            }
            self.bytes(&[0x83, 0xf8, 0x01]);
            self.jump_if(Condition::ABOVE.negated(), unusual);
        } else {
            // cmp rdx, r13
            self.bytes(&[reg, 0x39, 0xea]);
            self.jump_if(Condition::BELOW.negated(), unusual);
        }
        // mov rax, r11; div r13 or idiv r13; mov r11, rax
        copy(self);
        self.bytes(&[rm, 0xf7, if signed { 0xfd } else { 0xf5 }]);
        self.bytes(&[rm, 0x89, 0xc3]);
    }

    /// Makes the loans of `homes`.
    pub(super) fn lend(&mut self, homes: Homes) {
        for loan in homes.loans() {
            self.store(fields::gpr(loan.owner), loan.host);
        }
        self.lend_again(homes);
    }

    /// Makes them where their owners are in memory already.
    pub(super) fn lend_again(&mut self, homes: Homes) {
        for loan in homes.loans() {
            self.load(loan.host, fields::gpr(loan.user));
        }
        self.homes = homes;
    }

    /// All guest registers are where they are between traces.
    pub(super) fn give_back(&mut self) {
        if self.homes.lends_nothing() {
            return;
        }
        for loan in self.homes.loans() {
            if loan.changes {
                self.store(fields::gpr(loan.user), loan.host);
            }
            self.load(loan.host, fields::gpr(loan.owner));
        }
        self.homes = Homes::default();
    }

    /// Puts the guest register `number` into `to`.
    pub(super) fn fetch(&mut self, to: R, number: u8) {
        match self.homes.of(number) {
            Home::Host(host) => self.copy(to, host),
            Home::Memory => self.load(to, fields::gpr(number)),
        }
    }

    /// Puts `from` into the guest register `number`.
    pub(super) fn put(&mut self, number: u8, from: R) {
        match self.homes.of(number) {
            Home::Host(host) => self.copy(host, from),
            Home::Memory => self.store(fields::gpr(number), from),
        }
    }

    /// The effective address of `op`'s memory operand, plus `extra`, in `to`, within its
    /// segment. Leaves flags alone only where both registers of the operand are in host
    /// registers.
    ///
    /// # Errors
    /// Forms that are too rare to have.
    pub(super) fn effective(&mut self, to: R, op: &Op, extra: u64) -> Result<(), NotCopied> {
        let narrow = match op.addr_mask {
            u64::MAX => false,
            0xffff_ffff | 0xffff => true,
            _ => return Err(NotCopied),
        };
        let displacement = op.disp.wrapping_add(extra);
        if op.base == GPR_ZERO && op.index == GPR_ZERO {
            if !op.flags.contains(OpFlags::DISP_MOVES) {
                self.constant(to, displacement & op.addr_mask);
            } else if narrow {
                self.constant(to, displacement & op.addr_mask);
                self.stays();
            } else {
                self.guest_address(to, displacement);
            }
            return Ok(());
        }
        let origin = Origin { base: op.base, index: op.index, scale: op.scale, narrow };
        self.sum(
            to,
            origin,
            if narrow { displacement as i32 as i64 } else { displacement as i64 },
        )?;
        if op.addr_mask == 0xffff {
            self.copy_lowest(to);
        }
        Ok(())
    }

    /// `displacement` from `origin`, in `to`. Leaves flags alone as [`Assembler::effective`] does.
    ///
    /// # Errors
    /// As there.
    pub(super) fn sum(
        &mut self,
        to: R,
        origin: Origin,
        displacement: i64,
    ) -> Result<(), NotCopied> {
        if i32::try_from(displacement).is_err() {
            return Err(NotCopied);
        }
        let factor = 1 << (origin.scale & 3);
        let sum = if origin.narrow { part(to, R::EAX) } else { to };
        let host = |number| match number {
            GPR_ZERO => Some(R::None),
            number => match self.homes.of(number) {
                Home::Host(host) => Some(host),
                Home::Memory => None,
            },
        };
        match (host(origin.base), host(origin.index)) {
            (Some(base), Some(index)) => self.lea(sum, base, index, factor, displacement),
            (None, Some(index)) => {
                self.load(to, fields::gpr(origin.base));
                self.lea(sum, to, index, factor, displacement)
            }
            (Some(base), None) => {
                self.load(to, fields::gpr(origin.index));
                self.lea(sum, base, to, factor, displacement)
            }
            (None, None) => {
                self.load(to, fields::gpr(origin.index));
                self.lea(to, R::None, to, factor, displacement)?;
                self.add(to, fields::gpr(origin.base));
                if origin.narrow {
                    self.copy_low(to, to);
                }
                Ok(())
            }
        }
    }

    /// The linear address of `op`'s memory operand, plus `extra`, in `to`. Changes flags.
    ///
    /// # Errors
    /// As [`Assembler::effective`].
    pub(super) fn linear(&mut self, to: R, op: &Op, extra: u64) -> Result<(), NotCopied> {
        self.effective(to, op, extra)?;
        if is_segmented(op) {
            self.add_low(to, fields::segment_base(op.seg));
        } else if op.seg != SEG_FLAT {
            self.add(to, fields::segment_base(op.seg));
        }
        Ok(())
    }
}
