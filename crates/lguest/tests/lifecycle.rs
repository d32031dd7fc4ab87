//! How runs begin and end: exit statuses, signals, the console's input, with guests of a few
//! bytes.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use rustix::process::Signal;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use support::{Finished, Run, tiny};

/// A run of a tiny kernel, in a directory that goes away with it.
fn run(code: &[u8], words: &[&str]) -> (tempfile::TempDir, Run) {
    let place = tempfile::tempdir().unwrap();
    let kernel = tiny::kernel(place.path(), code);
    let run = Run::bare().path("--kernel", &kernel).arguments(&["--mem", "32M"]).arguments(words);
    (place, run)
}

fn finish(code: &[u8], words: &[&str]) -> Finished {
    let (_place, run) = run(code, words);
    run.finish()
}

#[test]
fn a_debug_exit_is_twice_the_value_plus_one() {
    let finished = finish(tiny::DEBUG_EXIT, &["--debug-exit"]);
    finished.assert_status(33);
    assert_eq!(finished.messages, "");
}

#[test]
fn without_the_option_there_is_no_debug_exit() {
    finish(tiny::DEBUG_EXIT, &["--timeout", "0.5"]).assert_status(124);
}

#[test]
fn a_reset_has_its_status() {
    let finished = finish(tiny::RESET, &["--timeout", "20"]);
    finished.assert_status(5);
    finished.assert_one_line("reset");
}

#[test]
fn a_triple_fault_has_its_status() {
    let finished = finish(tiny::TRIPLE_FAULT, &["--timeout", "20"]);
    finished.assert_status(4);
    finished.assert_one_line("triple fault");
}

#[test]
fn the_timeout_has_its_status() {
    let finished = finish(tiny::SLEEP, &["--timeout", "0.2"]);
    finished.assert_status(124);
    finished.assert_one_line("--timeout");
}

#[test]
fn several_vcpus_end_together() {
    finish(tiny::SLEEP, &["--timeout", "0.2", "--cpus", "8"]).assert_status(124);
}

#[test]
fn signals_end_a_run_with_their_number() {
    for (signal, status) in
        [(Signal::HUP, 129), (Signal::INT, 130), (Signal::QUIT, 131), (Signal::TERM, 143)]
    {
        let (_place, run) = run(tiny::ECHO, &["--timeout", "60"]);
        let mut running = run.start_with(Stdio::piped());
        running.type_in(b"ready");
        running.wait_for("ready");
        running.send(signal);
        let finished = running.finish();
        finished.assert_status(status);
        finished.assert_one_line(&format!("signal {}", status - 128));
    }
}

#[test]
fn a_signal_shows_the_vcpus_and_the_guest_goes_on() {
    let (_place, run) = run(tiny::ECHO, &["--timeout", "60", "--cpus", "2"]);
    let mut running = run.start_with(Stdio::piped());
    running.type_in(b"before");
    running.wait_for("before");
    running.send(Signal::USR1);
    running.type_in(b"after");
    running.wait_for("beforeafter");
    running.wait_for_message("vcpu 1");
    running.send(Signal::TERM);
    let finished = running.finish();
    finished.assert_status(143);
    assert!(finished.messages.contains("rip 0x"), "{}", finished.messages);
}

/// What is typed arrives complete and in order; with no terminal, Ctrl-A is a byte like others.
#[test]
fn input_from_a_pipe_is_passed_on_as_it_is() {
    let (_place, run) = run(tiny::ECHO, &["--timeout", "60"]);
    let mut running = run.start_with(Stdio::piped());
    let sent: String = (0..2000).map(|n| format!("{n} ")).collect();
    running.type_in(sent.as_bytes());
    running.type_in(b"\x01x end");
    running.wait_for(&format!("{sent}\x01x end"));
}

#[test]
fn the_end_of_the_input_is_not_the_end_of_the_guest() {
    let (_place, run) = run(tiny::ECHO, &["--timeout", "1"]);
    let finished = run.start().finish();
    finished.assert_status(124);
}

#[test]
fn the_log_names_the_engine_when_asked() {
    let finished = finish(tiny::SLEEP, &["--timeout", "0.2", "-v"]);
    assert!(finished.messages.contains("engine=soft"), "{}", finished.messages);
    assert!(finished.messages.contains("INFO"), "{}", finished.messages);
}

/// An idle machine with several vCPUs costs next to nothing.
#[test]
fn halted_vcpus_use_no_processor_time() {
    let (_place, run) = run(tiny::SLEEP, &["--timeout", "60"]);
    let running = run.start();
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", running.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    thread::sleep(Duration::from_secs(1));
    let before = ticks();
    thread::sleep(Duration::from_secs(2));
    // 2 % of two seconds, in hundredths of a second.
    assert!(ticks() - before <= 4, "{} ticks in two seconds", ticks() - before);
}
