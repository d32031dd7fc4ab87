//! The user's terminal: raw while the guest runs, as before on every way out. The terminal is
//! a pseudo-terminal of ours.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use support::tiny;

/// lguest with a tiny guest on a terminal.
struct OnTerminal {
    child: Child,
    keyboard: File,
    screen: Arc<Mutex<String>>,
    /// Kept open, so that the settings can be looked at after lguest has gone.
    terminal: OwnedFd,
    before: Termios,
    _place: tempfile::TempDir,
}

impl OnTerminal {
    fn start(code: &[u8], words: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let terminal =
            rustix::fs::open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY, Mode::empty())
                .unwrap();
        let before = tcgetattr(&terminal).unwrap();

        let place = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_lguest"))
            .args(["run", "--mem", "32M", "--kernel"])
            .arg(tiny::kernel(place.path(), code))
            .args(words)
            .stdin(Stdio::from(terminal.try_clone().unwrap()))
            .stdout(Stdio::from(terminal.try_clone().unwrap()))
            .stderr(Stdio::from(terminal.try_clone().unwrap()))
            .spawn()
            .unwrap();
        let keyboard = File::from(master);
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut output, shared) = (keyboard.try_clone().unwrap(), screen.clone());
        thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(len @ 1..) = output.read(&mut buffer) {
                shared.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..len]));
            }
        });
        Self { child, keyboard, screen, terminal, before, _place: place }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.terminal).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    #[track_caller]
    fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            let screen = self.screen.lock().unwrap();
            assert!(start.elapsed() < Duration::from_secs(20), "not {what}; screen: {screen}");
            drop(screen);
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        self.wait_until(text, || self.screen.lock().unwrap().contains(text));
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn send(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits for the end and asserts that the terminal is as it was. Returns the exit status.
    #[track_caller]
    fn finish(&mut self) -> Option<i32> {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "lguest does not end");
            thread::sleep(Duration::from_millis(10));
        };
        let after = tcgetattr(&self.terminal).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        assert_eq!(after.output_modes, self.before.output_modes);
        assert_eq!(after.control_modes, self.before.control_modes);
        status.code()
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// lguest with the echoing guest, once its terminal is raw.
fn running() -> OnTerminal {
    let on_terminal = OnTerminal::start(tiny::ECHO, &["--timeout", "60"]);
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
    let mut lguest = OnTerminal::start(tiny::SLEEP, &["--timeout", "60"]);
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
    let mut timeout = OnTerminal::start(tiny::SLEEP, &["--timeout", "0.3"]);
    assert_eq!(timeout.finish(), Some(124));
    let mut fault = OnTerminal::start(tiny::TRIPLE_FAULT, &["--timeout", "60"]);
    assert_eq!(fault.finish(), Some(4));
    let mut refused = OnTerminal::start(tiny::SLEEP, &["--cpus", "0"]);
    assert_eq!(refused.finish(), Some(2));
}

#[test]
fn a_stop_gives_the_terminal_back_and_continuing_takes_it_again() {
    let mut lguest = running();
    lguest.send(Signal::TSTP);
    lguest.wait_until("stopped", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", lguest.child.id())).unwrap();
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
