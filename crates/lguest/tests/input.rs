//! Everything a user can get wrong: one line, naming the thing and the remedy, status 2.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use support::Run;

/// Runs `lguest run` with these words and asserts the line.
#[track_caller]
fn refused(words: &[&str], wanted: &[&str]) {
    let finished = Run::bare().arguments(words).finish();
    finished.assert_status(2);
    for text in wanted {
        finished.assert_one_line(text);
    }
    assert_eq!(finished.console, "");
}

#[test]
fn kernels_that_are_none() {
    refused(&["--kernel", "/nonexistent/vmlinuz"], &["/nonexistent/vmlinuz", "No such file"]);
    refused(&["--kernel", "/"], &["directory"]);
    refused(&["--kernel", "/dev/null"], &["/dev/null"]);
    refused(&["--kernel", "/etc/passwd"], &["/etc/passwd", "not a kernel", "bzImage"]);
    refused(&["--kernel", "/bin/sh"], &["/bin/sh"]);
}

#[test]
fn a_kernel_nobody_may_read() {
    let place = tempfile::tempdir().unwrap();
    let kernel = place.path().join("secret");
    fs::write(&kernel, "x").unwrap();
    let status = Command::new("chmod").arg("000").arg(&kernel).status().unwrap();
    assert!(status.success());
    if fs::read(&kernel).is_ok() {
        eprintln!("root reads everything: not tested");
        return;
    }
    refused(&["--kernel", kernel.to_str().unwrap()], &["secret", "denied"]);
}

#[test]
fn a_truncated_kernel() {
    let kernel =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guests/debian12-cloud/vmlinuz");
    let Ok(mut bytes) = fs::read(kernel) else {
        eprintln!("no kernel fetched: not tested");
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let cut = place.path().join("cut");
    for len in [100, 700, 20_000, bytes.len() / 2] {
        bytes.truncate(bytes.len().max(len));
        fs::write(&cut, &bytes[..len]).unwrap();
        refused(&["--kernel", cut.to_str().unwrap()], &["cut"]);
    }
}

#[test]
fn sizes_and_numbers() {
    let with = |words: &[&str], wanted: &[&str]| {
        refused(&[&["--kernel", "/etc/passwd"], words].concat(), wanted);
    };
    with(&["--mem", "0M"], &["--mem"]);
    with(&["--mem", "1M"], &["too little", "--mem"]);
    with(&["--mem", "9999T"], &["--mem", "smaller"]);
    with(&["--mem", "lots"], &["lots", "--mem", "512M"]);
    with(&["--mem", "512"], &["unit"]);
    with(&["--cpus", "0"], &["--cpus 0", "1 to 64"]);
    with(&["--cpus", "100000"], &["--cpus 100000"]);
    with(&["--cpus", "two"], &["two", "--cpus"]);
    with(&["--timeout", "-1"], &["--timeout"]);
    with(&["--timeout", "0"], &["--timeout"]);
}

#[test]
fn engines_and_models() {
    let with = |words: &[&str], wanted: &[&str]| {
        refused(&[&["--kernel", "/etc/passwd"], words].concat(), wanted);
    };
    with(&["--engine", "kvm"], &["kvm", "--engine soft"]);
    with(&["--engine", "warp"], &["warp"]);
    with(&["--cpu", "486"], &["486"]);
}

#[test]
fn places_for_the_console() {
    refused(&["--kernel", "/etc/passwd", "--serial", "/"], &["--serial"]);
    refused(&["--kernel", "/etc/passwd", "--serial", "/nonexistent/log"], &["/nonexistent/log"]);
}

#[test]
fn unknown_words() {
    refused(&["--kernel", "/etc/passwd", "--frobnicate"], &["--frobnicate", "--help"]);
    refused(&[], &["nothing to boot", "--kernel", "--disk"]);
}

#[test]
fn check_describes_the_host() {
    let output = Command::new(env!("CARGO_BIN_EXE_lguest")).arg("check").output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for name in ["cpu ", "levels ", "/dev/kvm ", "memory ", "huge pages ", "limits ", "engine "] {
        assert!(text.lines().any(|line| line.starts_with(name)), "no {name}in\n{text}");
    }
    assert!(text.lines().last().unwrap().contains("soft"), "{text}");
    assert!(output.stderr.is_empty());
}
