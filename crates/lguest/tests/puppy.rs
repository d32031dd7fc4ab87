//! `lguest demo`: the kernel in Rust that lguest brings along, on both platforms.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const PLATFORMS: [&str; 2] = ["lguest", "pc"];

/// Runs it with these words, and types that.
fn demo(words: &[&str], typed: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_lguest"))
        .args(["demo", "--timeout", support::LIMIT])
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    let all = [output.stdout.as_slice(), &output.stderr].concat();
    String::from_utf8_lossy(&all).replace('\r', "")
}

#[test]
fn its_own_tests_pass_on_both_platforms() {
    for platform in PLATFORMS {
        let place = tempfile::tempdir().unwrap();
        let disk = place.path().join("disk");
        File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let disk = disk.to_str().unwrap();
        let output = demo(&["--platform", platform, "--disk", disk, "--append", "test"], "");
        let said = said(&output);
        assert_eq!(output.status.code(), Some(0), "{platform}: {said}");
        assert!(said.contains("test result: ok. "), "{platform}: {said}");
        assert!(!said.contains("no disk"), "{platform}: {said}");
        // What it has written is on the disk.
        let bytes = fs::read(disk).unwrap();
        assert!(bytes.starts_with(b"puppyfil"), "{platform}");
        assert_eq!(&bytes[512..524], b"another bone", "{platform}");
    }
}

#[test]
fn its_shell_does_what_it_is_told_and_ends_with_the_input() {
    for platform in PLATFORMS {
        let output = demo(&["--platform", platform], "run hello\nps\ncat\nrun bite\n");
        let said = said(&output);
        assert_eq!(output.status.code(), Some(0), "{platform}: {said}");
        for text in [
            "woof, says a program\n",
            "  0 kernel   ready\n",
            "there is no disk: start me with --disk FILE\n",
            "ended with -9\n",
        ] {
            assert!(said.contains(text), "{platform}: {text:?} is not in {said}");
        }
    }
}

#[test]
fn its_panics_are_the_last_line_and_the_status() {
    let output = demo(&[], "panic\n");
    assert_eq!(output.status.code(), Some(3));
    assert!(said(&output).contains("the guest's kernel panicked: panicked at src/shell.rs"));
    assert_eq!(demo(&["--platform", "pc"], "panic\n").status.code(), Some(3));
}

#[test]
fn a_test_that_is_not_there_is_no_success() {
    assert_eq!(demo(&["--append", "test=nobody"], "").status.code(), Some(1));
}

#[test]
fn it_measures() {
    let output = demo(&["--append", "bench"], "");
    let said = said(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for what in ["hypercall, direct", "one of 60 in the ring", "context switch", "system call"] {
        assert!(said.contains(what), "{what} is not in {said}");
    }
}

/// Names and versions of the packages a lock file takes from a registry.
fn locked(path: &str) -> BTreeSet<(String, String)> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let field = |block: &str, name: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""));
        line.map(|value| value.trim_end_matches('"').to_owned())
    };
    text.split("[[package]]")
        .filter(|block| field(block, "source").is_some())
        .filter_map(|block| Some((field(block, "name")?, field(block, "version")?)))
        .collect()
}

#[test]
fn who_has_lguests_packages_has_puppys() {
    let (ours, its) = (locked("../../Cargo.lock"), locked("../../guests/puppy/Cargo.lock"));
    let missing: Vec<_> = its.difference(&ours).collect();
    assert!(!its.is_empty() && missing.is_empty(), "not in the workspace's lock file: {missing:?}");
}
