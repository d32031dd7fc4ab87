//! Locks on images, so that nobody writes what another guest uses.
//!
//! They are the locks QEMU takes, so each sees the other: one byte per right that somebody
//! has, and one per right that he grants nobody else, all locked *shared*. Whoever comes
//! locks his bytes first and looks at the opposite ones then, so of two that come at once
//! at least one sees the other. Locks belong to the open file description: they conflict
//! within one process as well, and the kernel drops them when the last descriptor closes,
//! however the process ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// First byte for rights held (QEMU, `docs/devel/blockdev` and `block/file-posix`).
const HELD: i64 = 100;
/// First byte for rights not granted to others.
const DENIED: i64 = 200;

/// QEMU's numbers of rights.
const READ_CONSISTENT: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Reading, together with others that only read.
    Read,
    /// Reading and writing, alone.
    Write,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locked {
    /// The file is ours for that purpose, until it is closed.
    Granted,
    /// Somebody else uses it in a way that does not go together.
    InUse,
}

/// Locks `file`, which is open for reading at least, for as long as it is open.
///
/// # Errors
/// The file system has no locks.
pub(super) fn lock(file: &File, purpose: Purpose) -> io::Result<Locked> {
    let held: &[i64] = match purpose {
        Purpose::Read => &[READ_CONSISTENT],
        Purpose::Write => &[READ_CONSISTENT, WRITE, RESIZE],
    };
    let denied = [WRITE, RESIZE];
    let bytes = |first: i64, rights: &[i64]| -> Vec<i64> {
        rights.iter().map(|right| first.saturating_add(*right)).collect()
    };
    for byte in bytes(HELD, held).into_iter().chain(bytes(DENIED, &denied)) {
        if !share(file, byte)? {
            return Ok(Locked::InUse);
        }
    }
    for byte in bytes(DENIED, held).into_iter().chain(bytes(HELD, &denied)) {
        if is_locked_by_others(file, byte)? {
            return Ok(Locked::InUse);
        }
    }
    Ok(Locked::Granted)
}

/// Locks one byte together with others. `false`: somebody has it alone.
fn share(file: &File, byte: i64) -> io::Result<bool> {
    match command(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn is_locked_by_others(file: &File, byte: i64) -> io::Result<bool> {
    let found = command(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn command(file: &File, command: i32, kind: i32, byte: i64) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        // Three small constants, which fit.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the commands used read and write one `flock`,
    // which is ours and complete.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(lock) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = open(file.path());
        assert_eq!(lock(&first, Purpose::Read).unwrap(), Locked::Granted);
        let second = open(file.path());
        assert_eq!(lock(&second, Purpose::Read).unwrap(), Locked::Granted);
        assert_eq!(lock(&open(file.path()), Purpose::Write).unwrap(), Locked::InUse);
        drop((first, second));
        let writer = open(file.path());
        assert_eq!(lock(&writer, Purpose::Write).unwrap(), Locked::Granted);
        assert_eq!(lock(&open(file.path()), Purpose::Write).unwrap(), Locked::InUse);
        assert_eq!(lock(&open(file.path()), Purpose::Read).unwrap(), Locked::InUse);
        drop(writer);
        assert_eq!(lock(&open(file.path()), Purpose::Write).unwrap(), Locked::Granted);
    }
}
