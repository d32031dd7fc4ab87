//! The system calls this needs, and nothing else.

use core::arch::asm;

use crate::error::TextError;

pub(super) const CLOSE: usize = 3;
pub(super) const MMAP: usize = 9;
pub(super) const MUNMAP: usize = 11;
pub(super) const RT_SIGACTION: usize = 13;
pub(super) const RT_SIGRETURN: usize = 15;
pub(super) const SCHED_YIELD: usize = 24;
pub(super) const NANOSLEEP: usize = 35;
pub(super) const GETPID: usize = 39;
pub(super) const FTRUNCATE: usize = 77;
pub(super) const OPEN: usize = 2;
pub(super) const GETTID: usize = 186;
pub(super) const FUTEX: usize = 202;
pub(super) const GETDENTS64: usize = 217;
pub(super) const TGKILL: usize = 234;
pub(super) const MEMFD_CREATE: usize = 319;
pub(super) const MEMBARRIER: usize = 324;

pub(super) const PROT_READ: usize = 1;
pub(super) const PROT_WRITE: usize = 2;
pub(super) const PROT_EXEC: usize = 4;
pub(super) const MAP_SHARED: usize = 1;
pub(super) const MAP_FIXED: usize = 0x10;
pub(super) const FUTEX_WAIT_PRIVATE: usize = 128;
pub(super) const FUTEX_WAKE_PRIVATE: usize = 129;
pub(super) const MEMBARRIER_PRIVATE_EXPEDITED_SYNC_CORE: usize = 1 << 5;
pub(super) const MEMBARRIER_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE: usize = 1 << 6;
pub(super) const ESRCH: i32 = 3;

/// One system call: the kernel's answer, or `errno`.
///
/// # Safety
/// As the call itself.
pub(super) unsafe fn call(number: usize, args: [usize; 6]) -> Result<usize, i32> {
    let result: isize;
    // SAFETY: Linux's convention: result in RAX, RCX and R11 lost; what else the call
    // does is the caller's business.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    usize::try_from(result).map_err(|_| result.unsigned_abs() as i32)
}

/// As [`call`], with the refusal as an error that names it.
///
/// # Safety
/// As the call itself.
pub(super) unsafe fn ask(
    name: &'static str,
    number: usize,
    args: [usize; 6],
) -> Result<usize, TextError> {
    // SAFETY: passed on.
    unsafe { call(number, args) }.map_err(|errno| TextError::Refused { call: name, errno })
}
