//! Memory accesses: the check against the data TLB, in line.
//!
//! A hit costs ten instructions or so and leaves in [`ADDRESS`] what makes a guest address a
//! host address; anything else (a miss, a page crossing, a device, a page with code on it, a
//! fault) goes to the interpreter, which runs that one instruction and knows all of it.
//! Flags are lost: the caller keeps them first.

use iced_x86::{Instruction, MemoryOperand, Register as R};

use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::fields::{self, TLB_ADDEND, TLB_STORES, TLB_TAG};
use super::mode::is_segmented;
use super::registers::{ADDRESS, Home, Homes, VALUE};
use super::relocate::Kind;
use super::sharing::{Group, Origin};
use crate::addr::{PAGE_OFFSET, PAGE_SHIFT, room_in_page};
use crate::decode::op::{Op, OpFlags};
use crate::state::{GPR_ZERO, SEG_FLAT};

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
    /// A load of `len` bytes, wherever they are.
    pub(super) const fn load(len: u8) -> Self {
        Self { len, stores: false, align_mask: 0 }
    }

    /// A store of `len` bytes, wherever they are.
    pub(super) const fn store(len: u8) -> Self {
        Self { len, stores: true, align_mask: 0 }
    }
}

/// Where in host memory a checked operand is: at [`ADDRESS`] plus these. Holds until one of
/// the registers changes, of which one may be [`VALUE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    index: R,
    factor: u32,
    displacement: i64,
}

impl Place {
    /// At [`ADDRESS`] itself.
    const HERE: Self = Self { index: R::None, factor: 1, displacement: 0 };

    /// So far from it.
    pub(super) fn at(displacement: i64) -> Self {
        Self { index: R::None, factor: 1, displacement }
    }

    /// So far from it and so many times a register.
    pub(super) fn from(index: R, factor: u32, displacement: i64) -> Self {
        Self { index, factor, displacement }
    }

    /// The memory operand of an instruction that works on it.
    pub(super) fn operand(self) -> MemoryOperand {
        let size = u32::from(self.displacement != 0);
        MemoryOperand::with_base_index_scale_displ_size(
            ADDRESS,
            self.index,
            self.factor,
            self.displacement,
            size,
        )
    }

    /// Makes it the memory operand of `instruction`.
    pub(super) fn give_to(self, instruction: &mut Instruction) {
        instruction.set_memory_base(ADDRESS);
        instruction.set_memory_index(self.index);
        instruction.set_memory_index_scale(self.factor);
        instruction.set_memory_displacement64(self.displacement as u64);
        instruction.set_memory_displ_size(1);
    }
}

/// Bits of an address that choose the entry, shifted to its distance in the table.
const SHIFT: u8 = PAGE_SHIFT as u8 - 4;
const MASK: u32 = 0x1fff << 4;

/// Where in its table the entry for `address` is.
pub(super) fn tlb_entry(address: u64) -> u32 {
    (address >> SHIFT) as u32 & MASK
}

impl Assembler {
    /// Brings `place` into [`ADDRESS`] if it needs [`VALUE`] otherwise. Says where it is then.
    ///
    /// # Errors
    /// None, unless the assembler is wrong.
    pub(super) fn without_value(&mut self, place: Place) -> Result<Place, NotCopied> {
        if place.index != VALUE {
            return Ok(place);
        }
        self.lea(ADDRESS, ADDRESS, VALUE, place.factor, 0)?;
        Ok(Place::at(place.displacement))
    }

    /// Checks that `op`'s memory operand may be accessed in place, or goes to `slow`. Says
    /// where it is then. Uses [`VALUE`] and [`ADDRESS`].
    ///
    /// # Errors
    /// As [`Assembler::effective`], and for constant addresses that must be looked at.
    pub(super) fn check(
        &mut self,
        op: &Op,
        access: Access,
        slow: Label,
    ) -> Result<Place, NotCopied> {
        let table = if access.stores { TLB_STORES } else { 0 };
        if op.base == GPR_ZERO && op.index == GPR_ZERO && op.seg == SEG_FLAT {
            return self.check_constant(op, access, table, slow);
        }
        if is_segmented(op) {
            self.within_segment(op, access.len, slow)?;
        }
        self.linear(VALUE, op, 0)?;
        if access.align_mask != 0 {
            self.misaligned(access.align_mask, slow);
        }
        self.entry_of_value();
        // The page of the last byte: an access that crosses into the next misses.
        self.linear(ADDRESS, op, u64::from(access.len.saturating_sub(1)))?;
        self.page_of_address();
        self.compare_tag(table, slow);
        if let Some(place) = by_register(self.homes, op) {
            self.with_entry(MOV, table.wrapping_add(TLB_ADDEND));
            return Ok(place);
        }
        self.linear(ADDRESS, op, 0)?;
        self.with_entry(ADD, table.wrapping_add(TLB_ADDEND));
        Ok(Place::HERE)
    }

    /// Checks all that `group` may access at once, or goes to `slow`. Where its zero is in
    /// host memory is in [`ADDRESS`] then, and kept. Uses [`VALUE`].
    ///
    /// # Errors
    /// As [`Assembler::effective`].
    pub(super) fn check_group(&mut self, group: &Group, slow: Label) -> Result<(), NotCopied> {
        self.aligned(group, slow)?;
        if group.mirrored {
            let (look, found) = (self.label(), self.label());
            self.in_mirror(group, look)?;
            self.jump(found);
            self.bind(look);
            self.find_group(group, slow)?;
            self.bind(found);
        } else {
            self.find_group(group, slow)?;
        }
        self.point(group)
    }

    /// Goes to `slow` if what must be aligned of `group` is not. Uses [`VALUE`].
    ///
    /// # Errors
    /// As [`Assembler::effective`].
    pub(super) fn aligned(&mut self, group: &Group, slow: Label) -> Result<(), NotCopied> {
        if let Some((at, mask)) = group.aligned {
            self.sum(VALUE, group.origin, at)?;
            self.misaligned(mask, slow);
        }
        Ok(())
    }

    /// Leaves in [`ADDRESS`] what makes host addresses of all addresses in `group`, or goes to
    /// `slow`, as what is wide does always. Uses [`VALUE`].
    ///
    /// # Errors
    /// As [`Assembler::effective`].
    pub(super) fn find_group(&mut self, group: &Group, slow: Label) -> Result<(), NotCopied> {
        if group.is_wide() {
            self.jump(slow);
            return Ok(());
        }
        let table = if group.stores { TLB_STORES } else { 0 };
        self.sum(VALUE, group.origin, group.first)?;
        self.entry_of_value();
        self.sum(ADDRESS, group.origin, group.last)?;
        self.page_of_address();
        self.compare_tag(table, slow);
        self.with_entry(MOV, table.wrapping_add(TLB_ADDEND));
        Ok(())
    }

    /// The host address of the zero of `group` in [`ADDRESS`], from what makes one of any
    /// address in it; kept for those that share it. Where the mirror has it and one register
    /// makes its addresses, that itself is kept. May use [`VALUE`].
    ///
    /// # Errors
    /// As [`Assembler::effective`].
    pub(super) fn point(&mut self, group: &Group) -> Result<(), NotCopied> {
        if group.mirrored && self.point_by_register(group)? {
            return Ok(());
        }
        match self.homes.of(group.origin.base & 15) {
            Home::Host(base) if group.origin == Origin::register(group.origin.base) => {
                self.lea(ADDRESS, ADDRESS, base, 1, group.zero)?;
            }
            _ => {
                // Addresses of 32 bits wrap, but not within a group.
                let from = if group.origin.narrow { group.first } else { group.zero };
                self.sum(VALUE, group.origin, from)?;
                self.lea(ADDRESS, ADDRESS, VALUE, 1, group.zero.wrapping_sub(from))?;
            }
        }
        if group.is_shared() {
            self.store(fields::shared(group.place), ADDRESS);
        }
        Ok(())
    }

    /// Goes to `slow` if the address in [`VALUE`] has bits of `mask`.
    fn misaligned(&mut self, mask: u8, slow: Label) {
        // test al, mask
        self.bytes(&[0xa8, mask]);
        self.jump_if(Condition::NOT_EQUAL, slow);
    }

    /// The TLB's entry for the address in [`VALUE`].
    pub(super) fn entry_of_value(&mut self) {
        // shr eax, 8; and eax, 0x1fff0
        self.bytes(&[0xc1, 0xe8, SHIFT, 0x25]);
        self.bytes(&MASK.to_le_bytes());
        self.add(VALUE, fields::TLB);
    }

    /// The page of the address in [`ADDRESS`].
    pub(super) fn page_of_address(&mut self) {
        // and r13, -4096
        self.bytes(&[0x49, 0x81, 0xe5, 0x00, 0xf0, 0xff, 0xff]);
    }

    /// The same as [`Assembler::check`] for an address that is known now.
    fn check_constant(
        &mut self,
        op: &Op,
        access: Access,
        table: u32,
        slow: Label,
    ) -> Result<Place, NotCopied> {
        let address = op.disp & op.addr_mask;
        let unaligned = address & u64::from(access.align_mask) != 0;
        if unaligned || room_in_page(address) < u64::from(access.len) {
            return Err(NotCopied);
        }
        let at = table.wrapping_add(tlb_entry(address));
        let moves = op.flags.contains(OpFlags::DISP_MOVES);
        self.load(VALUE, fields::TLB);
        if moves {
            self.guest_address(ADDRESS, address & !PAGE_OFFSET);
        } else {
            self.constant(ADDRESS, address & !PAGE_OFFSET);
        }
        self.or(ADDRESS, fields::SPACE);
        self.with_known_entry(CMP, at.wrapping_add(TLB_TAG), moves);
        self.jump_if(Condition::NOT_EQUAL, slow);
        self.with_known_entry(MOV, at.wrapping_add(TLB_ADDEND), moves);
        if i32::try_from(address as i64).is_ok() {
            if moves {
                self.stays();
            }
            return Ok(Place::at(address as i64));
        }
        if moves {
            self.guest_address(VALUE, address);
        } else {
            self.constant(VALUE, address);
        }
        // add r13, rax
        self.bytes(&[0x49, 0x01, 0xc5]);
        Ok(Place::HERE)
    }

    /// Compares the page in [`ADDRESS`] with the tag of the entry that lies `at` bytes behind
    /// what [`VALUE`] points to.
    pub(super) fn compare_tag(&mut self, at: u32, slow: Label) {
        self.or(ADDRESS, fields::SPACE);
        self.with_entry(CMP, at.wrapping_add(TLB_TAG));
        self.jump_if(Condition::NOT_EQUAL, slow);
    }

    /// `opcode r13, [rax + at]`
    pub(super) fn with_entry(&mut self, opcode: u8, at: u32) {
        match u8::try_from(at) {
            Ok(at @ 0..=0x7f) => self.bytes(&[0x4c, opcode, 0x68, at]),
            _ => {
                self.bytes(&[0x4c, opcode, 0xa8]);
                self.bytes(&at.to_le_bytes());
            }
        }
    }

    /// The same, for an entry that is another one elsewhere if the address `moves`.
    fn with_known_entry(&mut self, opcode: u8, at: u32, moves: bool) {
        if moves {
            // The short form has no room for the others.
            self.bytes(&[0x4c, opcode, 0xa8]);
            self.bytes(&at.to_le_bytes());
            self.depends(Kind::TlbEntry);
        } else {
            self.with_entry(opcode, at);
        }
    }

    /// `mov [place], register`, of 64, 32 or 16 bits.
    ///
    /// # Errors
    /// As [`Assembler::with_memory_operand`].
    pub(super) fn store_at(&mut self, place: Place, register: R) -> Result<(), NotCopied> {
        self.with_memory_operand(
            0x89,
            register,
            ADDRESS,
            place.index,
            place.factor,
            place.displacement,
        )
    }

    /// `mov register, [place]`, of 64, 32 or 16 bits.
    ///
    /// # Errors
    /// As [`Assembler::with_memory_operand`].
    pub(super) fn load_at(&mut self, register: R, place: Place) -> Result<(), NotCopied> {
        self.with_memory_operand(
            0x8b,
            register,
            ADDRESS,
            place.index,
            place.factor,
            place.displacement,
        )
    }
}

pub(super) const ADD: u8 = 0x03;
const CMP: u8 = 0x3b;
pub(super) const MOV: u8 = 0x8b;

/// Where `op`'s operand is once [`ADDRESS`] has what is added to guest addresses, if the
/// operand is one register and a distance.
fn by_register(homes: Homes, op: &Op) -> Option<Place> {
    let plain = op.index == GPR_ZERO && op.seg == SEG_FLAT && op.addr_mask == u64::MAX;
    match homes.of(op.base) {
        Home::Host(index) if plain => Some(Place::from(index, 1, op.disp as i64)),
        _ => None,
    }
}
