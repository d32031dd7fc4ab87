//! Memory accesses: the check against the data TLB, in line.
//!
//! A hit costs ten instructions and leaves the host address in [`ADDRESS`]; anything else
//! (a miss, a page crossing, a device, a page with code on it, a fault) goes to the
//! interpreter, which runs that one instruction and knows all of it. Flags are lost: the
//! caller keeps them first.

use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::fields::{self, TLB_ADDEND, TLB_READ, TLB_WRITE};
use super::registers::{ADDRESS, VALUE};
use crate::addr::PAGE_SHIFT;
use crate::decode::op::Op;

/// An access to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    /// Bytes, 1 to 64.
    pub(super) len: u8,
    /// It stores, or may.
    pub(super) stores: bool,
    /// The alignment it must have in bytes, less one.
    pub(super) align_mask: u8,
}

impl Access {
    pub(super) const LOAD_WORD: Self = Self { len: 8, stores: false, align_mask: 0 };
    pub(super) const STORE_WORD: Self = Self { len: 8, stores: true, align_mask: 0 };
}

/// Bits of an address that choose the entry, shifted to its distance in the table.
const SHIFT: u8 = PAGE_SHIFT as u8 - 5;
const MASK: u32 = 0x3ff << 5;

impl Assembler {
    /// Leaves the host address of `op`'s memory operand in [`ADDRESS`], or goes to `slow`.
    /// Uses [`VALUE`] too.
    ///
    /// # Errors
    /// As [`Assembler::effective`].
    pub(super) fn check(&mut self, op: &Op, access: Access, slow: Label) -> Result<(), NotCopied> {
        self.linear(VALUE, op, 0)?;
        if access.align_mask != 0 {
            // test al, mask
            self.bytes(&[0xa8, access.align_mask]);
            self.jump_if(Condition::NOT_EQUAL, slow);
        }
        // shr eax, 7; and eax, 0x7fe0
        self.bytes(&[0xc1, 0xe8, SHIFT, 0x25]);
        self.bytes(&MASK.to_le_bytes());
        self.add(VALUE, fields::TLB);
        // The page of the last byte: an access that crosses into the next misses.
        self.linear(ADDRESS, op, u64::from(access.len.saturating_sub(1)))?;
        // and r13, -4096
        self.bytes(&[0x49, 0x81, 0xe5, 0x00, 0xf0, 0xff, 0xff]);
        self.or(ADDRESS, fields::SPACE);
        // cmp r13, [rax + tag]
        let tag = if access.stores { TLB_WRITE } else { TLB_READ };
        self.bytes(&[0x4c, 0x3b, 0x68, tag]);
        self.jump_if(Condition::NOT_EQUAL, slow);
        self.linear(ADDRESS, op, 0)?;
        // add r13, [rax + addend]
        self.bytes(&[0x4c, 0x03, 0x68, TLB_ADDEND]);
        Ok(())
    }
}
