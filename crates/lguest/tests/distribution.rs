//! A distribution as people install it: Debian on a disk image, with systemd, from the boot
//! loader's work to the power-off.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::process::Command;
use std::time::Duration;
use support::{Run, disk, guest_file, pty::OnTerminal};

/// Where the file system begins in what `cargo xtask debian-image` makes.
const OFFSET: u64 = 1 << 20;
/// A boot takes two minutes of a quiet machine.
const PATIENCE: Duration = Duration::from_secs(900);

/// `lguest run --disk debian.img` alone: the kernel and its initramfs come from the image. A
/// user logs in at the terminal, finds every unit up, and powers off.
#[test]
#[ignore = "boots Debian; run by cargo verify"]
fn debian_12_boots_from_its_disk() {
    let place = tempfile::tempdir().unwrap();
    let image = place.path().join("debian.img");
    // Of two gigabytes most are holes.
    let copied = Command::new("cp")
        .arg("--sparse=always")
        .args([&guest_file("debian-image/bookworm.img"), &image])
        .status()
        .unwrap();
    assert!(copied.success());
    let run = Run::bare().path("--disk", &image).arguments(&["--mem", "1G"]);
    let mut lguest = OnTerminal::start(run.command(), PATIENCE);
    lguest.wait_for("debian login: ");
    lguest.press(b"root\r");
    lguest.wait_for("root@debian:~# ");
    // The words are put together by the shell, so that the echo is not taken for the answer.
    lguest.press(b"echo The\"\" system is $(systemctl is-system-running --wait).\r");
    lguest.wait_until("up", || lguest.screen().contains("The system is "));
    lguest.press(b"systemctl --failed --no-pager --no-legend; echo That\"\" is all\r");
    lguest.wait_for("That is all");
    let screen = lguest.screen();
    assert!(screen.contains("The system is running."), "{screen}");
    lguest.press(b"poweroff\r");
    assert_eq!(lguest.finish(), Some(0), "{}", lguest.screen());
    disk::fsck(&image, OFFSET);
}
