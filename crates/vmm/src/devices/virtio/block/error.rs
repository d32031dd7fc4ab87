//! Why there is no disk: errors for the user, one line each, with the remedy.

use std::io;
use std::path::PathBuf;

/// Why a disk image cannot be used. Each says which file, what was tried, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file.
    #[error("{}: there is no such disk image: make one (truncate -s 8G {}), or check the path", .path.display(), .path.display())]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// The file cannot be opened.
    #[error("{}: cannot open the disk image to read{} it: {reason}: {}", .path.display(), if *.writable { " and write" } else { "" }, if *.writable { "give yourself access to it, or add ,readonly" } else { "give yourself access to it" })]
    Open {
        /// The image.
        path: PathBuf,
        /// It was to be written to as well.
        writable: bool,
        /// What the host said.
        reason: io::Error,
    },
    /// The file cannot be opened past the page cache.
    #[error("{}: cannot open the disk image past the page cache: {reason}: leave out ,direct, which its file system does not support", .path.display())]
    Direct {
        /// The image.
        path: PathBuf,
        /// What the host said.
        reason: io::Error,
    },
    /// Direct I/O would have to write past the end.
    #[error("{}: its size of {size} bytes is not a multiple of {align}, which direct I/O needs here: leave out ,direct, or make it larger (truncate -s %{align} {})", .path.display(), .path.display())]
    DirectSize {
        /// The image.
        path: PathBuf,
        /// How large it is, in bytes.
        size: u64,
        /// What its size would have to be a multiple of, in bytes.
        align: u64,
    },
    /// The host refuses a thread to wait for its I/O.
    #[error("the host refuses a thread for a disk: {0}")]
    Thread(#[source] io::Error),
    /// A folder, a pipe, a terminal.
    #[error("{}: is neither a file nor a block device: name a disk image", .path.display())]
    NotADisk {
        /// What was named.
        path: PathBuf,
    },
    /// Somebody else uses it.
    #[error("{} is in use by another guest (or by QEMU): stop that one first, or give both ,readonly", .path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The host itself uses the block device.
    #[error("{} is in use by this host (mounted, or part of a volume): unmount it first, or add ,readonly", .path.display())]
    InUseByHost {
        /// The block device.
        path: PathBuf,
    },
    /// The file system has no locks.
    #[error("{}: cannot lock the disk image against other guests: {reason}: move it to a local file system", .path.display())]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the host said.
        reason: io::Error,
    },
    /// The image holds no whole sector.
    #[error("{}: the disk is empty: give it a size (truncate -s 8G for raw, qemu-img resize for qcow2)", .path.display())]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// The image cannot be read, or is damaged, or does what we do not.
    #[error("{}: cannot read it as a {format} image: {reason}: check it (qemu-img check), convert it (qemu-img convert -O qcow2), or give its format (format=raw or format=qcow2)", .path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What it was taken for.
        format: super::DiskFormat,
        /// What is wrong.
        reason: io::Error,
    },
    /// The image asks for a file that it may not ask for.
    #[error("{}: its backing file {name:?} is not beside it or below: put it there, and say so (qemu-img rebase -u -F FORMAT -b NAME {})", .path.display(), .path.display())]
    BackingOutside {
        /// The image that names it.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// The image does not say what its backing file is.
    #[error("{}: does not say whether its backing file {name:?} is raw or qcow2: say so (qemu-img rebase -u -F FORMAT -b NAME {})", .path.display(), .path.display())]
    BackingFormat {
        /// The image that names it.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// Images behind images without end.
    #[error("{}: more than {limit} images lie behind it, or it lies behind itself: merge them (qemu-img convert -O qcow2)", .path.display())]
    BackingDepth {
        /// The image the user named.
        path: PathBuf,
        /// How many may lie behind one.
        limit: usize,
    },
    /// The data lies in a file of its own.
    #[error("{}: keeps its data in another file, which is not supported: make one image of both (qemu-img convert -O qcow2)", .path.display())]
    DataFile {
        /// The image.
        path: PathBuf,
    },
}
