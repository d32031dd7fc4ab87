//! The virtio console and the host's random numbers, with stock kernels.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::fs;
use std::time::Duration;
use support::{Run, pty::OnTerminal};

const CLOUD: &str = "debian12-cloud";

/// hvc0 is the terminal: what is typed, what is shown, and the window's size as it changes.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn hvc0_is_the_terminal() {
    let place = tempfile::tempdir().unwrap();
    let log = place.path().join("serial.log");
    let run = Run::with_modules(CLOUD, "hvc")
        .arguments(&["--console", "stdio"])
        .path("--serial", &log)
        // Only who has a terminal for its own is told of a new size.
        .through(&["setsid", "--ctty"]);
    let mut lguest = OnTerminal::start(run.command(), Duration::from_secs(240));
    lguest.wait_for("init: hello on hvc0, rows and columns 24 80");
    lguest.resize(50, 132);
    lguest.press(b"a typed line\n");
    lguest.wait_for("init: hvc0 heard a typed line, rows and columns 50 132");
    assert_eq!(lguest.finish(), Some(0));
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("init: hvc0 said a typed line"), "{log}");
    assert!(log.contains("init: all checks passed"), "{log}");
}

/// What the kernel says is shown there too once its driver is there.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn the_virtio_console_goes_to_a_file() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("console.log");
    let finished = Run::with_modules(CLOUD, "rng").path("--console", &file).finish();
    finished.assert_good();
    let shown = fs::read_to_string(file).unwrap();
    assert!(shown.contains("] init: modules are loaded\r\n"), "{shown:?}");
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn random_numbers_come_from_the_host() {
    let finished = Run::with_modules(CLOUD, "rng").finish();
    finished.assert_good();
    assert_eq!(finished.after("init: /dev/hwrng is "), "virtio_rng.0");
    finished.assert_console("init: PASS differs");
}
