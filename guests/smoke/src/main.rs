//! The guest's user-space smoke test.
//!
//! A kernel can boot on a CPU that gets a corner of user space wrong, so this program
//! goes and stands in the corners: it is statically linked, is started by `/init` in the
//! guest, runs every check in turn and says `smoke: PASS name` or `smoke: FAIL name`.
//! The last line, `smoke: all N passed`, is what the boot tests look for. It passes on any
//! x86-64 Linux, so it can be tried on the host as well.
//!
//! `smoke child STATUS` is the program's other life: the `exec` check runs it.

mod float;
mod memory;
mod process;
mod signal;
mod system;
mod threads;

use std::panic;
use std::process::ExitCode;

/// What a check says: nothing, or what it found wrong.
type Outcome = Result<(), String>;

/// A check and the name it is reported by.
type Check = (&'static str, fn() -> Outcome);

/// Fails the check with a formatted message unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if $condition {
        } else {
            return Err(format!($($message)+));
        }
    };
}
pub(crate) use ensure;

/// The checks by name, in the order they run: the cheap and basic ones first.
const CHECKS: &[Check] = &[
    ("syscalls", system::many_syscalls),
    ("x87", float::x87),
    ("sse", float::sse),
    ("avx-fma", float::avx_and_fma),
    ("mmap", memory::mapping),
    ("mprotect", memory::protection),
    ("self-modifying-code", memory::self_modifying_code),
    ("sigsegv", signal::segv_with_info),
    ("sigfpe", signal::divide_error),
    ("sigalrm", signal::alarm),
    ("sigaltstack", signal::alternate_stack),
    ("signal-float", signal::float_state_survives),
    ("mutex", threads::mutex),
    ("condvar", threads::condvar),
    ("atomics", threads::atomics),
    ("thread-float", threads::float_state_is_private),
    ("pipe", process::pipe),
    ("fork", process::fork_copies_memory),
    ("exec", process::exec_and_wait),
    ("proc", system::proc_files),
    ("monotonic", system::time_never_goes_back),
    ("sleep", system::sleep_takes_its_time),
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("child") {
        let status = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(99);
        return ExitCode::from(status);
    }

    let mut failed = 0;
    for (name, check) in CHECKS {
        let outcome = panic::catch_unwind(check).unwrap_or_else(|_| Err("panicked".into()));
        match outcome {
            Ok(()) => println!("smoke: PASS {name}"),
            Err(why) => {
                failed += 1;
                println!("smoke: FAIL {name}: {why}");
            }
        }
    }
    if failed == 0 {
        println!("smoke: all {} passed", CHECKS.len());
        ExitCode::SUCCESS
    } else {
        println!("smoke: {failed} of {} failed", CHECKS.len());
        ExitCode::FAILURE
    }
}
