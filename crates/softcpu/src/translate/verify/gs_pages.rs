//! Pages behind the base of GS: is what is kept of one used for no more than that page, where its
//! entry was found to be for the present base?

use iced_x86::{Code, Instruction, Mnemonic as M};

use super::known::Known;
use super::operands::field;
use super::pointers::Pointer;
use crate::addr::{PAGE_OFFSET, PAGE_SHIFT};
use crate::mmu::gs_pages::PAGES;
use crate::translate::fields::{self, Field};
use crate::translate::registers::{ADDRESS, VALUE};

#[cfg(test)]
mod tests;

/// What was looked at just now.
#[derive(Debug, Default)]
pub(super) struct GsPages {
    /// The base was compared with that of this page.
    compared: Option<usize>,
    /// And is the same.
    found: Option<usize>,
}

/// The page whose `part` `it` has as its memory operand.
fn page_of(it: &Instruction, part: fn(usize) -> Field) -> Option<usize> {
    let at = field(it)?;
    (0..PAGES).find(|page| u64::from(part(*page).0) == at)
}

impl GsPages {
    /// Behind `it`, before which [`VALUE`] held `value`.
    pub(super) fn follow(&mut self, it: &Instruction, value: &Known) {
        let compares = it.code() == Code::Cmp_r64_rm64 && it.op0_register() == VALUE;
        let is_base = compares && *value == Known::GsBase;
        self.compared = page_of(it, fields::gs_page_base).filter(|_| is_base);
        self.found = None;
    }

    /// A jump: the way on is taken if it does not happen.
    pub(super) fn jump(&mut self, it: &Instruction) {
        self.found = self.compared.take().filter(|_| it.mnemonic() == M::Jne);
    }

    /// The code may be come to here from elsewhere.
    pub(super) fn road(&mut self) {
        *self = Self::default();
    }

    /// What `it` loads, if that is where the page that was found is.
    pub(super) fn result(&self, it: &Instruction) -> Option<Known> {
        let page = page_of(it, fields::gs_page_addend)?;
        let loads = it.code() == Code::Mov_r64_rm64 && it.op0_register() == ADDRESS;
        let first = (page as i64).checked_shl(PAGE_SHIFT)?;
        let last = first | PAGE_OFFSET as i64;
        (loads && self.found == Some(page)).then_some(Known::Pointer(Pointer {
            first,
            last,
            stores: true,
        }))
    }
}
