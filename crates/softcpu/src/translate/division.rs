//! Divisions, whose faults are the interpreter's: so is every one that might fault.

use iced_x86::{Code, Instruction, Register as R};

use super::access::Access;
use super::assembler::NotCopied;
use super::block::Block;
use super::cold::Cold;
use super::flags::Flags;
use super::registers::{ADDRESS, part};
use crate::decode::op::Op;

/// Whether [`Block::divide`] does `code`.
pub(super) fn is_division(code: Code) -> bool {
    matches!(code, Code::Div_rm32 | Code::Div_rm64 | Code::Idiv_rm32 | Code::Idiv_rm64)
}

impl Block<'_> {
    /// A division, where it cannot fault: what might is interpreted.
    pub(super) fn divide(&mut self, instruction: &Instruction, op: &Op) -> Result<(), NotCopied> {
        let (wide, signed) = match instruction.code() {
            Code::Div_rm32 => (false, false),
            Code::Idiv_rm32 => (false, true),
            code => (true, code == Code::Idiv_rm64),
        };
        self.save_flags()?;
        self.flags = Flags::Context;
        self.producer = None;
        let resume = self.code.label();
        let kept = self.keep(op);
        let unusual = self.apart(Cold::Interpret { op: kept, resume, to_host: false, again: None });
        self.in_address = None;
        if instruction.op0_kind() == iced_x86::OpKind::Register {
            self.code.fetch(ADDRESS, instruction.op0_register().number() as u8);
        } else {
            let access = Access::load(if wide { 8 } else { 4 });
            let place = self.code.check(&self.mode.operand(op), access, unusual)?;
            let (load, to) = if wide {
                (Code::Mov_r64_rm64, ADDRESS)
            } else {
                (Code::Mov_r32_rm32, part(ADDRESS, R::EAX))
            };
            let load = Instruction::with2(load, to, place.operand()).map_err(|_| NotCopied)?;
            self.code.emit(&load)?;
        }
        self.code.divide(wide, signed, unusual);
        self.code.bind(resume);
        Ok(())
    }
}
