//! Stock kernels booted by the real program, judged by what they print.
//!
//! Each boot goes all the way: kernel, `/init`, its checks with busybox, the statically
//! linked smoke test (`guests/smoke`), power-off. They are ignored in a plain `cargo test`
//! because they need kernels that somebody has to fetch; `cargo verify` does.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::fs;
use support::{Run, guest_file};

/// Boots `kernel` in test mode and asserts everything a good boot shows.
fn boot(kernel: &str, cpus: u32, mem_mib: u64) {
    let run = Run::of(kernel, "test");
    check_boot(run, kernel, cpus, mem_mib);
}

fn check_boot(run: Run, kernel: &str, cpus: u32, mem_mib: u64) {
    let release = fs::read_to_string(guest_file(&format!("{kernel}/release"))).unwrap();
    let finished = run
        .arguments(&["--cpus", &cpus.to_string(), "--mem", &format!("{mem_mib}M")])
        .append(&format!("lguest.cpus={cpus} lguest.mem={mem_mib}"))
        .finish();
    finished.assert_status(0);
    finished.assert_console("init: started");
    finished.assert_console(&format!("init: release {}", release.trim()));
    finished.assert_console("smoke: all 22 passed");
    finished.assert_console("init: all checks passed");
    finished.assert_quiet_log();
    assert_eq!(finished.messages, "", "a good boot is silent on stderr");
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn debian_12_cloud() {
    boot("debian12-cloud", 1, 512);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn debian_12_cloud_with_two_vcpus_and_4_gib() {
    boot("debian12-cloud", 2, 4096);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn debian_12_cloud_in_128_mib() {
    boot("debian12-cloud", 1, 128);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn debian_12_generic() {
    boot("debian12-generic", 1, 512);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn debian_12_generic_with_two_vcpus() {
    boot("debian12-generic", 2, 512);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_newer_debian() {
    boot("debian-newer", 1, 512);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_newer_debian_with_two_vcpus() {
    boot("debian-newer", 2, 512);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn on_the_cpu_model_without_avx() {
    check_boot(
        Run::of("debian12-cloud", "test").arguments(&["--cpu", "v2"]),
        "debian12-cloud",
        1,
        512,
    );
}

/// As nobody: uid and gid 65534, no groups, no capabilities, /dev/kvm closed to it.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn as_an_unprivileged_user() {
    if !is_root() {
        eprintln!("not root: this test process is the unprivileged user already");
        return boot("debian12-cloud", 2, 512);
    }
    let place = tempfile::tempdir().unwrap();
    let run = Run::unprivileged("debian12-cloud", "test", place.path());
    check_boot(run, "debian12-cloud", 2, 512);
}

/// The promise in one test: at no time is /dev/kvm among the process's open files, and it has
/// the rights of nobody.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn never_opens_dev_kvm() {
    let place = tempfile::tempdir().unwrap();
    let run = if is_root() {
        Run::unprivileged("debian12-cloud", "idle", place.path())
    } else {
        Run::of("debian12-cloud", "idle")
    };
    let running = run.start();
    running.wait_for("init: idle");
    let process = format!("/proc/{}", running.pid());
    for entry in fs::read_dir(format!("{process}/fd")).unwrap() {
        let target = fs::read_link(entry.unwrap().path()).unwrap_or_default();
        assert!(!target.to_string_lossy().contains("kvm"), "{} is open", target.display());
    }
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let effective = status.lines().find(|line| line.starts_with("CapEff:")).unwrap();
    assert!(effective.ends_with("0000000000000000"), "{effective}");
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_kernel_panic_is_said_and_has_its_status() {
    let finished = Run::of("debian12-cloud", "panic").finish();
    finished.assert_status(3);
    finished.assert_console("Kernel panic - not syncing");
    finished.assert_one_line("panicked: Attempted to kill init!");
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_reset_has_its_status() {
    let finished = Run::of("debian12-cloud", "reset").finish();
    finished.assert_status(5);
    finished.assert_one_line("reset");
}

/// A kernel that waits for a disk which never comes has no end of its own.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn the_timeout_ends_a_run() {
    let finished = Run::bare()
        .path("--kernel", &guest_file("debian12-cloud/vmlinuz"))
        .append("root=/dev/nowhere rootwait")
        .arguments(&["--timeout", "4"])
        .finish();
    finished.assert_status(124);
    finished.assert_one_line("--timeout");
    finished.assert_console("Linux version 6.1");
}

/// Translator and interpreter side by side, from the kernel's first instruction to its last.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn in_lockstep() {
    let run = Run::of("debian12-cloud", "uname");
    let finished = run.arguments(&["--engine", "lockstep", "-v", "--mem", "128M"]).finish();
    finished.assert_status(0);
    finished.assert_console("init: started");
    finished.assert_console("GNU/Linux");
    let counted = |name: &str| -> u64 {
        let (_, rest) = finished.messages.split_once(name).expect("lockstep says what it did");
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    };
    let (stretches, instructions) = (counted("stretches: "), counted("instructions: "));
    assert!(stretches > 500 && instructions > 100_000_000, "{}", finished.messages);
    // Excuses there may be, but not many.
    let excused = counted("raced: ") + counted("undefined: ") + counted("unsettled: ");
    assert!(excused * 20 < stretches, "{}", finished.messages);
}

/// What is typed reaches the shell, and the shell's answer comes back.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn the_shell_answers() {
    let run = Run::of("debian12-cloud", "shell").append("quiet");
    let mut running = run.start_with(std::process::Stdio::piped());
    running.wait_for("guest# ");
    running.type_in(b"echo $((6 * 7)) is the answer\n");
    running.wait_for("\n42 is the answer");
    running.type_in(b"exit\n");
    running.finish().assert_status(0);
}

/// The serial console can go to a file, and nothing to the terminal.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn the_console_goes_to_a_file() {
    let place = tempfile::tempdir().unwrap();
    let log = place.path().join("console.log");
    let finished = Run::of("debian12-cloud", "uname").path("--serial", &log).finish();
    finished.assert_status(0);
    assert_eq!(finished.console, "");
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("init: started") && log.contains("GNU/Linux"), "{log}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
