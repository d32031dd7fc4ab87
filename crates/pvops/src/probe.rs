//! The run-time test of a promise: fill every register, call, and look what is left.
//!
//! A promise ([`CalleeSave::promise`](crate::CalleeSave::promise)) is the author's word.
//! [`keeps_promise`] holds him to it, for one run with one set of arguments; kernels call
//! it at start for every assembler callee that is safe to call then.

use core::arch::naked_asm;
use core::fmt;
use core::mem::offset_of;

use crate::convention::{Gpr, NATIVE, RegSet};

/// Number of vector registers in a [`Frame`].
const VECTORS: usize = 16;

/// Registers around one call.
#[derive(Clone, Debug)]
#[repr(C, align(16))]
pub struct Frame {
    before: [u64; 16],
    after: [u64; 16],
    vectors_before: [[u64; 2]; VECTORS],
    vectors_after: [[u64; 2]; VECTORS],
    target: *const (),
    flags: u64,
}

/// What a call left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Findings {
    /// General registers that changed.
    pub changed: RegSet,
    /// The low halves of vector registers that changed: bit n is register n. Always 0 in
    /// code without vector registers.
    pub vectors: u16,
    /// The return register.
    pub result: u64,
    /// RFLAGS.
    pub flags: u64,
}

/// A callee that changes registers it promised to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenPromise {
    /// Where the callee is.
    pub address: u64,
    /// What it changed beyond the return register.
    pub changed: RegSet,
    /// Whether it came back with the direction flag set.
    pub direction: bool,
}

impl fmt::Display for BrokenPromise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the callee at {:#x} promised to keep what it changes: ", self.address)?;
        if self.direction {
            write!(f, "the direction flag ")?;
        }
        write!(f, "{:?}", self.changed)
    }
}

impl core::error::Error for BrokenPromise {}

/// The pattern a register is filled with: different for each, and no plausible result.
#[must_use]
pub const fn pattern(register: Gpr) -> u64 {
    0xa5c3_0f1e_9687_b400 ^ (0x0101_0101_0101_0101 * (register as u64 + 1))
}

/// Calls `target` with `args` in the argument registers and patterns in all others.
///
/// # Safety
/// `target` must be code that may be called with these arguments, leaves the stack
/// pointer alone and returns. It need not keep any register.
///
/// # Panics
/// With more arguments than there are argument registers.
#[must_use]
pub unsafe fn observe(target: *const (), args: &[usize]) -> Findings {
    assert!(args.len() <= NATIVE.args.len(), "arguments go in registers");
    let mut frame = Frame {
        before: Gpr::ALL.map(pattern),
        after: [0; 16],
        vectors_before: core::array::from_fn(|i| [!(i as u64), 0x5a5a_0000 + i as u64]),
        vectors_after: [[0; 2]; VECTORS],
        target,
        flags: 0,
    };
    for (register, value) in NATIVE.args.iter().zip(args) {
        frame.before[*register as usize] = *value as u64;
    }
    // SAFETY: the caller's promise about `target`; `run` itself keeps what a function must.
    unsafe { run(&raw mut frame) };
    let changed = |r: &Gpr| frame.before[*r as usize] != frame.after[*r as usize];
    let mut found = Findings { changed: RegSet::EMPTY, vectors: 0, result: 0, flags: frame.flags };
    for register in Gpr::ALL.iter().filter(|r| **r != Gpr::Rsp && changed(r)) {
        found.changed = found.changed.union(RegSet::of(&[*register]));
    }
    if cfg!(target_feature = "sse") {
        for i in 0..VECTORS {
            found.vectors |= u16::from(frame.vectors_before[i] != frame.vectors_after[i]) << i;
        }
    }
    found.result = frame.after[Gpr::Rax as usize];
    found
}

/// Whether a callee-save function at `target` keeps its promise when called with `args`.
///
/// # Errors
/// [`BrokenPromise`] with the registers it changed.
///
/// # Safety
/// As [`observe`].
pub unsafe fn keeps_promise(target: *const (), args: &[usize]) -> Result<(), BrokenPromise> {
    // SAFETY: passed on.
    let found = unsafe { observe(target, args) };
    let changed = found.changed.minus(NATIVE.clobbers(crate::CallKind::CalleeSave));
    let direction = found.flags & DIRECTION != 0;
    if changed.is_empty() && !direction {
        return Ok(());
    }
    Err(BrokenPromise { address: target.addr() as u64, changed, direction })
}

/// RFLAGS.DF
const DIRECTION: u64 = 1 << 10;

/// Loads `frame.before`, calls `frame.target`, stores what is left.
#[cfg(target_feature = "sse")]
#[unsafe(naked)]
unsafe extern "sysv64" fn run(frame: *mut Frame) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        // With the return address seven words; these two and one of padding keep the
        // stack aligned.
        "push rdi",
        "push qword ptr [rdi + {target}]",
        "sub rsp, 8",
        "movups xmm0, [rdi + {vb} + 0]", "movups xmm1, [rdi + {vb} + 16]",
        "movups xmm2, [rdi + {vb} + 32]", "movups xmm3, [rdi + {vb} + 48]",
        "movups xmm4, [rdi + {vb} + 64]", "movups xmm5, [rdi + {vb} + 80]",
        "movups xmm6, [rdi + {vb} + 96]", "movups xmm7, [rdi + {vb} + 112]",
        "movups xmm8, [rdi + {vb} + 128]", "movups xmm9, [rdi + {vb} + 144]",
        "movups xmm10, [rdi + {vb} + 160]", "movups xmm11, [rdi + {vb} + 176]",
        "movups xmm12, [rdi + {vb} + 192]", "movups xmm13, [rdi + {vb} + 208]",
        "movups xmm14, [rdi + {vb} + 224]", "movups xmm15, [rdi + {vb} + 240]",
        "call {general}",
        "movups [rdi + {va} + 0], xmm0", "movups [rdi + {va} + 16], xmm1",
        "movups [rdi + {va} + 32], xmm2", "movups [rdi + {va} + 48], xmm3",
        "movups [rdi + {va} + 64], xmm4", "movups [rdi + {va} + 80], xmm5",
        "movups [rdi + {va} + 96], xmm6", "movups [rdi + {va} + 112], xmm7",
        "movups [rdi + {va} + 128], xmm8", "movups [rdi + {va} + 144], xmm9",
        "movups [rdi + {va} + 160], xmm10", "movups [rdi + {va} + 176], xmm11",
        "movups [rdi + {va} + 192], xmm12", "movups [rdi + {va} + 208], xmm13",
        "movups [rdi + {va} + 224], xmm14", "movups [rdi + {va} + 240], xmm15",
        "add rsp, 24",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        general = sym general,
        vb = const offset_of!(Frame, vectors_before),
        va = const offset_of!(Frame, vectors_after),
        target = const offset_of!(Frame, target),
    )
}

/// As above, in code without vector registers.
#[cfg(not(target_feature = "sse"))]
#[unsafe(naked)]
unsafe extern "sysv64" fn run(frame: *mut Frame) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "push rdi",
        "push qword ptr [rdi + {target}]",
        "sub rsp, 8",
        "call {general}",
        "add rsp, 24",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        general = sym general,
        target = const offset_of!(Frame, target),
    )
}

/// The general registers' part of [`run`]. Entered with the frame in RDI and, above the
/// return address and a word of padding, the target and the frame. Leaves the frame in
/// RDI and nothing else.
#[unsafe(naked)]
unsafe extern "sysv64" fn general(frame: *mut Frame) {
    naked_asm!(
        "sub rsp, 8",
        "mov rax, [rdi + 0]", "mov rcx, [rdi + 8]", "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]", "mov rbp, [rdi + 40]", "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]", "mov r9, [rdi + 72]", "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]", "mov r12, [rdi + 96]", "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]", "mov r15, [rdi + 120]", "mov rdi, [rdi + 56]",
        // Below: padding, return address, padding, target, frame.
        "call qword ptr [rsp + 24]",
        "xchg rdi, [rsp + 32]",
        "mov [rdi + {after} + 0], rax", "mov [rdi + {after} + 8], rcx",
        "mov [rdi + {after} + 16], rdx", "mov [rdi + {after} + 24], rbx",
        "mov [rdi + {after} + 40], rbp", "mov [rdi + {after} + 48], rsi",
        "mov [rdi + {after} + 64], r8", "mov [rdi + {after} + 72], r9",
        "mov [rdi + {after} + 80], r10", "mov [rdi + {after} + 88], r11",
        "mov [rdi + {after} + 96], r12", "mov [rdi + {after} + 104], r13",
        "mov [rdi + {after} + 112], r14", "mov [rdi + {after} + 120], r15",
        "mov rax, [rsp + 32]",
        "mov [rdi + {after} + 56], rax",
        "pushfq",
        "pop rax",
        "mov [rdi + {flags}], rax",
        // The rest of the program relies on a clear direction flag.
        "cld",
        "add rsp, 8",
        "ret",
        after = const offset_of!(Frame, after),
        flags = const offset_of!(Frame, flags),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pointer::{nothing, same};

    #[unsafe(naked)]
    extern "sysv64" fn trashes_r9_and_xmm3() {
        naked_asm!("xor r9d, r9d", "pxor xmm3, xmm3", "ret")
    }

    #[unsafe(naked)]
    extern "sysv64" fn trashes_rbx() {
        naked_asm!("mov rbx, rax", "ret")
    }

    #[unsafe(naked)]
    extern "sysv64" fn sets_direction() {
        naked_asm!("std", "ret")
    }

    #[test]
    fn finds_exactly_what_changed() {
        // SAFETY: naked functions that return.
        let (kept, broken) = unsafe {
            (observe(nothing as *const (), &[]), observe(trashes_r9_and_xmm3 as *const (), &[]))
        };
        assert_eq!((kept.changed, kept.vectors), (RegSet::EMPTY, 0));
        assert_eq!((broken.changed, broken.vectors), (RegSet::of(&[Gpr::R9]), 1 << 3));
    }

    #[test]
    fn a_broken_promise_is_caught() {
        // SAFETY: naked functions that return.
        unsafe {
            keeps_promise(same as *const (), &[7]).expect("an identity keeps everything");
            let broken = keeps_promise(trashes_rbx as *const (), &[]).unwrap_err();
            assert_eq!(broken.changed, RegSet::of(&[Gpr::Rbx]));
            assert!(keeps_promise(sets_direction as *const (), &[]).unwrap_err().direction);
            assert_eq!(observe(same as *const (), &[7]).result, 7);
        }
    }
}
