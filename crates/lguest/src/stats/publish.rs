//! The file in which a run publishes its statistics, for as long as it lives.
//!
//! It lies in a folder that is the user's alone, and is locked by the run: whoever gets the
//! lock knows that the run is over, however it ended, and may take the file away. Numbers
//! are written, not mapped, so that nobody who cuts the file can hurt the run.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use softcpu::Stats;

use super::record::{Header, Row};

/// What the name of such a file ends in; before it stands the process's number.
const SUFFIX: &str = ".stats";

/// A run's file. Removed when dropped.
#[derive(Debug)]
pub(super) struct Published {
    file: File,
    path: PathBuf,
}

impl Published {
    /// Creates the file of this process.
    ///
    /// # Errors
    /// There is no place for it that is the user's alone.
    pub(super) fn create(header: &Header) -> io::Result<Self> {
        let folder = folder()?;
        make_ours(&folder)?;
        Self::create_in(&folder, std::process::id(), header)
    }

    fn create_in(folder: &Path, process: u32, header: &Header) -> io::Result<Self> {
        let path = folder.join(format!("{process}{SUFFIX}"));
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let create = || rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR);
        let file = match create() {
            // The file of a process that had our number, and did not end well.
            Err(rustix::io::Errno::EXIST) if is_over(&open(&path)?) => {
                std::fs::remove_file(&path)?;
                create()?
            }
            created => created?,
        };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let file = File::from(file);
        file.write_all_at(&header.to_bytes(), 0)?;
        Ok(Self { file, path })
    }

    /// Writes what `vcpu` did.
    pub(super) fn update(&self, vcpu: usize, stats: &Stats) {
        // A full disk is no reason to bother anybody: the numbers stay old.
        let _ = self.file.write_all_at(&Row::of(stats).to_bytes(), Header::place(vcpu));
    }

    /// The run is over: takes the file away, if nobody has.
    pub(super) fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A file that was found, and whose it is.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) process: u32,
    pub(super) file: File,
}

/// The files of all runs of this user that go on. Those of others are removed.
///
/// # Errors
/// The folder cannot be read.
pub(super) fn runs() -> io::Result<Vec<Found>> {
    let folder = folder()?;
    match is_ours(&folder) {
        Ok(()) => runs_in(&folder),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn runs_in(folder: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(process) = name.and_then(|name| name.strip_suffix(SUFFIX)?.parse().ok()) else {
            continue;
        };
        // It may just have ended.
        let Ok(file) = open(&path) else { continue };
        if is_over(&file) {
            let _ = std::fs::remove_file(&path);
        } else {
            found.push(Found { process, file });
        }
    }
    found.sort_by_key(|found| found.process);
    Ok(found)
}

/// Opens one that is there, without waiting for whatever somebody may have put there.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Whether the run whose file this is has ended.
fn is_over(file: &File) -> bool {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockShared).is_ok()
}

/// Where this user's files are.
fn folder() -> io::Result<PathBuf> {
    if let Some(runtime) = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty()) {
        return Ok(Path::new(&runtime).join("lguest"));
    }
    Ok(format!("/tmp/lguest-{}", rustix::process::geteuid().as_raw()).into())
}

fn make_ours(folder: &Path) -> io::Result<()> {
    match rustix::fs::mkdir(folder, Mode::RWXU) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => is_ours(folder),
        Err(error) => Err(error.into()),
    }
}

/// Anybody may have made a folder in /tmp: this one must be ours, and closed to others.
fn is_ours(folder: &Path) -> io::Result<()> {
    let stat = rustix::fs::statat(rustix::fs::CWD, folder, AtFlags::SYMLINK_NOFOLLOW)?;
    let is_folder = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir();
    let ours = stat.st_uid == rustix::process::geteuid().as_raw();
    if is_folder && ours && stat.st_mode & 0o077 == 0 {
        return Ok(());
    }
    let what = format!("{} is not a folder of yours alone: remove it", folder.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
}

#[cfg(test)]
mod tests {
    use super::super::record::{self, Field};
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_run_is_found_while_it_lives_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let published = Published::create_in(folder.path(), 7, &Header::new("k", 1, 0)).unwrap();
        let mut stats = Stats::default();
        stats.engine.decoded = 5;
        published.update(0, &stats);
        let found = runs_in(folder.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].process, 7);
        let mut bytes = vec![0; 4096];
        let len = found[0].file.read_at(&mut bytes, 0).unwrap();
        let (_, rows) = record::read(&bytes[..len]).unwrap();
        assert_eq!(rows[0].get(Field::Decoded), 5);
        let mode = found[0].file.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(published);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_crashed_runs_left_is_taken_away_or_over() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["7.stats", "8.stats", "other", "x.stats"] {
            std::fs::write(folder.path().join(name), "left").unwrap();
        }
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("9.stats")).unwrap();
        let header = Header::new("k", 1, 0);
        let mine = Published::create_in(folder.path(), 8, &header).unwrap();
        let found = runs_in(folder.path()).unwrap();
        assert_eq!(found.iter().map(|found| found.process).collect::<Vec<_>>(), [8]);
        assert!(!folder.path().join("7.stats").exists());
        assert!(folder.path().join("other").exists());
        // That of a run which lives is not taken over.
        assert!(Published::create_in(folder.path(), 8, &header).is_err());
        drop(mine);
    }

    #[test]
    fn a_folder_that_others_may_enter_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("lguest");
        make_ours(&inner).unwrap();
        std::fs::set_permissions(&inner, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(make_ours(&inner).unwrap_err().to_string().contains("remove it"));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        assert!(make_ours(&link).is_err());
    }
}
