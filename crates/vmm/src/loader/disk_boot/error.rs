//! Why nothing can be booted from a disk: each a line with the disk, the reason, the remedy.

use std::io;

use ext4_view::Ext4Error;

/// Why a disk has nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum DiskBootError {
    /// The host cannot read the image.
    #[error("{name}: cannot be read: {reason}")]
    Read {
        /// The image.
        name: String,
        /// What the host said.
        reason: io::Error,
    },
    /// There is nothing on it that can be read.
    #[error(
        "{name}: no ext4 file system on it to take a kernel from: give --kernel (and --initrd)"
    )]
    NoFileSystem {
        /// The image.
        name: String,
    },
    /// There are file systems, but none with a kernel.
    #[error("{name}: no kernel in its /boot: give --kernel (and --initrd)")]
    NoKernel {
        /// The image.
        name: String,
    },
    /// A file system is damaged, or uses what the reader does not know.
    #[error(
        "{name}: its ext4 file system at byte {offset} cannot be read ({reason}): run e2fsck on it, or give --kernel (and --initrd)"
    )]
    FileSystem {
        /// The image.
        name: String,
        /// Where the file system begins in it.
        offset: u64,
        /// What is wrong.
        reason: Ext4Error,
    },
    /// A file that should be there cannot be read.
    #[error("{name}:{path}: cannot be read ({reason}): give --kernel (and --initrd)")]
    File {
        /// The image.
        name: String,
        /// The file in it.
        path: String,
        /// What is wrong.
        reason: Ext4Error,
    },
    /// A file is larger than any kernel or initrd.
    #[error("{name}:{path}: {len} bytes are too much to load: give --kernel (and --initrd)")]
    TooLarge {
        /// The image.
        name: String,
        /// The file in it.
        path: String,
        /// Its length.
        len: u64,
    },
}
