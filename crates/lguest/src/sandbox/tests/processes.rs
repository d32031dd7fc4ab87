//! Processes that enter the sandbox and then do what they may, or what they may not.

use super::*;
use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Output, exit};
use std::sync::Barrier;
use std::time::Duration;
use std::{ptr, thread};

/// Tells [`other_process`] what to do.
const TASK: &str = "LGUEST_TEST_SANDBOX_TASK";
/// The status of one that has lived to the end.
const ALIVE: i32 = 42;

/// What is run by the tests below in a process of its own.
#[test]
#[ignore = "run by other tests in another process"]
fn other_process() {
    let Ok(task) = std::env::var(TASK) else { return };
    crate::terminal::restore_on_panic();
    let needs = Needs { children: vec![4_000_001], ..Needs::default() };
    let filters = Arc::new(Filters::new(task != "log", true, &needs).unwrap());
    let kinds = [
        ThreadKind::Vcpu,
        ThreadKind::Timer,
        ThreadKind::Translator,
        ThreadKind::Memory,
        ThreadKind::Device,
    ];
    let start = Arc::new(Barrier::new(kinds.len() + 1));
    let threads = kinds.map(|kind| {
        let (filters, start) = (Arc::clone(&filters), Arc::clone(&start));
        thread::spawn(move || {
            start.wait();
            filters.enter(kind);
            use_the_heap();
        })
    });
    filters.seal().unwrap();
    start.wait();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    match task.as_str() {
        // What is allowed.
        "live" => use_the_heap(),
        "panic" => panic!("on purpose"),
        "abort" => std::process::abort(),
        "read a file" => {
            let error = File::open("/proc/sys/vm/overcommit_memory").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        "thread" => {
            let error = thread::Builder::new().spawn(|| ()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        "log" => drop(UnixDatagram::unbound().unwrap()),
        // What is not.
        "execute" => execute(),
        "write a file" => drop(File::create("/nonexistent/file")),
        "socket" => drop(UnixDatagram::unbound()),
        "code" => map_code(),
        "ptrace" => attach(),
        "signal" => terminate_myself(),
        "vcpu" => {
            filters.enter(ThreadKind::Vcpu);
            wait_for_a_child();
        }
        _ => panic!("{task}"),
    }
    exit(ALIVE);
}

fn use_the_heap() {
    let mut parts: Vec<Vec<u8>> = Vec::new();
    for n in 0..300_usize {
        parts.push(vec![n as u8; (n * 977) % 300_000]);
        if n % 3 == 0 {
            drop(parts.swap_remove(n % parts.len()));
        }
    }
    thread::sleep(Duration::from_millis(1));
}

fn execute() {
    let (program, words) = (c"/bin/true", [c"true".as_ptr(), ptr::null()]);
    // SAFETY: C strings, and the last of them null; no environment.
    unsafe { libc::execve(program.as_ptr(), words.as_ptr(), ptr::null()) };
}

fn map_code() {
    let (flags, prot) =
        (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_READ | libc::PROT_EXEC);
    // SAFETY: a new mapping at a place of the kernel's choice.
    unsafe { libc::mmap(ptr::null_mut(), 4096, prot, flags, -1, 0) };
}

fn attach() {
    // SAFETY: asks for a process that there is not.
    unsafe { libc::ptrace(libc::PTRACE_ATTACH, 4_000_000, 0, 0) };
}

fn terminate_myself() {
    // SAFETY: a signal to ourselves, which has no handler.
    unsafe { libc::kill(libc::getpid(), libc::SIGTERM) };
}

fn wait_for_a_child() {
    // SAFETY: no status is asked for.
    unsafe { libc::waitpid(4_000_001, ptr::null_mut(), libc::WNOHANG) };
}

fn run(task: &str) -> Output {
    let name = concat!(module_path!(), "::other_process").split_once("::").unwrap().1;
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(TASK, task)
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap()
}

#[test]
fn a_forbidden_call_ends_the_process_with_one_line_and_status_159() {
    for (task, call) in [
        ("execute", "execve (59)"),
        ("write a file", "openat (257)"),
        ("socket", "socket (41)"),
        ("code", "mmap (9)"),
        ("ptrace", "ptrace (101)"),
        ("signal", "kill (62)"),
        ("vcpu", "wait4 (61)"),
    ] {
        let output = run(task);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(159), "{task}: {said}");
        let lines: Vec<&str> = said.lines().collect();
        let [line] = lines[..] else { panic!("{task}: not one line: {said}") };
        assert!(line.starts_with("lguest: the system-call filter"), "{task}: {line}");
        assert!(line.contains(&format!(" wanted {call}.")), "{task}: {line}");
        assert!(line.contains("--seccomp log"), "{task}: {line}");
    }
}

#[test]
fn what_is_allowed_or_refused_is_no_violation() {
    for task in ["live", "read a file", "thread", "log"] {
        let output = run(task);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), said.as_ref()), (Some(ALIVE), ""), "{task}");
    }
}

#[test]
fn a_panic_and_an_abort_are_what_they_were() {
    use std::os::unix::process::ExitStatusExt;
    let output = run("panic");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(101), "{said}");
    assert!(said.contains("on purpose") && said.contains("stack backtrace"), "{said}");
    let output = run("abort");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
}
