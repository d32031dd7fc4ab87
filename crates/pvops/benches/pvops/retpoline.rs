//! What an unpatched site costs where indirect branches are guarded: through a retpoline,
//! as kernels built against branch target injection have them, and to targets that begin
//! with the landing instruction of indirect branch tracking. (Whether tracking is on, a
//! program cannot choose: what it costs is the instruction.)

use super::styles::{ASM, Caller};
use core::arch::{asm, naked_asm};

/// Jumps to R11 without an indirect branch.
#[unsafe(naked)]
extern "sysv64" fn retpoline_r11() {
    naked_asm!("call 3f", "2:", "pause", "lfence", "jmp 2b", "3:", "mov [rsp], r11", "ret")
}

#[inline(never)]
extern "sysv64" fn through(p: &mut [u64; 16]) {
    let target = ASM.0.address();
    for _ in 0..p[15] {
        let flags: usize;
        // SAFETY: the callee changes RAX only; the detour R11 besides.
        unsafe {
            asm!(
                "call {retpoline}",
                retpoline = sym retpoline_r11,
                inout("r11") target => _,
                lateout("rax") flags,
            );
        }
        core::hint::black_box(flags);
    }
}

/// A callee without and with a landing instruction, else the same.
#[unsafe(naked)]
extern "sysv64" fn bare_target() {
    naked_asm!(".balign 16", "pushfq", "pop rax", "ret")
}

#[unsafe(naked)]
extern "sysv64" fn landing_target() {
    naked_asm!(".balign 16", "endbr64", "pushfq", "pop rax", "ret")
}

/// Calls through a pointer in memory, as sites do.
macro_rules! indirect {
    ($name:ident, $target:ident) => {
        #[inline(never)]
        extern "sysv64" fn $name(p: &mut [u64; 16]) {
            let slot = $target as *const ();
            for _ in 0..p[15] {
                let flags: usize;
                // SAFETY: the callee changes RAX only.
                unsafe { asm!("call [{}]", in(reg) &raw const slot, lateout("rax") flags) };
                core::hint::black_box(flags);
            }
        }
    };
}
indirect!(without_landing, bare_target);
indirect!(with_landing, landing_target);

#[inline(never)]
extern "sysv64" fn nops(p: &mut [u64; 16]) {
    for _ in 0..p[15] {
        // SAFETY: nothing, in six bytes: a site bound to a nop.
        unsafe { asm!(".byte 0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00") };
    }
}

#[inline(never)]
extern "sysv64" fn identity(p: &mut [u64; 16]) {
    for i in 0..p[15] {
        let same: u64;
        // SAFETY: a move of six bytes: a site bound to an identity.
        unsafe {
            asm!(".byte 0x2e, 0x2e, 0x2e", "mov rax, rdi", in("rdi") i, lateout("rax") same);
        }
        core::hint::black_box(same);
    }
}

/// Rows: the same loop as `bare`, with these in it.
pub(crate) const ROWS: [(&str, Caller); 5] = [
    ("unpatched, indirect branch through a retpoline", through),
    ("unpatched, to a target without a landing instruction", without_landing),
    ("unpatched, to a target with one (`endbr64`)", with_landing),
    ("patched nop", nops),
    ("patched identity", identity),
];
