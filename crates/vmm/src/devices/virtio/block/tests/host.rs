//! What the host does to a disk: other guests, errors, a full disk, and kill -9.

use super::*;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

const SIZE: u64 = 4 << 20;
/// Tells [`other_process`] what to do: a verb and a path.
const TASK: &str = "LGUEST_TEST_DISK_TASK";

/// What is run by the tests below in a process of its own.
#[test]
#[ignore = "run by other tests in another process"]
fn other_process() {
    let Ok(task) = std::env::var(TASK) else { return };
    let (verb, path) = task.split_once(' ').unwrap();
    let path = Path::new(path);
    match verb {
        "hold" => {
            let _disk = open(path, "").unwrap();
            say_ready_and_wait();
        }
        "hold-readonly" => {
            let _disk = open(path, ",readonly").unwrap();
            say_ready_and_wait();
        }
        "flush" => {
            let mut guest = Guest::boot(path, "");
            guest.write(33, &pattern(512 << 10, 4));
            guest.flush();
            say_ready_and_wait();
        }
        "fill" => fill(path),
        _ => panic!("{task}"),
    }
}

fn say_ready_and_wait() {
    println!("\nready");
    std::io::stdin().read_exact(&mut [0]).unwrap();
}

fn command(task: &str) -> String {
    let me = std::env::current_exe().unwrap();
    let name = concat!(module_path!(), "::other_process").split_once("::").unwrap().1;
    format!("{TASK}='{task}' exec '{}' --exact {name} --ignored --nocapture", me.display())
}

fn start(task: &str) -> Child {
    let mut child = Command::new("sh")
        .args(["-c", &command(task)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "ready"), "{task}");
    child
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn two_guests_cannot_write_one_image() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        // In this process,
        let disk = open(&path, "").unwrap();
        let message = refused(&path, "");
        assert!(message.contains("in use by another guest"), "{message}");
        assert!(refused(&path, ",readonly").contains("in use by another guest"));
        drop(disk);
        // in another,
        let other = start(&format!("hold {}", path.display()));
        assert!(refused(&path, "").contains("in use by another guest"));
        assert!(refused(&path, ",readonly").contains("in use by another guest"));
        // until it ends, however that comes.
        kill(other);
        drop(open(&path, "").unwrap());
        let other = start(&format!("hold-readonly {}", path.display()));
        assert!(refused(&path, "").contains("in use by another guest"));
        drop(open(&path, ",readonly").unwrap());
        kill(other);
    }
}

#[test]
fn what_was_flushed_survives_kill_9() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        kill(start(&format!("flush {}", path.display())));
        let mut guest = Guest::boot(&path, "");
        assert_eq!(guest.read(33, 512 << 10), pattern(512 << 10, 4));
    }
}

#[test]
fn a_full_host_disk_is_an_io_error_and_the_guest_goes_on() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        // Files may not grow beyond 1 MiB there, and the signal that says so is ignored.
        let task = command(&format!("fill {}", path.display()));
        let limited = format!("trap '' XFSZ; ulimit -f 2048; {task}");
        let status = Command::new("sh").args(["-c", &limited]).status().unwrap();
        assert!(status.success(), "{format}");
        // And what was answered is there.
        let mut guest = Guest::boot(&path, "");
        assert_eq!(guest.read(0, 512), [1; 512]);
        assert_eq!(guest.read(8, 512), [3; 512]);
    }
}

/// Writes until the host's disk is full, and then what still fits.
fn fill(path: &Path) {
    let mut guest = Guest::boot(path, "");
    guest.write(0, &[1; 4096]);
    guest.flush();
    let mut failed = 0;
    for n in 0..60 {
        let at = (1 << 10) / 512 + n * 128;
        let (status, _) = guest.request(OUT, at, &[Part::Read(&[2; 64 << 10])]);
        failed += usize::from(status == IO_ERROR);
    }
    assert!(failed > 10, "{failed} writes failed");
    assert_eq!(guest.read(0, 512), [1; 512]);
    guest.write(8, &[3; 512]);
    assert_eq!(guest.read(8, 512), [3; 512]);
    assert!(!guest.driver.signal.seen().needs_reset);
    let (status, _) = guest.request(FLUSH, 0, &[]);
    assert!(status == OK || status == IO_ERROR);
}

#[test]
fn a_file_that_becomes_shorter_is_an_io_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let mut guest = Guest::boot(&path, "");
    guest.write(0, &[1; 8192]);
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    for _ in 0..100 {
        assert_eq!(guest.request(IN, 8, &[Part::Write(512)]).0, IO_ERROR);
        assert_eq!(guest.request(IN, 7, &[Part::Write(1024)]).0, IO_ERROR);
    }
    assert_eq!(guest.read(7, 512), [1; 512]);
    guest.write(15, &[4; 512]);
    assert_eq!(guest.read(15, 512), [4; 512]);
}
