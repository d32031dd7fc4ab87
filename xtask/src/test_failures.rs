//! Running tests, and keeping what the failed ones said.
//!
//! A whole check prints thousands of lines. Whoever reads it afterwards, maybe in a log that
//! keeps only the end, wants to know what failed and why: `cargo verify` repeats that last.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// How many lines of one test binary's failures are kept.
const KEPT: usize = 120;

/// What libtest prints before the output of failed tests, and after the list of their names.
const BEGIN: &str = "failures:";
const END: &str = "test result: FAILED";

/// Runs tests with their output shown as it comes.
///
/// # Errors
/// Some failed: the error has what they printed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let shown = format!("{command:?}");
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {shown}"))?;
    let stdout = child.stdout.take().context("no stdout")?;
    let mut failures = Failures::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("what the tests print")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        failures.read(&line);
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{status}\n{}", failures.kept.join("\n"));
    }
    Ok(())
}

/// The part of libtest's output that is about failures.
#[derive(Default, Debug)]
struct Failures {
    kept: Vec<String>,
    /// Lines of the section we are in, if we are in one.
    section: Option<usize>,
}

impl Failures {
    fn read(&mut self, line: &str) {
        if self.section.is_none() && line == BEGIN {
            self.section = Some(0);
        }
        let Some(lines) = &mut self.section else { return };
        if *lines < KEPT || line.starts_with(END) {
            self.kept.push(line.to_owned());
        }
        *lines += 1;
        if line.starts_with(END) {
            self.section = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
test fine ... ok
test broken ... FAILED

failures:

---- broken stdout ----
thread 'broken' panicked at src/lib.rs:1:1:
oh no


failures:
    broken

test result: FAILED. 1 passed; 1 failed
test other ... ok
test result: ok. 1 passed";

    #[test]
    fn only_failures_are_kept() {
        let mut failures = Failures::default();
        OUTPUT.lines().for_each(|line| failures.read(line));
        assert_eq!(failures.kept.first().map(String::as_str), Some("failures:"));
        assert!(failures.kept.iter().any(|line| line == "oh no"));
        assert!(failures.kept.last().is_some_and(|line| line.starts_with(END)));
        assert!(!failures.kept.iter().any(|line| line.ends_with("... ok")));
    }

    #[test]
    fn a_chatty_failure_is_cut() {
        let mut failures = Failures::default();
        failures.read(BEGIN);
        (0..10_000).for_each(|_| failures.read("again"));
        failures.read("test result: FAILED.");
        assert_eq!(failures.kept.len(), KEPT + 1);
    }

    #[test]
    fn the_error_has_the_failures() {
        let script = format!("printf '{}\\n'; exit 101", OUTPUT.replace('\'', "'\\''"));
        let error = run(Command::new("sh").args(["-c", &script])).unwrap_err();
        assert!(error.to_string().contains("oh no"));
        assert!(run(Command::new("true").arg("")).is_ok());
    }
}
