//! The filter on system calls around a run: which threads have it, when it may be missing, and
//! that signals from outside still do what they did.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use rustix::process::Signal;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use support::{Run, Running, disk, tiny};

/// A guest that echoes what is typed, on two vCPUs, with a disk.
fn echo(place: &tempfile::TempDir, words: &[&str]) -> Run {
    let kernel = tiny::kernel(place.path(), tiny::ECHO);
    let image = disk::raw(&place.path().join("disk"), 1 << 20);
    Run::bare()
        .path("--kernel", &kernel)
        .path("--disk", &image)
        .arguments(&["--mem", "32M", "--cpus", "2", "--io", "threads=2", "--timeout", "60"])
        .arguments(words)
}

fn started(run: Run) -> Running {
    let mut running = run.start_with(Stdio::piped());
    running.type_in(b"ready");
    running.wait_for("ready");
    running
}

/// A field of each thread's status, by the thread's name.
fn fields(running: &Running, field: &str) -> BTreeMap<String, u32> {
    let of = |status: &str, field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t"));
        line.unwrap_or_else(|| panic!("no {field} in {status}")).to_owned()
    };
    fs::read_dir(format!("/proc/{}/task", running.pid()))
        .unwrap()
        .map(|thread| {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            (of(&status, "Name"), of(&status, field).trim().parse().unwrap())
        })
        .collect()
}

#[test]
fn every_thread_is_in_the_sandbox_and_those_for_the_guest_in_a_narrower_one() {
    let place = tempfile::tempdir().unwrap();
    let running = started(echo(&place, &[]));
    let modes = fields(&running, "Seccomp");
    assert!(modes.len() > 8, "{modes:?}");
    assert!(modes.values().all(|mode| *mode == 2), "a thread without a filter: {modes:?}");
    let privileges = fields(&running, "NoNewPrivs");
    assert!(privileges.values().all(|held| *held == 1), "{privileges:?}");
    let filters = fields(&running, "Seccomp_filters");
    for (name, filters) in &filters {
        let narrow = ["vcpu", "timers", "translator", "memory", "io"]
            .iter()
            .any(|kind| name.starts_with(kind));
        // This test may itself be in a sandbox, whose filters are inherited.
        let more = filters - filters_around_the_tests();
        assert_eq!(more, if narrow { 3 } else { 2 }, "{name}");
    }
    for name in ["vcpu0", "vcpu1", "io0", "io1", "timers", "signals", "lguest", "disk0"] {
        assert!(filters.contains_key(name), "no {name} in {filters:?}");
    }
}

/// How many filters there are around the tests.
fn filters_around_the_tests() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"));
    line.map_or(0, |count| count.trim().parse().unwrap())
}

#[test]
fn off_is_off_and_log_is_a_filter() {
    let place = tempfile::tempdir().unwrap();
    let here = filters_around_the_tests();
    for (choice, filters) in [("off", 0), ("log", 1), ("on", 2)] {
        fs::remove_file(place.path().join("disk")).ok();
        let running = started(echo(&place, &["--seccomp", choice]));
        let found = fields(&running, "Seccomp_filters");
        assert_eq!(found["lguest"] - here, filters, "--seccomp {choice}");
    }
}

/// A host that knows no filters, or a container whose policy forbids them: to the program it is
/// `seccomp` that fails.
fn host_without_filters(run: Run) -> Running {
    let calls = [(libc::SYS_seccomp, Vec::new())].into_iter().collect();
    let fails = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, fails, TargetArch::x86_64);
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    let mut command = run.command();
    // SAFETY: between fork and exec only two system calls are made, on memory made before.
    unsafe {
        command.pre_exec(move || {
            seccompiler::apply_filter(&program).map_err(|_| std::io::ErrorKind::Other.into())
        })
    };
    Running::of(command.stdin(Stdio::piped()))
}

#[test]
fn a_host_without_filters_is_one_warning() {
    let place = tempfile::tempdir().unwrap();
    let mut running = host_without_filters(echo(&place, &[]));
    running.type_in(b"ready");
    running.wait_for("ready");
    running.send(Signal::TERM);
    let mut finished = running.finish();
    finished.assert_status(143);
    let (first, rest) = finished.messages.split_once('\n').unwrap();
    assert!(first.contains(" WARN ") && first.contains("--seccomp off"), "{first}");
    assert!(first.contains("Operation not permitted"), "{first}");
    finished.messages = rest.to_owned();
    finished.assert_one_line("ended by signal 15");
}

#[test]
fn a_filter_asked_for_by_name_is_had_or_the_guest_does_not_run() {
    let place = tempfile::tempdir().unwrap();
    for choice in ["on", "log"] {
        fs::remove_file(place.path().join("disk")).ok();
        let finished = host_without_filters(echo(&place, &["--seccomp", choice])).finish();
        finished.assert_status(2);
        finished.assert_one_line("give --seccomp off");
        assert_eq!(finished.console, "");
    }
    let finished = host_without_filters(Run::bare().arguments(&["--seccomp", "perhaps"])).finish();
    finished.assert_status(2);
    finished.assert_one_line("perhaps");
}

/// SIGSYS from elsewhere is a signal like others.
#[test]
fn a_signal_of_that_number_from_outside_is_not_called_a_violation() {
    let place = tempfile::tempdir().unwrap();
    let running = started(echo(&place, &[]));
    running.send(Signal::SYS);
    let finished = running.finish();
    finished.assert_status(159);
    finished.assert_one_line("ended by signal 31");
}
