//! What the user is told when a thread breaks the rules: one line, and exit status 159.
//!
//! The kernel does not make the call; it sends SIGSYS to the thread that tried. The handler
//! puts the terminal back, writes one line and ends the process. It is under the filter
//! itself, allocates nothing, and reads nothing but its own arguments, so whoever has taken over
//! the thread can do no more in it than before. A thread that has blocked SIGSYS gets
//! the signal all the same, and then it kills the process.

use crate::status::Status;
use crate::terminal;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::io::{self, Write};
use syscalls::Sysno;

/// `SYS_SECCOMP` (asm-generic/siginfo.h): the signal is the filter's.
const FROM_THE_FILTER: c_int = 1;

/// The longest line.
const LINE: usize = 320;

/// What SIGSYS comes with (`siginfo_t` of x86-64, with `_sigsys` of its union).
#[repr(C)]
struct Info {
    signal: c_int,
    error: c_int,
    code: c_int,
    address: *const c_void,
    call: c_int,
    architecture: c_uint,
}

/// Has violations reported.
///
/// # Errors
/// The host refuses the handler.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: an all-zero `sigaction` is a valid one; no signal is blocked meanwhile but SIGSYS.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and only does what a
    // handler may: ioctl, prctl, write and _exit, and no allocation.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn handle(_: c_int, info: *const Info, _: *const c_void) {
    terminal::restore();
    // SAFETY: the kernel hands over a `siginfo_t`, which is larger than what is read here.
    let Info { code, call, .. } = unsafe { info.read() };
    let mut line = [0_u8; LINE];
    let mut rest = &mut line[..];
    // A line that is too long ends early.
    let _ = if code == FROM_THE_FILTER {
        describe(&mut rest, call)
    } else {
        writeln!(rest, "lguest: ended by signal {}", libc::SIGSYS)
    };
    let left = rest.len();
    let text = &line[..LINE - left];
    // SAFETY: `text` is initialised memory of that length; `_exit` does not come back.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(Status::Signal(libc::SIGSYS as u8).code().into());
    }
}

fn describe(line: &mut &mut [u8], call: c_int) -> io::Result<()> {
    let name =
        usize::try_from(call).ok().and_then(Sysno::new).map_or("unknown", |call| call.name());
    let mut thread = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, the last of them a zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let thread = CStr::from_bytes_until_nul(&thread).ok().and_then(|name| name.to_str().ok());
    writeln!(
        line,
        "lguest: the system-call filter ends the run: thread {} wanted {name} ({call}). \
         Please report this, it is a bug or an attack; --seccomp log lets such calls pass, \
         for guests you trust",
        thread.unwrap_or("?"),
    )
}
