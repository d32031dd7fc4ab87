//! A file or block device of the host, as imago's formats want their storage.
//!
//! Opened, checked and locked here, once, for every image and every image behind it. It
//! differs from imago's own in what a hypervisor needs: it holds the lock, it tells a file
//! that became shorter from one that has a hole, and it never opens anything by itself.
//! All system calls that take guest memory's addresses are in this file.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::{AtFlags, FallocateFlags, StatxFlags};

use super::error::DiskError;
use super::lock::{Locked, Purpose, lock};

/// What Linux takes in one vectored call.
const MAX_VECTORS: usize = libc::UIO_MAXIOV as usize;
/// What direct I/O needs where the host does not say.
const SAFE_ALIGN: usize = 4096;
/// The sector size of old, and the least one.
const SECTOR: usize = 512;

/// How a file is to be opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub(super) purpose: Purpose,
    /// Past the page cache.
    pub(super) direct: bool,
}

/// Where reads and writes may begin and end, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alignment {
    /// In memory.
    memory: usize,
    /// In the file.
    file: usize,
    /// For holes.
    hole: usize,
}

/// An open, locked file or block device.
#[derive(Debug)]
pub(super) struct HostFile {
    file: File,
    path: PathBuf,
    /// A block device's size, which stays.
    device_size: Option<u64>,
    /// Bytes up to here are the disk's: their lack is an error. Beyond, nothing is zeroes.
    disk_end: u64,
    align: Alignment,
    /// The file system cannot write without waiting.
    writes_wait: AtomicBool,
    /// Why an earlier sync failed, as `errno`, or 0.
    lost: AtomicI32,
    helper: CommonStorageHelper,
}

impl HostFile {
    /// Opens and locks `path`.
    ///
    /// # Errors
    /// [`DiskError`].
    pub(super) fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let writable = access.purpose == Purpose::Write;
        let failed = |reason: io::Error| open_error(path, writable, reason);
        let is_device = std::fs::metadata(path).map_err(failed)?.file_type().is_block_device();
        // NONBLOCK: a pipe must be refused, not waited for. On files it means nothing.
        let mut flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
        if is_device && writable {
            // Linux refuses this while the device is mounted.
            flags |= libc::O_EXCL;
        }
        if access.direct {
            flags |= libc::O_DIRECT;
        }
        let file = File::options().read(true).write(writable).custom_flags(flags).open(path);
        let file = match file {
            Ok(file) => file,
            Err(reason) if access.direct && reason.raw_os_error() == Some(libc::EINVAL) => {
                return Err(DiskError::Direct { path: path.to_owned(), reason });
            }
            Err(reason) => return Err(failed(reason)),
        };
        Self::from_file(file, path, access)
    }

    /// Checks and locks a file that is open already.
    ///
    /// # Errors
    /// [`DiskError`].
    pub(super) fn from_file(file: File, path: &Path, access: Access) -> Result<Self, DiskError> {
        let writable = access.purpose == Purpose::Write;
        let failed = |reason: io::Error| open_error(path, writable, reason);
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { path: path.to_owned() });
        }
        match lock(&file, access.purpose) {
            Ok(Locked::Granted) => {}
            Ok(Locked::InUse) => return Err(DiskError::InUse { path: path.to_owned() }),
            Err(reason) => return Err(DiskError::Lock { path: path.to_owned(), reason }),
        }
        let device_size = if kind.is_block_device() {
            Some(
                rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
                    .map_err(|e| failed(e.into()))?,
            )
        } else {
            None
        };
        let align = alignment(&file, access.direct, device_size.is_some());
        Ok(Self {
            file,
            path: path.to_owned(),
            device_size,
            disk_end: 0,
            align,
            writes_wait: AtomicBool::new(false),
            lost: AtomicI32::new(0),
            helper: CommonStorageHelper::default(),
        })
    }

    /// From now on all bytes below `end` must be there: the file is a raw disk.
    pub(super) const fn set_disk_end(&mut self, end: u64) {
        self.disk_end = end;
    }

    /// The size of a sector that the host's device has, if it is a device.
    pub(super) fn device_sector(&self) -> Option<u32> {
        self.device_size?;
        rustix::fs::ioctl_blksszget(&self.file).ok().filter(|size| size.is_power_of_two())
    }

    /// Reads if that needs no waiting, as from the page cache. `false`: it would, and
    /// `vector` holds anything.
    pub(super) fn read_at_once(&self, vector: &IoVectorMut<'_>, offset: u64) -> bool {
        let Some((count, at)) = self.one_call(vector.buffer_count(), offset) else { return false };
        // SAFETY: the pieces are used by one system call while `vector` is borrowed.
        let pieces = unsafe { vector.as_iovec() };
        // SAFETY: as in `pure_readv`, and `count` is their number.
        let done = unsafe {
            let pieces = pieces.as_ptr();
            libc::preadv2(self.file.as_raw_fd(), pieces, count, at, libc::RWF_NOWAIT)
        };
        u64::try_from(done).is_ok_and(|done| done == vector.len())
    }

    /// Writes if that needs no waiting. `false`: it would, and some or nothing is written.
    pub(super) fn write_at_once(&self, vector: &IoVector<'_>, offset: u64) -> bool {
        let Some((count, at)) = self.one_call(vector.buffer_count(), offset) else { return false };
        if self.writes_wait.load(Ordering::Relaxed) {
            return false;
        }
        // SAFETY: the pieces are used by one system call while `vector` is borrowed.
        let pieces = unsafe { vector.as_iovec() };
        // SAFETY: as in `pure_writev`, and `count` is their number.
        let done = unsafe {
            let pieces = pieces.as_ptr();
            libc::pwritev2(self.file.as_raw_fd(), pieces, count, at, libc::RWF_NOWAIT)
        };
        if done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP) {
            self.writes_wait.store(true, Ordering::Relaxed);
        }
        u64::try_from(done).is_ok_and(|done| done == vector.len())
    }

    /// What one system call needs to know, if one can do it. Direct I/O waits by nature.
    fn one_call(&self, pieces: usize, offset: u64) -> Option<(libc::c_int, i64)> {
        let cached = self.align.file == 1 && pieces != 0 && pieces <= MAX_VECTORS;
        cached.then_some((pieces as libc::c_int, i64::try_from(offset).ok()?))
    }

    /// The first bytes, as many as there are.
    pub(super) fn begins_with(&self, magic: &[u8]) -> io::Result<bool> {
        // Aligned and long enough for direct I/O, too.
        let mut buffer = imago::io_buffers::IoBuffer::new(SAFE_ALIGN, SAFE_ALIGN)?;
        let vector: IoVectorMut<'_> = buffer.as_mut().into();
        // SAFETY: offset, length and address are multiples of what any disk needs.
        unsafe { self.pure_readv(vector, 0) }?;
        Ok(buffer.as_ref().into_slice().starts_with(magic))
    }

    fn punch(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, mode, offset, length))
            .map_err(|error| {
                let error = io::Error::from(error);
                match error.raw_os_error() {
                    // "Not on this kind of file", in all its words.
                    Some(libc::EOPNOTSUPP | libc::ENODEV | libc::ENOSYS | libc::ENOTTY) => {
                        io::Error::new(io::ErrorKind::Unsupported, error)
                    }
                    _ => error,
                }
            })
    }
}

fn open_error(path: &Path, writable: bool, reason: io::Error) -> DiskError {
    let path = path.to_owned();
    match reason.raw_os_error() {
        Some(libc::ENOENT) => DiskError::Missing { path },
        Some(libc::EISDIR | libc::ENXIO) => DiskError::NotADisk { path },
        Some(libc::EBUSY) => DiskError::InUseByHost { path },
        _ => DiskError::Open { path, writable, reason },
    }
}

fn alignment(file: &File, direct: bool, device: bool) -> Alignment {
    let block = rustix::fs::fstatfs(file).ok().and_then(|fs| usize::try_from(fs.f_bsize).ok());
    let block = block.filter(|size| size.is_power_of_two()).unwrap_or(SAFE_ALIGN);
    let sector = rustix::fs::ioctl_blksszget(file).ok().and_then(|size| usize::try_from(size).ok());
    let hole = if device { sector.unwrap_or(SAFE_ALIGN) } else { block.min(1 << 16) };
    if !direct {
        return Alignment { memory: 1, file: 1, hole };
    }
    let told = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let (memory, file) = match told {
        Ok(told) if told.stx_dio_mem_align != 0 && told.stx_dio_offset_align != 0 => {
            (told.stx_dio_mem_align as usize, told.stx_dio_offset_align as usize)
        }
        _ => (SAFE_ALIGN, SAFE_ALIGN),
    };
    let sane = |align: usize| if align.is_power_of_two() { align } else { SAFE_ALIGN };
    let file = sane(file).max(SECTOR);
    Alignment { memory: sane(memory), file, hole: hole.max(file) }
}

impl fmt::Display for HostFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

fn off_t(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// What a system call that returns a length has said. `None`: interrupted, try again.
fn length(returned: isize) -> io::Result<Option<u64>> {
    if let Ok(length) = u64::try_from(returned) {
        return Ok(Some(length));
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(None) } else { Err(error) }
}

impl Storage for HostFile {
    fn mem_align(&self) -> usize {
        self.align.memory
    }

    fn req_align(&self) -> usize {
        self.align.file
    }

    fn zero_align(&self) -> usize {
        self.align.hole
    }

    fn discard_align(&self) -> usize {
        self.align.hole
    }

    fn size(&self) -> io::Result<u64> {
        self.device_size.map_or_else(|| Ok(self.file.metadata()?.len()), Ok)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.path.clone())
    }

    unsafe fn pure_readv(&self, mut vector: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        while !vector.is_empty() {
            let at = off_t(offset)?;
            // SAFETY: the pieces are used by one system call while `vector` is borrowed.
            let pieces = unsafe { vector.as_iovec() };
            let count = pieces.len().min(MAX_VECTORS) as libc::c_int;
            // SAFETY: `count` pieces are there, each memory that may be written for as long
            // as `vector` lives. Guest memory among it may be changed by the guest at the
            // same time; the kernel, which writes it, does not mind.
            let done = unsafe { libc::preadv(self.file.as_raw_fd(), pieces.as_ptr(), count, at) };
            let Some(done) = length(done)? else { continue };
            if done == 0 {
                if offset < self.disk_end {
                    let message = "the file has become shorter";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
                }
                vector.fill(0);
                return Ok(());
            }
            vector = vector.split_tail_at(done);
            offset = offset.saturating_add(done);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, mut vector: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        while !vector.is_empty() {
            let at = off_t(offset)?;
            // SAFETY: the pieces are used by one system call while `vector` is borrowed.
            let pieces = unsafe { vector.as_iovec() };
            let count = pieces.len().min(MAX_VECTORS) as libc::c_int;
            // SAFETY: `count` pieces are there, each memory that may be read for as long as
            // `vector` lives. If it is guest memory, the guest may change it meanwhile: then
            // it is the guest's own disk that gets one or the other.
            let done = unsafe { libc::pwritev(self.file.as_raw_fd(), pieces.as_ptr(), count, at) };
            match length(done)? {
                None => {}
                Some(0) => return Err(io::ErrorKind::WriteZero.into()),
                Some(done) => {
                    vector = vector.split_tail_at(done);
                    offset = offset.saturating_add(done);
                }
            }
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // A hole cannot make the file longer. Only qcow2 asks for that, in its metadata.
        let end = offset.saturating_add(length);
        if self.device_size.is_none() && end > self.size()? {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.punch(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.punch(FallocateFlags::ZERO_RANGE, offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.punch(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
    }

    /// There are no buffers here.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // After a failed sync Linux takes the pages for clean, whatever became of them, and
        // the next sync succeeds. What was lost stays lost, so no later one may.
        if let lost @ 1.. = self.lost.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(lost));
        }
        self.file.sync_data().inspect_err(|error| {
            self.lost.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Release);
        })
    }

    /// There are no buffers here.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, preallocate: PreallocateMode) -> io::Result<()> {
        // What formats ask for while they are used. Other modes are for making images.
        match preallocate {
            PreallocateMode::None | PreallocateMode::Zero => self.file.set_len(size),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
