//! What the verifier knows of the vector and x87 units.
//!
//! The x87 unit's registers are the guest's only while it is loaded, which the beginning of a
//! block makes sure of: all the rest comes behind that, and what interprets an instruction loads
//! it again or does not come back. An exception of it that is not masked would end the process,
//! so the control word is only loaded from a copy that has just been given all masks.

use iced_x86::{Code, Instruction, Mnemonic as M, Register as R};

use super::known::Known;
use super::operands::first_field;
use crate::state::fpu::X87_EXCEPTIONS;
use crate::translate::context::X87;
use crate::translate::fields;

#[derive(Debug, Default)]
pub(super) struct Units {
    /// They are loaded, a bit each.
    loaded: u64,
    /// A jump leads to what came before: it is no longer what every way comes by.
    joined: bool,
    /// What of them is loaded where some jump leads next, while none is for sure: a return has
    /// come here.
    aside: Option<u64>,
    /// These are, if the comparison just made holds.
    compared: Option<u64>,
    /// The spare field has all masks of a control word.
    masked: bool,
}

impl Units {
    /// What is called returns here, with whatever is loaded then.
    pub(super) fn returned(&mut self) {
        let loaded = std::mem::take(&mut self.loaded);
        self.aside.get_or_insert(loaded);
        (self.compared, self.masked) = (None, false);
    }

    /// Some jump leads here, and nothing else if what comes before does not `fall` through.
    pub(super) fn joined(&mut self, falls: bool) {
        if let Some(loaded) = self.aside.take().filter(|_| !falls) {
            self.loaded = loaded;
        }
        self.joined = true;
        (self.compared, self.masked) = (None, false);
    }

    /// Whether `it` may be executed with what is loaded.
    pub(super) fn allow(&self, it: &Instruction) -> Result<(), &'static str> {
        if it.is_save_restore_instruction() {
            return Err("whole units");
        }
        match it.mnemonic() {
            M::Fldenv | M::Fnstenv | M::Frstor | M::Fnsave => Err("whole units"),
            M::Fldcw if !(self.masked && of_spare(it)) => Err("a control word of any kind"),
            _ if self.loaded & u64::from(X87) == 0 && uses_x87(it) => Err("a unit not loaded"),
            _ => Ok(()),
        }
    }

    /// What is known behind `it`, before which the scratch register was known to be `value`.
    pub(super) fn follow(&mut self, it: &Instruction, value: &Known) {
        self.compared = match (it.mnemonic(), value) {
            (M::Cmp, Known::Units(need)) if it.op0_register() == R::EAX && !self.joined => {
                it.try_immediate(1).ok().filter(|immediate| immediate == need)
            }
            _ => None,
        };
        let masks = it.try_immediate(1).ok() == Some(X87_EXCEPTIONS.into());
        self.masked = it.code() == Code::Or_rm64_imm32 && of_spare(it) && masks;
    }

    /// A branch: what does not hold goes elsewhere.
    pub(super) fn branch(&mut self, it: &Instruction) {
        let compared = self.compared.take();
        if it.mnemonic() == M::Jne {
            self.loaded |= compared.unwrap_or(0);
        }
        self.masked = false;
    }
}

/// Whether the memory operand of `it` is the context's spare field.
fn of_spare(it: &Instruction) -> bool {
    first_field(it) == Some(fields::SPARE.0.into())
}

/// Whether `it` works on x87 or MMX registers, or the unit's control and status.
fn uses_x87(it: &Instruction) -> bool {
    let op_code = it.op_code();
    let opcode = op_code.op_code();
    let escape = matches!(opcode, 0xd8..=0xdf | 0xd8c0..=0xdfff)
        && op_code.table() == iced_x86::OpCodeTableKind::Normal
        && it.encoding() == iced_x86::EncodingKind::Legacy;
    let mmx = (0..it.op_count()).any(|n| it.try_op_register(n).is_ok_and(R::is_mm));
    escape || mmx || it.mnemonic() == M::Emms
}
