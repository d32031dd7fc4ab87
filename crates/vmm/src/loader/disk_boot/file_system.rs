//! An ext2, ext3 or ext4 file system on a disk, and the few questions the boot has for it.

use std::ops::Range;
use std::rc::Rc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::error::DiskBootError;
use super::image_read::{ImageRead, Part};
use super::partition_table::Partition;

/// The largest kernel or initrd, in bytes.
pub(super) const LARGEST_IMAGE: u64 = 512 << 20;
/// The largest configuration file, in bytes.
const LARGEST_TEXT: u64 = 1 << 20;
/// The most names of a directory that are looked at.
const MOST_NAMES: usize = 4096;
/// The most block groups: some 256 TiB at the usual 128 MiB each.
const MOST_GROUPS: u64 = 2 << 20;
/// log2 of the largest block there is, 64 KiB, in units of 1 KiB.
const LARGEST_BLOCK_LOG: u64 = 6;
/// The longest symbolic link, and how many may follow one another (Linux' own limits).
const LONGEST_LINK: u64 = 4096;
const MOST_LINKS: u32 = 40;
/// How much is read of a file at a time, so that only what is there takes memory.
const CHUNK: usize = 1 << 20;

/// Where the superblock and its magic number are (linux/fs/ext4/ext4.h, `s_magic`).
const MAGIC_AT: u64 = 0x438;
const MAGIC: [u8; 2] = [0x53, 0xef];

/// A file system that was opened.
pub(super) struct FileSystem {
    ext4: Ext4,
    partition: Partition,
    /// What errors call the disk.
    disk: String,
}

impl Ext4Read for Part {
    fn read(
        &mut self,
        start: u64,
        buf: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.read_at(start, buf)?)
    }
}

impl FileSystem {
    /// Opens what is in a partition; `None` if that is nothing of the kind.
    pub(super) fn open(
        image: &Rc<dyn ImageRead>,
        partition: Partition,
        disk: &str,
    ) -> Result<Option<Self>, DiskBootError> {
        if !has_magic(image, &partition.bytes) {
            return Ok(None);
        }
        let part = Part::new(image, partition.bytes.clone());
        let loaded = match claim(&part) {
            Some(claim) if claim.groups > MOST_GROUPS => {
                Err(Ext4Error::Io("it claims to have too many block groups".into()))
            }
            Some(claim) if claim.log_block_size > LARGEST_BLOCK_LOG => {
                Err(Ext4Error::Io("it claims to have blocks larger than 64 KiB".into()))
            }
            _ => Ext4::load(Box::new(part)),
        };
        match loaded {
            Ok(ext4) => Ok(Some(Self { ext4, partition, disk: disk.to_owned() })),
            Err(reason) => Err(DiskBootError::FileSystem {
                name: disk.to_owned(),
                offset: partition.bytes.start,
                reason,
            }),
        }
    }

    /// A file's contents, if it is no longer than `limit`.
    pub(super) fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, DiskBootError> {
        let failed =
            |reason| DiskBootError::File { name: self.disk.clone(), path: path.to_owned(), reason };
        let path = &self.follow(path).map_err(failed)?;
        let mut file = self.ext4.open(path.as_str()).map_err(failed)?;
        if !file.metadata().file_type().is_regular_file() {
            return Err(failed(Ext4Error::IsASpecialFile));
        }
        let len = file.metadata().len();
        if len > limit {
            return Err(DiskBootError::TooLarge {
                name: self.disk.clone(),
                path: path.to_owned(),
                len,
            });
        }
        let mut bytes = Vec::new();
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = file.read_bytes(&mut chunk).map_err(failed)?;
            if read == 0 {
                return Ok(bytes);
            }
            bytes.extend_from_slice(chunk.get(..read).unwrap_or_default());
        }
    }

    /// A configuration file as text; `None` when there is none.
    pub(super) fn text(&self, path: &str) -> Result<Option<String>, DiskBootError> {
        match self.read(path, LARGEST_TEXT) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(DiskBootError::File { reason, .. }) if is_absence(&reason) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether there is a file, through symbolic links.
    pub(super) fn is_file(&self, path: &str) -> bool {
        let metadata = self.follow(path).and_then(|path| self.ext4.metadata(path.as_str()));
        metadata.is_ok_and(|metadata| metadata.file_type().is_regular_file())
    }

    /// What a symbolic link leads to in the end; the path itself if it is none.
    pub(super) fn resolve(&self, path: &str) -> Option<String> {
        self.follow(path).ok()
    }

    /// `path` without symbolic links in it. The reader would follow them too, but takes as
    /// much memory as a link claims to be long.
    fn follow(&self, path: &str) -> Result<String, Ext4Error> {
        let components = |path: &str| path.split('/').rev().map(str::to_owned).collect::<Vec<_>>();
        let (mut left, mut done, mut links) = (components(path), String::new(), 0);
        while let Some(name) = left.pop() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    done.truncate(done.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let here = format!("{done}/{name}");
            let metadata = self.ext4.symlink_metadata(here.as_str())?;
            if !metadata.file_type().is_symlink() {
                done = here;
                continue;
            }
            links = u32::saturating_add(links, 1);
            if links > MOST_LINKS {
                return Err(Ext4Error::TooManySymlinks);
            }
            if metadata.len() > LONGEST_LINK {
                return Err(Ext4Error::PathTooLong);
            }
            let target = self.ext4.read_link(here.as_str())?;
            let target = target.to_str().map_err(|_| Ext4Error::MalformedPath)?;
            if target.starts_with('/') {
                done.clear();
            }
            left.extend(components(target));
        }
        Ok(if done.is_empty() { "/".to_owned() } else { done })
    }

    /// The names of what is in a directory; none when that is not there.
    pub(super) fn names(&self, directory: &str) -> Result<Vec<String>, DiskBootError> {
        let failed = |reason| DiskBootError::File {
            name: self.disk.clone(),
            path: directory.to_owned(),
            reason,
        };
        let entries =
            self.follow(directory).and_then(|directory| self.ext4.read_dir(directory.as_str()));
        let entries = match entries {
            Ok(entries) => entries,
            Err(reason) if is_absence(&reason) => return Ok(Vec::new()),
            Err(reason) => return Err(failed(reason)),
        };
        let mut names = Vec::new();
        for entry in entries.take(MOST_NAMES) {
            let entry = entry.map_err(failed)?;
            if let Ok(name) = entry.file_name().as_str() {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Whether it is the root of a system, and not one of its other file systems.
    pub(super) fn has_etc(&self) -> bool {
        let metadata = self.follow("/etc").and_then(|path| self.ext4.metadata(path.as_str()));
        metadata.is_ok_and(|metadata| metadata.is_dir())
    }

    /// How the kernel is told that this is the root. Only an initrd can look for the file
    /// system's own UUID; the kernel knows partitions', or the device by its name.
    pub(super) fn root_argument(&self, with_initrd: bool) -> String {
        match &self.partition.uuid {
            _ if with_initrd => format!("root=UUID={}", self.ext4.uuid()),
            Some(uuid) => format!("root=PARTUUID={uuid}"),
            None => "root=/dev/vda".to_owned(),
        }
    }
}

fn has_magic(image: &Rc<dyn ImageRead>, bytes: &Range<u64>) -> bool {
    let mut magic = [0; 2];
    let part = Part::new(image, bytes.clone());
    part.read_at(MAGIC_AT, &mut magic).is_ok() && magic == MAGIC
}

/// What the superblock claims that the reader takes memory for.
struct Claim {
    /// Block groups: it keeps something of each.
    groups: u64,
    /// log2 of the block size in KiB: it reads whole blocks.
    log_block_size: u64,
}

/// `None` when the superblock cannot be read or makes no sense, which the reader finds out by
/// itself. The fields are those of linux/fs/ext4/ext4.h, `struct ext4_super_block`.
fn claim(part: &Part) -> Option<Claim> {
    let mut superblock = [0; 1024];
    part.read_at(1024, &mut superblock).ok()?;
    let field = |at: usize| {
        let bytes = superblock.get(at..)?.first_chunk::<4>()?;
        Some(u64::from(u32::from_le_bytes(*bytes)))
    };
    let blocks = field(0x4)? | field(0x150)? << 32;
    let per_group = field(0x20)?;
    Some(Claim { groups: blocks.checked_div(per_group)?, log_block_size: field(0x18)? })
}

fn is_absence(error: &Ext4Error) -> bool {
    matches!(error, Ext4Error::NotFound | Ext4Error::NotADirectory)
}
