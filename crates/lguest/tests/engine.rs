//! Looking at the engine while it runs, and tuning it: statistics, `lguest top`, maps for
//! perf, little code memory, the verifier.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use support::{Run, tiny};

/// The cells of the row of a report that begins with `name`.
#[track_caller]
fn cells(report: &str, name: &str) -> Vec<f64> {
    let rows = || report.lines().filter_map(|line| line.strip_prefix("lguest: "));
    let row = rows().find_map(|row| row.trim_start().strip_prefix(name));
    let row = row.unwrap_or_else(|| panic!("no {name} in\n{report}"));
    row.split_whitespace().filter_map(|cell| cell.parse().ok()).collect()
}

/// `lguest top` with these words, for guests whose statistics are in `folder`.
fn top(folder: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lguest"));
    command.arg("top").args(words).env("XDG_RUNTIME_DIR", folder).output().unwrap()
}

#[test]
fn top_shows_guests_while_they_run() {
    let place = tempfile::tempdir().unwrap();
    let kernel = tiny::kernel(place.path(), tiny::ECHO);
    let run = Run::bare().path("--kernel", &kernel).arguments(&["--mem", "32M", "--cpus", "2"]);
    let mut running = run.env("XDG_RUNTIME_DIR", place.path()).start_with(Stdio::piped());
    running.type_in(b"ready");
    running.wait_for("ready");
    let text = |words: &[&str]| String::from_utf8(top(place.path(), words).stdout).unwrap();
    let pid = running.pid().to_string();
    let all = text(&[]);
    assert!(all.contains(&format!(" {pid} ")) && all.contains("2 vCPUs, 32 MiB"), "{all}");
    assert_eq!(text(&[&pid]).lines().count(), 3);
    // Whoever cuts or fills a file hurts nobody.
    let file = place.path().join(format!("lguest/{pid}.stats"));
    for contents in [&b""[..], b"lgstats\n", &[0xff; 100_000]] {
        fs::write(&file, contents).unwrap();
        assert!(text(&[]).contains("no statistics of a run"));
    }
    running.type_in(b" on");
    running.wait_for("ready on");
    running.kill();
    // It could not take its file away; whoever looks does.
    assert_eq!(text(&[]), "no guest of yours is running\n");
    assert!(!file.exists());
    let nobody = top(place.path(), &["1"]);
    assert_eq!(nobody.status.code(), Some(2));
    assert!(String::from_utf8(nobody.stderr).unwrap().contains("lguest top"));
}

#[test]
fn a_run_that_ends_leaves_no_statistics_and_reports_when_asked() {
    let place = tempfile::tempdir().unwrap();
    let kernel = tiny::kernel(place.path(), tiny::SLEEP);
    let run = Run::bare().path("--kernel", &kernel).env("XDG_RUNTIME_DIR", place.path());
    let finished = run.arguments(&["--mem", "32M", "--timeout", "0.5", "--stats"]).finish();
    finished.assert_status(124);
    assert_eq!(fs::read_dir(place.path().join("lguest")).unwrap().count(), 0);
    assert!(cells(&finished.messages, "halted")[0] > 50.0, "{}", finished.messages);
}

/// A boot in the least code memory, each translation looked at; what it was is in the report.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_boot_in_little_code_memory_is_reported() {
    let run = Run::of("debian12-cloud", "test").append("lguest.cpus=2 lguest.mem=512");
    let words = ["--cpus", "2", "--stats", "--code-cache", "1M", "--verify-translations"];
    let running = run.arguments(&words).arguments(&["--perf-map"]).start();
    let map = format!("/tmp/perf-{}.map", running.pid());
    let finished = running.finish();
    let names = fs::read_to_string(&map).unwrap();
    fs::remove_file(map).unwrap();
    finished.assert_status(0);
    finished.assert_console("init: all checks passed");
    finished.assert_quiet_log();
    let report = &finished.messages;
    let all = |name| cells(report, name)[2];
    assert!(all("evicted: no room") > 5000.0, "{report}");
    // A host that is busy makes them longer than they are.
    assert!(all("longest pause, ms") < 1000.0, "{report}");
    assert!(all("in use, KiB") <= 2048.0, "{report}");
    let (translated, decoded) = (all("translated "), all("blocks decoded"));
    assert!(translated > 10_000.0 && decoded > translated / 10.0, "{report}");
    assert!(all("translated code entered") > translated, "{report}");
    let spare = std::thread::available_parallelism().is_ok_and(|all| all.get() > 1);
    assert_eq!(all("beside the vCPU") > 1000.0, spare, "{report}");
    assert!(all("interrupts") > 10.0 && all("exceptions") > 100.0, "{report}");
    let times = ["in translated code", "interpreter, for it", "interpreter, cold code", "decoding"];
    let times = times.into_iter().chain(["translating", "halted", "outside"]);
    let shares: f64 = times.map(all).sum();
    assert!((99.0..101.0).contains(&shares), "{shares} % in\n{report}");
    // Every translation has a name, and each of the two CPUs has thunks.
    assert_eq!(names.lines().count() as f64, translated + all("moved elsewhere") + 2.0);
    assert!(names.lines().skip(2).all(|line| line.contains(" guest:0x")));
}

/// A boot whose code is taken for changed all the time, and translated by whoever runs it.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_boot_whose_translations_become_stale_again_and_again_is_as_any_other() {
    let run = Run::of("debian12-cloud", "test").append("lguest.cpus=2 lguest.mem=512");
    let words = ["--cpus", "2", "--stats", "--invalidate", "1000,3", "--verify-translations"];
    let finished = run.arguments(&words).arguments(&["--translate-inline"]).finish();
    finished.assert_status(0);
    finished.assert_console("init: all checks passed");
    finished.assert_quiet_log();
    let all = |name| cells(&finished.messages, name)[2];
    let (dropped, translated) = (all("dropped: code changed"), all("translated "));
    assert!(dropped > 10_000.0 && dropped > translated / 3.0, "{}", finished.messages);
    assert_eq!(all("beside the vCPU"), 0.0, "{}", finished.messages);
}
