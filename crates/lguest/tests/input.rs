//! Everything a user can get wrong: one line, naming the thing and the remedy, status 2.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use support::{Run, disk, tiny};

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
    with(
        &["--engine", "lockstep", "--cpus", "2", "--platform", "pc"],
        &["--engine lockstep", "--cpus 1"],
    );
    with(&["--engine", "warp"], &["warp"]);
    with(&["--cpu", "486"], &["486"]);
}

#[test]
fn looks_at_the_engine() {
    let with = |words: &[&str], wanted: &[&str]| {
        refused(&[&["--kernel", "/etc/passwd"], words].concat(), wanted);
    };
    with(&["--code-cache", "64K"], &["--code-cache 64 KiB", "256K to 1G"]);
    with(&["--code-cache", "2G"], &["--code-cache 2 GiB", "256K to 1G"]);
    with(&["--code-cache", "lots"], &["lots", "--code-cache", "512M"]);
    with(&["--symbols", "/etc/passwd"], &["--symbols", "--perf-map or --jitdump"]);
    let symbols = ["--perf-map", "--symbols"];
    with(&[&symbols[..], &["/etc/passwd"]].concat(), &["/etc/passwd", "System.map"]);
    with(&[&symbols[..], &["/nonexistent/map"]].concat(), &["/nonexistent/map", "No such file"]);
}

#[test]
fn places_for_the_console() {
    refused(&["--kernel", "/etc/passwd", "--serial", "/"], &["--serial"]);
    refused(&["--kernel", "/etc/passwd", "--serial", "/nonexistent/log"], &["/nonexistent/log"]);
}

#[test]
fn disks() {
    let place = tempfile::tempdir().unwrap();
    let blank = disk::raw(&place.path().join("blank.img"), 1 << 20);
    let ext4 = disk::ext4(&place.path().join("ext4.img"), 16 << 20);
    let empty = disk::raw(&place.path().join("empty.img"), 0);
    let torn = place.path().join("torn.qcow2");
    fs::write(&torn, b"QFI\xfb\0\0\0\x03 and no more").unwrap();
    let name = |path: &Path| path.to_str().unwrap().to_owned();
    let with = |options: &str, wanted: &[&str]| {
        refused(&["--kernel", "/etc/passwd", "--disk", options], wanted);
    };
    with("/nonexistent/disk.img", &["/nonexistent/disk.img", "truncate -s"]);
    with("/", &["neither a file nor a block device"]);
    with(&name(&empty), &["empty.img", "truncate -s"]);
    with(&format!("{},format=qcow2", name(&blank)), &["blank.img", "format=raw"]);
    with(&name(&torn), &["torn.qcow2", "qemu-img check"]);
    with(&format!("{},readable", name(&blank)), &["readable", "--disk"]);
    with(&format!("{},format=vmdk", name(&blank)), &["vmdk", "qcow2"]);
    // Nothing on them to boot.
    refused(&["--disk", &name(&empty)], &["empty.img", "truncate -s"]);
    refused(&["--disk", &name(&blank)], &["blank.img", "--kernel"]);
    refused(&["--disk", &name(&ext4)], &["ext4.img", "--kernel"]);
}

#[test]
fn an_image_in_use() {
    let place = tempfile::tempdir().unwrap();
    let image = disk::raw(&place.path().join("disk.img"), 1 << 20);
    let kernel = tiny::kernel(place.path(), tiny::ECHO);
    let guest = || Run::bare().path("--kernel", &kernel).arguments(&["--mem", "32M"]);
    let mut first = guest().path("--disk", &image).start_with(Stdio::piped());
    first.type_in(b"ready");
    first.wait_for("ready");
    for options in ["", ",readonly"] {
        let second = guest().option("--disk", "", &image, options).finish();
        second.assert_status(2);
        second.assert_one_line("disk.img is in use by another guest");
    }
    // A kill lets go of it.
    first.kill();
    let next = guest().path("--disk", &image).arguments(&["--timeout", "0.2"]).finish();
    next.assert_status(124);
}

#[test]
fn networks() {
    let with = |options: &str, wanted: &[&str]| {
        refused(&["--kernel", "/etc/passwd", "--net", options], wanted);
    };
    with("bridge", &["bridge", "begin with user"]);
    with("user,fwd=tcp:99999:1", &["99999", "fwd"]);
    with("user,fwd=tcp:8080:0", &["fwd"]);
    with("user,mac=01:00:00:00:00:01", &["mac"]);
    with("unix=/nonexistent/socket", &["/nonexistent/socket", "give a folder"]);
    with("tap=a-name-that-is-too-long", &["at most 15 characters"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let place = tempfile::tempdir().unwrap();
    let without = Run::bare()
        .arguments(&["--kernel", "/etc/passwd", "--net", "user"])
        .env("PATH", place.path())
        .finish();
    without.assert_status(2);
    without.assert_one_line("passt is not installed: apt install passt");
    with(&format!("user,fwd=tcp:{port}:80"), &["another host port", &port.to_string()]);
}

/// Who may not have an interface is told how to get one.
#[test]
fn an_interface_for_others_only() {
    let mut run = Run::bare().arguments(&["--kernel", "/etc/passwd", "--net", "tap=lgnone0"]);
    if rustix::process::geteuid().is_root() {
        run = run.through(&["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]);
    }
    let finished = run.finish();
    finished.assert_status(2);
    finished.assert_one_line("--net tap=lgnone0: ");
    finished.assert_one_line("ip tuntap add");
}

#[test]
fn more_devices_than_there_is_room_for() {
    let place = tempfile::tempdir().unwrap();
    let mut words = vec!["--mem".to_owned(), "32M".to_owned()];
    words.extend(["--kernel".to_owned(), name_of(tiny::kernel(place.path(), tiny::SLEEP))]);
    for number in 0..31 {
        let image = disk::raw(&place.path().join(format!("{number}.img")), 1 << 20);
        words.extend(["--disk".to_owned(), name_of(image)]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    refused(&words, &["room for 31 devices", "fewer disks"]);
}

fn name_of(path: std::path::PathBuf) -> String {
    path.into_os_string().into_string().unwrap()
}

#[test]
fn io_threads() {
    for bad in ["threads=0", "threads=-1", "threads=9999", "threads", "4", ""] {
        refused(&["--kernel", "/etc/passwd", "--io", bad], &["--io", "threads=N"]);
    }
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
