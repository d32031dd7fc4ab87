//! Host errors in the log: one line each, and few of them.
//!
//! The guest hears of an error as an I/O error, the user by a line here. A guest may make
//! errors as fast as it likes, so of each operation the first is logged, and then one every
//! few seconds with the number of those left out.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The least time between two lines about one operation.
const PAUSE: Duration = Duration::from_secs(5);

/// What was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

const OPERATIONS: usize = 5;

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write zeroes",
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Quiet {
    since: Instant,
    left_out: u64,
}

/// The errors of one disk.
#[derive(Debug)]
pub(super) struct ErrorLog {
    path: PathBuf,
    quiet: Mutex<[Option<Quiet>; OPERATIONS]>,
}

impl ErrorLog {
    pub(super) const fn new(path: PathBuf) -> Self {
        Self { path, quiet: Mutex::new([None; OPERATIONS]) }
    }

    /// Logs that `operation` at byte `offset` failed, unless the like was logged just now.
    pub(super) fn report(&self, operation: Operation, offset: u64, reason: &io::Error) {
        if let Some(left_out) = self.admit(operation, Instant::now()) {
            tracing::warn!("{}", self.line(operation, offset, reason, left_out));
        }
    }

    fn line(&self, operation: Operation, offset: u64, reason: &io::Error, left_out: u64) -> String {
        let path = self.path.display();
        let more = if left_out == 0 {
            String::new()
        } else {
            format!(" ({left_out} such errors before it were not logged)")
        };
        match operation {
            Operation::Flush => format!("{path}: cannot flush: {reason}{more}"),
            _ => format!("{path}: cannot {operation} at byte {offset}: {reason}{more}"),
        }
    }

    /// Whether to log an error now, and how many were not.
    fn admit(&self, operation: Operation, now: Instant) -> Option<u64> {
        let mut quiet = self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = quiet.get_mut(operation as usize)?;
        match slot {
            Some(quiet) if now.saturating_duration_since(quiet.since) < PAUSE => {
                quiet.left_out = quiet.left_out.saturating_add(1);
                None
            }
            _ => Some(slot.replace(Quiet { since: now, left_out: 0 }).map_or(0, |q| q.left_out)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_errors_is_a_line_now_and_then() {
        let log = ErrorLog::new("disk.img".into());
        let start = Instant::now();
        let at = |operation, seconds| log.admit(operation, start + Duration::from_secs(seconds));
        assert_eq!(at(Operation::Write, 0), Some(0));
        assert_eq!(at(Operation::Write, 1), None);
        assert_eq!(at(Operation::Read, 1), Some(0));
        assert_eq!(at(Operation::Write, 4), None);
        assert_eq!(at(Operation::Write, 5), Some(2));
        assert_eq!(at(Operation::Write, 9), None);
        assert_eq!(at(Operation::Write, 99), Some(1));
    }

    #[test]
    fn a_line_names_file_operation_offset_and_reason() {
        let log = ErrorLog::new("disk.img".into());
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let line = log.line(Operation::Write, 4096, &full, 0);
        assert_eq!(
            line,
            "disk.img: cannot write at byte 4096: No space left on device (os error 28)"
        );
        assert!(log.line(Operation::Flush, 0, &full, 7).contains("(7 such errors"));
    }
}
