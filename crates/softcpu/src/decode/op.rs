//! One decoded instruction, ready to run.
//!
//! Decoding happens once; an [`Op`] holds everything the handler needs in one cache
//! line, so that running it is one indirect call and no look-up.

use crate::memory::access::Scalar;
use crate::state::{GPR_SLOTS, VcpuState};
use crate::vcpu::{Step, Vcpu};

/// The function that executes an [`Op`].
///
/// It either completes the instruction and returns `Ok` (the next op of the block
/// follows; only ops that end a block touch RIP), or leaves the architectural state
/// as if the instruction had not begun (or at a restartable point, for `rep`) and
/// returns the [`Abort`](crate::vcpu::Abort).
pub type Handler = fn(&mut Vcpu, &Op) -> Step;

/// Set in a register operand that names AH, CH, DH or BH (slots 0 to 3).
pub const HIGH_BYTE: u8 = 0x80;

bitflags::bitflags! {
    /// What an [`Op`]'s handler may need to know besides its operands.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct OpFlags: u16 {
        /// Code outside 64-bit mode: the memory operand's segment is checked and
        /// linear addresses wrap at 4 GiB.
        const LEGACY = 1 << 0;
        /// `lock` prefix.
        const LOCK = 1 << 1;
        /// `rep`/`repe` prefix.
        const REP = 1 << 2;
        /// `repne` prefix.
        const REPNE = 1 << 3;
        /// The instruction uses the stack, by itself or through SS: non-canonical
        /// addresses raise #SS and not #GP.
        const STACK = 1 << 4;
        /// 64-bit code.
        const LONG = 1 << 5;
        /// The r/m operand is memory.
        const MEM = 1 << 6;
        /// `disp` is where the instruction is and a distance: RIP-relative.
        const DISP_MOVES = 1 << 7;
        /// `imm` is an address in the code.
        const IMM_MOVES = 1 << 8;
        /// It names a stub that is the vCPU's own ([`crate::native`]).
        const OWN_STUB = 1 << 9;
    }
}

/// A decoded instruction. Sixty-four bytes, one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Op {
    /// Executes it.
    pub run: Handler,
    /// Its own address (offset in CS, as RIP holds it).
    pub rip: u64,
    /// Immediate, sign-extended; or branch target; or what the handler's family says.
    pub imm: u64,
    /// Displacement, sign-extended; absolute for RIP-relative operands.
    pub disp: u64,
    /// Mask of the effective address: 16, 32 or 64 bits.
    pub addr_mask: u64,
    /// Base register slot of the memory operand ([`GPR_ZERO`](crate::state::GPR_ZERO) if none).
    pub base: u8,
    /// Index register slot, likewise.
    pub index: u8,
    /// log2 of the index's factor.
    pub scale: u8,
    /// Segment slot of the memory operand; in 64-bit code all but FS and GS are
    /// [`SEG_FLAT`](crate::state::SEG_FLAT).
    pub seg: u8,
    /// First register operand: slot, perhaps with [`HIGH_BYTE`].
    pub dst: u8,
    /// Second register operand, likewise.
    pub src: u8,
    /// Third register operand, or what the handler's family says.
    pub aux: u8,
    /// Length in bytes, 1 to 15; 0 for the synthetic op that ends a block.
    pub len: u8,
    /// iced-x86's `Code`, for handlers that serve several instructions and for traces.
    pub code: u16,
    /// See [`OpFlags`].
    pub flags: OpFlags,
    /// Operand size in bytes where the handler serves several; 0 where it is moot.
    pub size: u8,
}

impl Op {
    /// One that nobody runs, at `rip`.
    #[cfg(test)]
    pub(crate) fn idle(rip: u64) -> Self {
        use crate::state::{GPR_ZERO, SEG_FLAT};
        Self {
            run: crate::interp::transfer::undefined,
            rip,
            imm: 0,
            disp: 0,
            addr_mask: u64::MAX,
            base: GPR_ZERO,
            index: GPR_ZERO,
            scale: 0,
            seg: SEG_FLAT,
            dst: 0,
            src: 0,
            aux: 0,
            len: 1,
            code: 0,
            flags: OpFlags::LONG,
            size: 0,
        }
    }

    /// The address of the instruction that follows, wrapped to the code size.
    #[inline]
    #[must_use]
    pub fn next_rip(&self) -> u64 {
        let next = self.rip.wrapping_add(u64::from(self.len));
        if self.flags.contains(OpFlags::LEGACY) { next & 0xffff_ffff } else { next }
    }

    /// Whether it means something to this vCPU only, and only until its block is forgotten.
    pub(crate) const fn names_own_stub(&self) -> bool {
        self.flags.contains(OpFlags::OWN_STUB)
    }

    /// The same instruction, `distance` further on.
    #[must_use]
    pub fn moved(mut self, distance: u64) -> Self {
        self.rip = self.rip.wrapping_add(distance);
        if self.flags.contains(OpFlags::DISP_MOVES) {
            self.disp = self.disp.wrapping_add(distance);
        }
        if self.flags.contains(OpFlags::IMM_MOVES) {
            self.imm = self.imm.wrapping_add(distance);
        }
        self
    }

    /// The effective address: the offset within the segment.
    #[inline(always)]
    #[must_use]
    pub fn effective(&self, state: &VcpuState) -> u64 {
        let base = state.gpr_slot(self.base);
        let index = state.gpr_slot(self.index) << (self.scale & 3);
        base.wrapping_add(index).wrapping_add(self.disp) & self.addr_mask
    }
}

/// Reads register operand `which` (slot, perhaps with [`HIGH_BYTE`]).
#[inline(always)]
#[must_use]
#[expect(
    clippy::indexing_slicing,
    reason = "masked to the array's length, which is a power of two"
)]
pub fn read_reg<T: Scalar>(state: &VcpuState, which: u8) -> T {
    let whole = state.gpr[usize::from(which) & (GPR_SLOTS - 1)];
    if T::SIZE == 1 && which & HIGH_BYTE != 0 {
        T::truncate(whole >> 8)
    } else {
        T::truncate(whole)
    }
}

/// Writes register operand `which`: 32-bit writes clear the upper half, 8- and 16-bit
/// writes keep the rest (SDM vol. 1, 3.4.1.1).
#[inline(always)]
#[expect(
    clippy::indexing_slicing,
    reason = "masked to the array's length, which is a power of two"
)]
pub fn write_reg<T: Scalar>(state: &mut VcpuState, which: u8, value: T) {
    let slot = &mut state.gpr[usize::from(which) & (GPR_SLOTS - 1)];
    *slot = match T::SIZE {
        8 | 4 => value.zero_extend(),
        1 if which & HIGH_BYTE != 0 => *slot & !0xff00 | value.zero_extend() << 8,
        _ => *slot & !T::MASK | value.zero_extend(),
    };
}

const _: () = assert!(size_of::<Op>() == 64);
