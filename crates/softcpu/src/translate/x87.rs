//! The x87 unit and MMX, on the host's own registers.
//!
//! As the vector unit is, it is loaded when a block first wants it and stored when translated
//! code is left ([`super::thunks`]), from and to the image that the interpreter's stubs use.
//! A guest may have it here only while all of its exceptions are masked and none waits: so the
//! host never raises one. `fldcw`, which could change that, looks first.
//!
//! The image has no host addresses in it. FIP and FOP are those of the last instruction that
//! sets them, which translated code notes as the address of its op, unless the next one sets
//! them anyway; when the unit is stored, they are taken from there. FDP is only set by what
//! raises an exception that is not masked, so nothing here sets it.

use iced_x86::{Code, Instruction, MemoryOperand, Register as R};

use super::access::Access;
use super::assembler::{Assembler, Condition, NotCopied};
use super::block::Block;
use super::context::X87;
use super::copy::Copying;
use super::fields;
use super::registers::{ADDRESS, VALUE};
use super::relocate::Kind;
use crate::decode::op::Op;
use crate::native::{Plan, Traits};
use crate::state::fpu::X87_EXCEPTIONS;

#[cfg(test)]
mod tests;

/// What XSAVE and XRSTOR are to look after.
const COMPONENT: u64 = crate::state::fpu::XCR0_X87;

/// Whether `it` uses the unit without being copied: it is done here, or does nothing.
pub(super) fn is_control(it: &Instruction) -> bool {
    matches!(it.code(), Code::Fldcw_m2byte | Code::Wait)
}

/// Whether what `plan` has of the unit, if anything, can be copied.
pub(super) fn may_copy(plan: &Plan) -> bool {
    !plan.traits.contains(Traits::RESETS_POINTERS) && plan.instruction.code() != Code::Fldcw_m2byte
}

/// Whether what is copied sets FIP and FOP.
pub(super) fn sets_pointers(copying: &Copying) -> bool {
    copying.traits.contains(Traits::POINTERS)
}

impl Block<'_> {
    /// One of those that [`is_control`] knows.
    ///
    /// # Errors
    /// It must be interpreted.
    pub(super) fn x87_control(&mut self, it: &Instruction, op: &Op) -> Result<(), NotCopied> {
        if it.code() == Code::Wait {
            return Ok(());
        }
        let detour = self.detour(op)?;
        let from = self.check(op, op, Access::load(2))?;
        let load = Instruction::with2(Code::Movzx_r32_rm16, R::EAX, from.operand());
        self.code.emit(&load.map_err(|_| NotCopied)?)?;
        // Loaded from a copy, which nobody else can change.
        self.code.store(fields::SPARE, VALUE);
        // and eax, masks; cmp eax, masks
        let masks = X87_EXCEPTIONS as u8;
        self.code.bytes(&[0x83, 0xe0, masks, 0x83, 0xf8, masks]);
        self.code.jump_if(Condition::NOT_EQUAL, detour.unusual);
        // They are set; now it can be seen.
        self.code.or_field(fields::SPARE, X87_EXCEPTIONS.into());
        let load = Instruction::with1(Code::Fldcw_m2byte, fields::SPARE.operand());
        self.code.emit(&load.map_err(|_| NotCopied)?)?;
        self.resume_here();
        self.rejoin(detour);
        Ok(())
    }

    /// Notes that `op`, the step's, is the last that has set FIP and FOP, if what is copied does that. If
    /// the next one does too, only the way to the interpreter does so first, should it be taken.
    /// Uses [`VALUE`].
    pub(super) fn note_x87(&mut self, copying: &Copying, op: &Op) {
        self.unnoted = None;
        if sets_pointers(copying) {
            let kept = self.keep(op);
            // Where a jump comes in, another may have been the last.
            if self.sets_pointers_next() && !self.heads.has(op.next_rip()) {
                self.unnoted = Some(kept);
            } else {
                self.code.note_x87(kept);
            }
        }
    }
}

impl Assembler {
    /// Notes the op at `address`. Uses [`VALUE`].
    pub(super) fn note_x87(&mut self, address: u64) {
        self.moving_constant(VALUE, address, Kind::Op);
        self.store(fields::X87_OP, VALUE);
    }

    /// The guest's unit to the image, and the host's as Rust wants it. All general registers
    /// but RBX, RBP and RSP are lost.
    ///
    /// # Errors
    /// None, unless iced-x86 changes.
    pub(super) fn save_x87(&mut self) -> Result<(), NotCopied> {
        let [fip, fdp, noted] = [R::RSI, R::RDI, R::R8];
        // movzx ecx, word [fop]
        self.bytes(&[0x65, 0x0f, 0xb7, 0x0c, 0x25]);
        self.bytes(&fields::X87_FOP.0.to_le_bytes());
        self.load(fip, fields::X87_FIP);
        self.load(fdp, fields::X87_FDP);
        self.load(noted, fields::X87_OP);
        // test r8, r8
        self.bytes(&[0x4d, 0x85, 0xc0]);
        let none = self.label();
        self.jump_if(Condition::EQUAL, none);
        for (code, to, at) in [
            (Code::Mov_r64_rm64, fip, std::mem::offset_of!(Op, rip)),
            // FOP is in the upper half of the immediate, as the interpreter has it.
            (Code::Mov_r32_rm32, R::ECX, std::mem::offset_of!(Op, imm).wrapping_add(4)),
        ] {
            let from = MemoryOperand::with_base_displ(noted, at as i64);
            self.emit(&Instruction::with2(code, to, from).map_err(|_| NotCopied)?)?;
        }
        // and ecx, 0x7ff
        self.bytes(&[0x81, 0xe1, 0xff, 0x07, 0, 0]);
        self.bind(none);
        self.component(Code::Xsave64_mem)?;
        // mov [fop], cx
        self.bytes(&[0x65, 0x66, 0x89, 0x0c, 0x25]);
        self.bytes(&fields::X87_FOP.0.to_le_bytes());
        self.store(fields::X87_FIP, fip);
        self.store(fields::X87_FDP, fdp);
        // Whatever was in its initial state: the image has all of it.
        self.constant(VALUE, COMPONENT);
        self.store(fields::X87_HEADER, VALUE);
        self.emit(&Instruction::with(Code::Fninit))?;
        self.and_field(fields::VECTORS, !u64::from(X87));
        Ok(())
    }

    /// The unit from the image, if it may be and is not loaded. Uses both scratch registers.
    ///
    /// # Errors
    /// None, unless iced-x86 changes.
    pub(super) fn load_x87(&mut self) -> Result<(), NotCopied> {
        let done = self.label();
        self.test_field(fields::VECTORS, X87.into());
        self.jump_if(Condition::NOT_EQUAL, done);
        self.test_field(fields::ALLOWED, X87.into());
        self.jump_if(Condition::EQUAL, done);
        self.or_field(fields::VECTORS, X87.into());
        self.constant(VALUE, 0);
        self.store(fields::X87_OP, VALUE);
        self.copy(ADDRESS, R::RDX);
        self.component(Code::Xrstor64_mem)?;
        self.copy(R::RDX, ADDRESS);
        self.bind(done);
        Ok(())
    }

    /// XSAVE or XRSTOR of the unit alone. Uses RAX and RDX.
    fn component(&mut self, code: Code) -> Result<(), NotCopied> {
        self.constant(VALUE, COMPONENT);
        // xor edx, edx
        self.bytes(&[0x31, 0xd2]);
        self.emit(&Instruction::with1(code, fields::X87_IMAGE.operand()).map_err(|_| NotCopied)?)
    }
}
