//! The user's terminal: raw while the guest runs, as before on every way out. The terminal is
//! a pseudo-terminal of ours.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use rustix::process::Signal;
use std::ops::{Deref, DerefMut};
use std::process::Command;
use std::thread;
use std::time::Duration;
use support::pty::OnTerminal;
use support::tiny;

/// A tiny guest on a terminal.
struct Tiny {
    lguest: OnTerminal,
    _place: tempfile::TempDir,
}

impl Tiny {
    fn start(code: &[u8], words: &[&str]) -> Self {
        let place = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lguest"));
        command.args(["run", "--mem", "32M", "--kernel"]);
        command.arg(tiny::kernel(place.path(), code)).args(words);
        Self { lguest: OnTerminal::start(command, Duration::from_secs(30)), _place: place }
    }
}

impl Deref for Tiny {
    type Target = OnTerminal;

    fn deref(&self) -> &OnTerminal {
        &self.lguest
    }
}

impl DerefMut for Tiny {
    fn deref_mut(&mut self) -> &mut OnTerminal {
        &mut self.lguest
    }
}

/// lguest with the echoing guest, once its terminal is raw.
fn running() -> Tiny {
    let on_terminal = Tiny::start(tiny::ECHO, &["--timeout", "60"]);
    on_terminal.wait_until("raw", || on_terminal.is_raw());
    on_terminal
}

#[test]
fn ctrl_a_x_quits() {
    let mut lguest = running();
    lguest.press(b"\x01x");
    assert_eq!(lguest.finish(), Some(6));
    lguest.wait_for("lguest: quit");
}

#[test]
fn ctrl_c_and_others_are_the_guests() {
    let mut lguest = running();
    lguest.press(b"<\x03\x1a\x1c\x11\x13>");
    lguest.wait_for("<\x03\x1a\x1c\x11\x13>");
    lguest.press(b"\x01a!");
    lguest.wait_for("\x01!");
    lguest.press(b"\x01x");
    assert_eq!(lguest.finish(), Some(6));
}

#[test]
fn ctrl_a_lists_keys_and_shows_vcpus() {
    let mut lguest = running();
    lguest.press(b"\x01?");
    lguest.wait_for("Ctrl-A x   quit");
    lguest.press(b"\x01s");
    lguest.wait_for("rip 0x");
    lguest.press(b"\x01x");
    assert_eq!(lguest.finish(), Some(6));
}

/// A guest that reads nothing must not keep the user in.
#[test]
fn quitting_works_after_typing_at_a_deaf_guest() {
    let mut lguest = Tiny::start(tiny::SLEEP, &["--timeout", "60"]);
    lguest.wait_until("raw", || lguest.is_raw());
    for _ in 0..16 {
        lguest.press(&[b'z'; 1024]);
        thread::sleep(Duration::from_millis(20));
    }
    lguest.press(b"\x01x");
    assert_eq!(lguest.finish(), Some(6));
}

#[test]
fn signals_put_the_terminal_back() {
    for (signal, status) in
        [(Signal::HUP, 129), (Signal::INT, 130), (Signal::QUIT, 131), (Signal::TERM, 143)]
    {
        let mut lguest = running();
        lguest.send(signal);
        assert_eq!(lguest.finish(), Some(status));
    }
}

/// Death by abort(), which is also how a panic within a panic ends.
#[test]
fn an_abort_puts_the_terminal_back() {
    let mut lguest = running();
    lguest.send(Signal::ABORT);
    assert_ne!(lguest.finish(), Some(0));
}

#[test]
fn the_ends_of_guests_put_the_terminal_back() {
    let mut timeout = Tiny::start(tiny::SLEEP, &["--timeout", "0.3"]);
    assert_eq!(timeout.finish(), Some(124));
    let mut fault = Tiny::start(tiny::TRIPLE_FAULT, &["--timeout", "60"]);
    assert_eq!(fault.finish(), Some(4));
    let mut refused = Tiny::start(tiny::SLEEP, &["--cpus", "0"]);
    assert_eq!(refused.finish(), Some(2));
}

#[test]
fn a_stop_gives_the_terminal_back_and_continuing_takes_it_again() {
    let mut lguest = running();
    lguest.send(Signal::TSTP);
    lguest.wait_until("stopped", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", lguest.pid())).unwrap();
        stat.rsplit_once(')').unwrap().1.trim_start().starts_with('T')
    });
    assert!(!lguest.is_raw());
    lguest.send(Signal::CONT);
    lguest.wait_until("raw again", || lguest.is_raw());
    lguest.press(b"still here");
    lguest.wait_for("still here");
    lguest.press(b"\x01x");
    assert_eq!(lguest.finish(), Some(6));
}
