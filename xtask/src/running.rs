//! A guest at work, watched through its console.
//!
//! What it and its monitor print comes line by line, each with the time it was complete. The
//! process ends with the value.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// What the guest's /init says at the end of a mode that checks something.
const PASSED: &str = "init: all checks passed";
/// How many lines an error quotes.
const QUOTED: usize = 12;
/// How often an end is looked for.
const POLL: Duration = Duration::from_millis(10);
/// How long powering off may take.
const POWER_OFF: Duration = Duration::from_secs(30);

/// A line, and when it was complete.
type Line = (Instant, String);

/// A process with a guest in it.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    name: String,
    lines: Receiver<Line>,
    said: Vec<String>,
}

impl Running {
    /// Starts `command`, whose guest has its console on stdout. `name` is for messages.
    pub(crate) fn start(mut command: Command, name: &str) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let (send, lines) = mpsc::channel();
        let stderr = child.stderr.take().context("no stderr")?;
        let stdout = child.stdout.take().context("no stdout")?;
        read_lines(stderr, send.clone());
        read_lines(stdout, send);
        Ok(Self { child, name: name.to_owned(), lines, said: Vec::new() })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All lines so far that contain `words`.
    pub(crate) fn said<'a>(&'a self, words: &'a str) -> impl Iterator<Item = &'a str> {
        self.said.iter().map(String::as_str).filter(move |line| line.contains(words))
    }

    /// The next line that is there by `deadline`. `None`: there is none, or there will be none.
    pub(crate) fn next_line(&mut self, deadline: Instant) -> Option<Line> {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = self.lines.recv_timeout(left).ok()?;
        self.said.push(line.1.clone());
        Some(line)
    }

    /// Waits for a line that `wanted` makes something of.
    ///
    /// # Errors
    /// None comes in time; or the guest ends, or says that one of its checks has failed.
    pub(crate) fn wait_for<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<(Instant, T)> {
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            match self.lines.recv_timeout(left) {
                Ok((time, line)) => {
                    let found = wanted(&line);
                    let failed = line.contains("init: FAIL");
                    self.said.push(line);
                    if let Some(found) = found {
                        return Ok((time, found));
                    }
                    if failed {
                        // What it has to say about it may still come.
                        while self.next_line(Instant::now() + Duration::from_secs(1)).is_some() {}
                        bail!("{}: a check failed{}", self.name, self.quote());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{}: no {what} within {limit:?}{}", self.name, self.quote())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{}: it ended without {what}{}", self.name, self.quote())
                }
            }
        }
    }

    /// Waits for the end of a job: all checks passed, powered off.
    pub(crate) fn finish(&mut self, limit: Duration) -> Result<()> {
        let verdict = |line: &str| line.ends_with(PASSED).then_some(());
        self.wait_for("verdict", limit, verdict)?;
        self.end()
    }

    /// Waits until it has ended by itself, and well.
    pub(crate) fn end(&mut self) -> Result<()> {
        let end = Instant::now() + POWER_OFF;
        while self.next_line(end).is_some() {}
        // Its console is closed a little before it ends.
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("{}: it ended with {status}{}", self.name, self.quote()),
                None if Instant::now() < end => thread::sleep(POLL),
                None => bail!("{}: it does not power off{}", self.name, self.quote()),
            }
        }
    }

    /// Whether it is no more. There may still be lines of it.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Kills it, and takes note of what it had said until then.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        while let Ok((_, line)) = self.lines.recv_timeout(POWER_OFF) {
            self.said.push(line);
        }
        Ok(())
    }

    /// Its last words, for an error.
    pub(crate) fn quote(&self) -> String {
        let first = self.said.len().saturating_sub(QUOTED);
        let last = self.said.iter().skip(first);
        last.fold("; it said last:".to_owned(), |all, line| format!("{all}\n    {line}"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(from: impl Read + Send + 'static, to: Sender<Line>) {
    thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if to.send((Instant::now(), text)).is_err() {
                return;
            }
            line.clear();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Running::start(command, "sh").unwrap()
    }

    #[test]
    fn a_verdict_and_an_exit_status_make_a_success() {
        let mut good = shell("echo init: PASS x; echo init: all checks passed");
        good.finish(SOON).unwrap();
        assert_eq!(good.said("PASS").count(), 1);
        assert!(shell("echo init: all checks passed; exit 3").finish(SOON).is_err());
        assert!(shell("echo init: 1 checks failed").finish(SOON).is_err());
        assert!(shell("echo init: PASS x").finish(SOON).is_err());
    }

    #[test]
    fn a_failed_check_is_quoted() {
        let error = shell("echo init: FAIL x; echo why; sleep 60").finish(SOON).unwrap_err();
        assert!(error.to_string().ends_with("    init: FAIL x\n    why"), "{error}");
    }

    #[test]
    fn what_was_said_before_the_end_is_known_after_it() {
        let mut killed = shell("for n in 1 2 3; do echo durable $n; done; sleep 60");
        killed.wait_for("durable 1", SOON, |line| (line == "durable 1").then_some(())).unwrap();
        thread::sleep(Duration::from_millis(50));
        killed.kill().unwrap();
        assert!(killed.said("durable").count() >= 1);
    }
}
