//! Signals: each one either ends the run with the terminal put back, or is a request.
//!
//! A thread of its own takes them, so nothing here has to be careful about what a signal
//! handler may do; the exception is SIGABRT, which cannot wait for another thread.

use crate::terminal;
use rustix::process::{Signal, getpid, kill_process};
use signal_hook::consts::signal::{
    SIGABRT, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGWINCH,
};
use signal_hook::iterator::Signals;
use std::io;
use std::thread;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// End the run; the signal's number.
    End(u8),
    /// Show where each vCPU is (SIGUSR1).
    Show,
    /// The terminal's window has another size (SIGWINCH).
    Resize,
}

/// Starts the thread that takes signals and hands requests to `obey`.
///
/// # Errors
/// The host refused a handler or the thread.
pub(crate) fn watch(mut obey: impl FnMut(Request) + Send + 'static) -> io::Result<()> {
    let restore_and_die = || {
        terminal::restore();
        // Cannot fail: SIGABRT is a signal, and is not ignored by default.
        let _ = signal_hook::low_level::emulate_default_handler(SIGABRT);
    };
    // SAFETY: the handler only does what a signal handler may: it swaps an atomic, reads an
    // initialised `OnceLock`, makes one ioctl, and lets the signal do what it does.
    unsafe { signal_hook::low_level::register(SIGABRT, restore_and_die)? };

    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT, SIGUSR1, SIGWINCH])?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in &mut signals {
            match signal {
                SIGUSR1 => obey(Request::Show),
                SIGWINCH => obey(Request::Resize),
                SIGTSTP => stop_for_a_while(),
                SIGCONT => continue_again(),
                number => obey(Request::End(u8::try_from(number).unwrap_or(u8::MAX))),
            }
        }
    })?;
    Ok(())
}

/// Gives the terminal back to the shell and stops, guest and all, as ^Z does to a program
/// that has no opinion of its own. (The key itself goes to the guest.)
fn stop_for_a_while() {
    terminal::restore();
    if let Err(error) = kill_process(getpid(), Signal::STOP) {
        tracing::warn!(%error, "cannot stop");
    }
}

/// Takes the terminal again after a stop.
fn continue_again() {
    if let Err(error) = terminal::enter_raw() {
        tracing::warn!(%error, "the terminal stays as it is");
    }
}
