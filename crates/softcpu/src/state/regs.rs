//! General-purpose registers by number, and parts of them.

use super::{GPR_SLOTS, VcpuState};

/// General-purpose register numbers, as encoded in instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the registers' own names")]
pub enum Gpr {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// What they are called, by number.
    pub const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
}

impl VcpuState {
    /// All 64 bits of `reg`.
    #[inline]
    #[must_use]
    pub fn reg(&self, reg: Gpr) -> u64 {
        self.gpr_slot(reg as u8)
    }

    /// Replaces all 64 bits of `reg`.
    #[inline]
    pub fn set_reg(&mut self, reg: Gpr, value: u64) {
        *self.gpr_slot_mut(reg as u8) = value;
    }

    /// Replaces the low 32 bits and clears the rest, as every 32-bit write does.
    #[inline]
    pub fn set_reg32(&mut self, reg: Gpr, value: u32) {
        *self.gpr_slot_mut(reg as u8) = u64::from(value);
    }

    /// The slot `index`, which comes from a decoded instruction and is masked to
    /// the array, so that no index can be out of bounds.
    #[inline(always)]
    #[must_use]
    #[expect(
        clippy::indexing_slicing,
        reason = "masked to the array's length, which is a power of two"
    )]
    pub fn gpr_slot(&self, index: u8) -> u64 {
        self.gpr[usize::from(index) & (GPR_SLOTS - 1)]
    }

    /// The slot `index`, to be changed; masked likewise.
    #[inline(always)]
    #[expect(
        clippy::indexing_slicing,
        reason = "masked to the array's length, which is a power of two"
    )]
    pub fn gpr_slot_mut(&mut self, index: u8) -> &mut u64 {
        &mut self.gpr[usize::from(index) & (GPR_SLOTS - 1)]
    }
}
