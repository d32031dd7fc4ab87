//! Logs and complaints: everything the Launcher itself says goes to stderr, through here.
//!
//! While the terminal is raw, a line feed does not return the carriage, so lines are ended
//! with both; the guest's console on stdout is never touched by this.

use crate::{Error, terminal};
use std::io::{self, Write};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::time::uptime;

/// Starts the log: warnings only, `-v` what lguest does, `-vv` and `-vvv` more detail.
pub(crate) fn start(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_timer(uptime())
        .with_ansi(false)
        .with_target(verbose > 1)
        .with_writer(Stderr::default)
        .init();
}

/// Says why the program ends, in one line.
pub(crate) fn complain(error: &Error) {
    say(&format!("{error}"));
}

/// Says one line to the user, whatever the log level.
pub(crate) fn say(line: &str) {
    let line = line.trim_end().replace('\n', " ");
    // With stderr gone there is nobody left to tell.
    let _ = Stderr.write_all(format!("lguest: {line}\n").as_bytes());
}

/// Stderr, with line ends that also work on a raw terminal.
#[derive(Debug, Default)]
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if terminal::is_raw() {
            stderr.write_all(&with_carriage_returns(bytes))?;
        } else {
            stderr.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn with_carriage_returns(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len().saturating_add(2));
    for &byte in bytes {
        if byte == b'\n' {
            out.push(b'\r');
        }
        out.push(byte);
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn line_feeds_return_the_carriage() {
        assert_eq!(super::with_carriage_returns(b"a\nb\n"), b"a\r\nb\r\n");
    }
}
