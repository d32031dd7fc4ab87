//! The user's terminal: raw while the guest has it, put back on every way out.
//!
//! There is one terminal per process, so its saved settings are one global. `restore` may be
//! called from anywhere and any number of times: at the end of `main`, when the guard is
//! dropped, in the panic hook, by the thread that takes signals, and from the handler of
//! SIGABRT (it only makes one `ioctl`, which is safe there).

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use std::io;
use std::panic;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The settings before we touched them.
static COOKED: OnceLock<Termios> = OnceLock::new();
/// Whether the terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);

/// Puts the terminal back when dropped.
#[derive(Debug)]
pub(crate) struct Guard(());

impl Drop for Guard {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes the terminal on stdin raw: every key goes to the guest, Ctrl-C included. `None` if
/// stdin is no terminal.
///
/// # Errors
/// The terminal refused.
pub(crate) fn make_raw() -> io::Result<Option<Guard>> {
    let stdin = rustix::stdio::stdin();
    if !isatty(stdin) {
        return Ok(None);
    }
    let cooked = tcgetattr(stdin)?;
    let _ = COOKED.set(cooked);
    enter_raw()?;
    Ok(Some(Guard(())))
}

/// Makes the terminal raw (again, after a stop), if it ever was.
///
/// # Errors
/// The terminal refused.
pub(crate) fn enter_raw() -> io::Result<()> {
    let Some(cooked) = COOKED.get() else { return Ok(()) };
    let mut raw = cooked.clone();
    raw.make_raw();
    tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
    RAW.store(true, Ordering::SeqCst);
    Ok(())
}

/// Puts the terminal back as it was found. Does nothing if it is not raw.
pub(crate) fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(cooked) = COOKED.get()
    {
        // If the terminal has gone (hang-up), there is nothing to put back.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, cooked);
    }
}

/// Whether the terminal is raw now.
pub(crate) fn is_raw() -> bool {
    RAW.load(Ordering::SeqCst)
}

/// Columns and rows of the window that the guest's output is seen in. `None` if it is seen
/// in none, or in one that does not know.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(rustix::stdio::stdout())
        .or_else(|_| tcgetwinsize(rustix::stdio::stdin()))
        .ok()?;
    (size.ws_col != 0 && size.ws_row != 0).then_some((size.ws_col, size.ws_row))
}

/// Makes a panic, on whichever thread, put the terminal back before it prints its message.
pub(crate) fn restore_on_panic() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        restore();
        print(info);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use std::fs::File;
    use std::thread;

    #[test]
    fn a_panic_on_any_thread_puts_the_terminal_back() {
        let keeper = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keeper).unwrap();
        unlockpt(&keeper).unwrap();
        let name = ptsname(&keeper, Vec::new()).unwrap();
        let terminal = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        rustix::stdio::dup2_stdin(&terminal).unwrap();

        let before = tcgetattr(&terminal).unwrap().local_modes;
        let guard = make_raw().unwrap().unwrap();
        assert!(is_raw());
        assert_ne!(tcgetattr(&terminal).unwrap().local_modes, before);

        restore_on_panic();
        assert!(thread::spawn(|| panic!("on purpose")).join().is_err());
        // The guard still stands: it was the hook that put the terminal back.
        assert!(!is_raw());
        assert_eq!(tcgetattr(&terminal).unwrap().local_modes, before);
        drop(guard);
    }
}
