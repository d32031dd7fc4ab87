//! What else of the vCPU translated code may change, for privileged instructions that it does
//! itself: each field in its own way only.

use iced_x86::{Code, Instruction};

use super::known::{Known, Sum};
use super::operands::first_field;
use crate::handle::Event;
use crate::mmu::gs_pages::NO_BASE;
use crate::state::segment::SegReg;
use crate::translate::fields::{self, Field};
use crate::translate::registers::{ADDRESS, VALUE};

/// Whether `it`, which stores to the field `at`, may, where [`VALUE`] is known to be `value`, and
/// [`ADDRESS`] `address`.
pub(super) fn may_change(it: &Instruction, at: u64, value: &Known, address: &Known) -> bool {
    let of = |Field(field): Field| u64::from(field) == at;
    let base = |segment: SegReg| of(fields::segment_base(segment as u8));
    let constant = it.try_immediate(1).ok();
    let interrupt = u64::from(Event::INTERRUPT.bits());
    match it.code() {
        // Flags are the guest's own, and none of them is the host's business.
        Code::And_rm64_imm32 | Code::Or_rm64_imm32 | Code::Xor_rm64_r64 => of(fields::RFLAGS),
        // Whether interrupts are looked up for; but never anything else that may wait.
        Code::And_rm32_imm32 => {
            of(fields::EVENT_MASK) && constant == Some(!interrupt as u32 as u64)
        }
        Code::Or_rm32_imm32 => of(fields::EVENT_MASK) && constant == Some(interrupt),
        Code::Mov_rm64_r64 if of(fields::TLB) => {
            it.op1_register() == VALUE && *value == Known::View
        }
        Code::Mov_rm64_r64 if of(fields::SPACE) => {
            let is = |field: Field| *value == Known::Address(Sum::field(field));
            it.op1_register() == VALUE && (is(fields::SPACE_PLAIN) || is(fields::SPACE_OVER))
        }
        // What GS is exchanged with is canonical, so it is no base that pages have which are not
        // kept; and none are kept for the other one.
        Code::Mov_rm64_r64 if of(fields::GS_BASE_KNOWN) => {
            let other = Known::Address(Sum::field(fields::KERNEL_GS_BASE));
            it.op1_register() == ADDRESS && *address == other
        }
        Code::Mov_rm64_imm32 => of(fields::GS_BASE_KNOWN) && constant == Some(NO_BASE),
        // The address of an op, which is read when the x87 unit is stored.
        Code::Mov_rm64_r64 if of(fields::X87_OP) => {
            let constant = matches!(value, Known::Address(sum) if sum.terms.is_empty());
            it.op1_register() == VALUE && constant
        }
        Code::Mov_rm64_r64 => base(SegReg::Fs) || base(SegReg::Gs) || of(fields::KERNEL_GS_BASE),
        _ => false,
    }
}

/// Whether `it` stores to where the current view is kept, its tables or its address space: what
/// was shown before is not shown of the other.
pub(super) fn changes_view(it: &Instruction) -> bool {
    let views = [fields::TLB, fields::SPACE].map(|Field(at)| u64::from(at));
    first_field(it).is_some_and(|at| views.contains(&at))
}
