//! A disk image: a format over a file, and perhaps other images behind it.
//!
//! Any number of threads read and write at once. What takes mappings away (discarding,
//! zeroing) has the image alone: a format looks at a whole cluster to zero a part of it,
//! and a write to the other part in between would be lost.
//!
//! An image says which file lies behind it, and an image may come from anywhere. So a name
//! counts only if it leads to a file beside the image or below its folder, the image must
//! say that file's format, it is opened for reading only, and data files (which would be
//! written) are not supported.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use imago::format::drivers::FormatDriverInstance;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping, Storage, StorageExt};

use super::config::{DiskConfig, DiskFormat};
use super::error::DiskError;
use super::host_file::{Access, HostFile};
use super::lock::Purpose;
use super::qcow2_header;
use crate::devices::virtio::chain::ChainSlice;

/// What qcow2 images begin with.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// How many images may lie behind one.
const MAX_BACKING: usize = 16;
/// The unit a driver counts in (virtio 1.2, 5.2.6), in bytes.
pub(super) const SECTOR: u64 = 512;

/// What a driver should know of how the image likes to be used, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Granularity {
    /// The smallest unit of reads and writes.
    pub(super) block: u32,
    /// The smallest unit that is written without reading first.
    pub(super) physical: u32,
    /// What is best read and written at once, or 0.
    pub(super) optimal: u32,
    /// The unit in which space is given back.
    pub(super) discard: u32,
}

/// An open disk image.
#[derive(Debug)]
pub(super) struct Image {
    access: RwLock<FormatAccess<HostFile>>,
    path: PathBuf,
    format: DiskFormat,
    /// The guest must not make another format of it.
    stays_raw: bool,
    size: u64,
    readonly: bool,
    granularity: Granularity,
    /// Something was written since the last flush.
    dirty: AtomicBool,
}

impl Image {
    /// Opens what `config` names, and what lies behind it.
    ///
    /// # Errors
    /// [`DiskError`].
    pub(super) fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let purpose = if config.readonly { Purpose::Read } else { Purpose::Write };
        let access = Access { purpose, direct: config.direct };
        Self::from_file(HostFile::open(&config.path, access)?, config)
    }

    /// The same with a file that is open already.
    ///
    /// # Errors
    /// [`DiskError`].
    pub(super) fn from_file(file: HostFile, config: &DiskConfig) -> Result<Self, DiskError> {
        let path = config.path.clone();
        let format = match config.format {
            Some(format) => format,
            None => match file.begins_with(&QCOW2_MAGIC) {
                Ok(true) => DiskFormat::Qcow2,
                Ok(false) => DiskFormat::Raw,
                Err(reason) => {
                    return Err(DiskError::Open { path, writable: false, reason });
                }
            },
        };
        let writable = !config.readonly;
        let sector = file.device_sector();
        let align = file.req_align() as u64;
        let hole = file.discard_align();
        let mut cluster = None;
        let access = match format {
            DiskFormat::Raw => {
                let access = open_raw(file, &path, writable)?;
                if writable && !access.size().is_multiple_of(align) {
                    return Err(DiskError::DirectSize { path, size: access.size(), align });
                }
                access
            }
            DiskFormat::Qcow2 => {
                let qcow2 = open_qcow2(file, &path, writable, config.direct, MAX_BACKING)?;
                cluster = qcow2.zero_granularity();
                FormatAccess::new(qcow2)
            }
        };
        let size = access.size() & !(SECTOR - 1);
        if size == 0 {
            return Err(DiskError::Empty { path });
        }
        let block = match format {
            DiskFormat::Raw => sector.unwrap_or(SECTOR as u32),
            DiskFormat::Qcow2 => SECTOR as u32,
        };
        let cluster = cluster.and_then(|bytes| u32::try_from(bytes).ok());
        let granularity = Granularity {
            block,
            physical: block.max(4096),
            optimal: cluster.unwrap_or(0),
            discard: cluster.unwrap_or_else(|| u32::try_from(hole).unwrap_or(4096)).max(block),
        };
        Ok(Self {
            access: RwLock::new(access),
            path,
            format,
            stays_raw: config.format.is_none() && format == DiskFormat::Raw,
            size,
            readonly: config.readonly,
            granularity,
            dirty: AtomicBool::new(false),
        })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// How large the disk is, in bytes: whole sectors.
    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    pub(super) const fn readonly(&self) -> bool {
        self.readonly
    }

    pub(super) const fn granularity(&self) -> Granularity {
        self.granularity
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<HostFile>> {
        // imago keeps its own state in order; a panic under the lock was reported.
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps all others from the image, as a disk that takes its time would.
    #[cfg(test)]
    pub(super) fn hold(&self) -> impl Drop + '_ {
        self.access.write().unwrap()
    }

    /// Fills `memory` from byte `offset` on.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn read(&self, memory: &[ChainSlice<'_>], offset: u64) -> io::Result<()> {
        // The guard keeps the memory, and tells the CPU of the writes when it goes.
        let (vector, guard) = IoVectorMut::from_volatile_slice(memory);
        let done = self.shared().readv(vector, offset);
        drop(guard);
        done
    }

    /// Fills memory of our own from byte `offset` on.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn read_bytes(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared().read(bytes, offset)
    }

    /// Writes `memory` from byte `offset` on.
    ///
    /// # Errors
    /// What the host says, or that the guest may not write that.
    pub(super) fn write(&self, memory: &[ChainSlice<'_>], offset: u64) -> io::Result<()> {
        self.dirty.store(true, Ordering::Release);
        if self.stays_raw && offset < SECTOR {
            return self.write_beginning(memory, offset);
        }
        self.write_now(memory, offset)
    }

    /// [`Image::read`], if that needs no waiting. `false`: it would, and `memory` holds
    /// anything. Only raw images know without waiting where their data is.
    pub(super) fn read_at_once(&self, memory: &[ChainSlice<'_>], offset: u64) -> bool {
        let (vector, guard) = IoVectorMut::from_volatile_slice(memory);
        let done = self.at_once(offset, vector.len(), |file, at| file.read_at_once(&vector, at));
        drop(guard);
        done
    }

    /// [`Image::write`], if that needs no waiting. `false`: it is still to be done.
    pub(super) fn write_at_once(&self, memory: &[ChainSlice<'_>], offset: u64) -> bool {
        if self.readonly || (self.stays_raw && offset < SECTOR) {
            return false;
        }
        self.dirty.store(true, Ordering::Release);
        let (vector, guard) = IoVector::from_volatile_slice(memory);
        let done = self.at_once(offset, vector.len(), |file, at| file.write_at_once(&vector, at));
        drop(guard);
        done
    }

    fn at_once(&self, offset: u64, len: u64, io: impl FnOnce(&HostFile, u64) -> bool) -> bool {
        if self.format != DiskFormat::Raw {
            return false;
        }
        let Ok(access) = self.access.try_read() else { return false };
        match access.get_mapping(offset, len) {
            Ok((Mapping::Raw { storage, offset, .. }, mapped)) if mapped == len => {
                io(storage, offset)
            }
            _ => false,
        }
    }

    fn write_now(&self, memory: &[ChainSlice<'_>], offset: u64) -> io::Result<()> {
        let (vector, guard) = IoVector::from_volatile_slice(memory);
        let done = self.shared().writev(vector, offset);
        drop(guard);
        done
    }

    /// Writes what includes the first bytes of the disk, but no beginning of a qcow2 image.
    fn write_beginning(&self, memory: &[ChainSlice<'_>], offset: u64) -> io::Result<()> {
        // A copy: what is looked at must be what is written.
        let mut sector = [0_u8; SECTOR as usize];
        let mut left: &mut [u8] = &mut sector;
        let mut rest = Vec::new();
        for slice in memory {
            let taken = slice.len().min(left.len());
            let (head, tail) = std::mem::take(&mut left).split_at_mut(taken);
            slice.copy_to(head);
            left = tail;
            if taken < slice.len() {
                rest.push(slice.offset(taken).map_err(io::Error::other)?);
            }
        }
        let copied = (SECTOR as usize).saturating_sub(left.len());
        let head = sector.get(..copied).unwrap_or_default();
        if offset == 0 && head.starts_with(&QCOW2_MAGIC) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the guest may not make a qcow2 image of a disk not declared as raw (format=raw allows it)",
            ));
        }
        self.shared().write(head, offset)?;
        self.write_now(&rest, offset.saturating_add(copied as u64))
    }

    /// When this returns, what was written before is safe from a crash of the host.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn flush(&self) -> io::Result<()> {
        let access = self.shared();
        access.flush()?;
        access.sync()
    }

    /// [`Image::flush`], if anything was written since.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn flush_if_dirty(&self) -> io::Result<()> {
        if self.dirty.swap(false, Ordering::AcqRel) { self.flush() } else { Ok(()) }
    }

    /// Gives space back; what is read there afterwards is anything.
    ///
    /// # Errors
    /// What the host says. That it cannot is no error.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.dirty.store(true, Ordering::Release);
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        match access.discard_to_any(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            done => done,
        }
    }

    /// Makes a stretch read as zeroes, and gives its space back if `unmap`.
    ///
    /// # Errors
    /// What the host says.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.dirty.store(true, Ordering::Release);
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        let done = if unmap {
            access.discard_to_zero(offset, len)
        } else {
            match (self.format, access.get_mapping(offset, len)?) {
                (DiskFormat::Raw, (Mapping::Raw { storage, offset, .. }, mapped))
                    if mapped == len =>
                {
                    storage.write_allocated_zeroes(offset, len)
                }
                _ => access.write_zeroes(offset, len),
            }
        };
        match done {
            // Version 2 of qcow2 knows no zeroes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                write_real_zeroes(&access, offset, len)
            }
            done => done,
        }
    }
}

fn write_real_zeroes(
    access: &FormatAccess<HostFile>,
    mut offset: u64,
    mut len: u64,
) -> io::Result<()> {
    let zeroes = vec![0_u8; 1 << 16];
    while len != 0 {
        let now = len.min(zeroes.len() as u64);
        access.write(zeroes.get(..now as usize).unwrap_or_default(), offset)?;
        offset = offset.saturating_add(now);
        len = len.saturating_sub(now);
    }
    Ok(())
}

fn open_raw(
    mut file: HostFile,
    path: &Path,
    writable: bool,
) -> Result<FormatAccess<HostFile>, DiskError> {
    let bad = |reason| DiskError::Image { path: path.to_owned(), format: DiskFormat::Raw, reason };
    let size = file.size().map_err(bad)?;
    file.set_disk_end(size);
    Ok(FormatAccess::new(Raw::open_image(file, writable).map_err(bad)?))
}

/// Opens a qcow2 image and at most `depth` images behind it.
fn open_qcow2(
    file: HostFile,
    path: &Path,
    writable: bool,
    direct: bool,
    depth: usize,
) -> Result<Qcow2<HostFile>, DiskError> {
    let path = path.to_owned();
    let bad = |reason| DiskError::Image { path: path.clone(), format: DiskFormat::Qcow2, reason };
    qcow2_header::check(&file).map_err(bad)?;
    // A damaged header can make imago panic. What was opened is dropped then.
    let image = catch_unwind(AssertUnwindSafe(|| Qcow2::<HostFile>::open_image(file, writable)));
    let image = image.unwrap_or_else(|_| Err(io::Error::other("its header makes no sense")));
    let mut image = image.map_err(bad)?;
    if image.requires_external_data_file() {
        return Err(DiskError::DataFile { path });
    }
    image.set_data_file(None);
    let Some(name) = image.implicit_backing_file().cloned() else {
        image.set_backing(None);
        return Ok(image);
    };
    let Some(depth) = depth.checked_sub(1) else {
        return Err(DiskError::BackingDepth { path, limit: MAX_BACKING });
    };
    let format = match image.implicit_backing_format().map(String::as_str) {
        Some("raw") => DiskFormat::Raw,
        Some("qcow2") => DiskFormat::Qcow2,
        _ => return Err(DiskError::BackingFormat { path, name }),
    };
    let Some(behind) = backing_path(&path, &name) else {
        return Err(DiskError::BackingOutside { path, name });
    };
    let file = HostFile::open(&behind, Access { purpose: Purpose::Read, direct })?;
    image.set_backing(Some(match format {
        DiskFormat::Raw => open_raw(file, &behind, false)?,
        DiskFormat::Qcow2 => FormatAccess::new(open_qcow2(file, &behind, false, direct, depth)?),
    }));
    Ok(image)
}

/// Where a backing file of that name is: beside the image or below. Links count as what
/// they are called, for whoever may put links beside the image owns the folder.
fn backing_path(image: &Path, name: &str) -> Option<PathBuf> {
    let name = Path::new(name.strip_prefix("file:").unwrap_or(name));
    let inside = name
        .components()
        .all(|component| matches!(component, Component::Normal(_) | Component::CurDir));
    inside.then(|| image.parent().unwrap_or_else(|| Path::new("")).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_files_lie_beside_the_image() {
        let image = Path::new("/images/disk.qcow2");
        let at = |name| backing_path(image, name);
        assert_eq!(at("base.raw"), Some("/images/base.raw".into()));
        assert_eq!(at("file:./old/base.raw"), Some("/images/./old/base.raw".into()));
        assert_eq!(at("/etc/shadow"), None);
        assert_eq!(at("file:/etc/shadow"), None);
        assert_eq!(at("../other/disk.raw"), None);
        assert_eq!(at("below/../../other.raw"), None);
        assert_eq!(backing_path(Path::new("disk.qcow2"), "base"), Some("base".into()));
    }
}
