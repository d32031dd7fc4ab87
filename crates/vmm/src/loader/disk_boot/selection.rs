//! Which of a file system's kernels is booted: what the boot loader's configuration says,
//! else the links that Debian keeps to the current one, else the newest.

use super::error::DiskBootError;
use super::file_system::FileSystem;
use super::{boot_loader_entries, grub, version};

/// A kernel with what belongs to it, as paths within its file system.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) kernel: String,
    pub(super) initrds: Vec<String>,
    /// Its command line.
    pub(super) words: Vec<String>,
}

/// The most entries of a boot loader that are read.
const MOST_ENTRIES: usize = 64;

/// Chooses a kernel; `None` if the file system has none.
pub(super) fn choose(system: &FileSystem) -> Result<Option<Choice>, DiskBootError> {
    // A partition of its own for /boot has everything at its root.
    for boot in ["/boot", ""] {
        let configured = match from_grub(system, boot)? {
            Some(choice) => Some(choice),
            None => from_entries(system, boot)?,
        };
        if let Some(choice) = configured.filter(|choice| is_complete(system, choice)) {
            return Ok(Some(choice));
        }
    }
    if let Some(choice) = from_links(system)? {
        return Ok(Some(choice));
    }
    for boot in ["/boot", ""] {
        if let Some(choice) = newest(system, boot)? {
            return Ok(Some(choice));
        }
    }
    Ok(None)
}

/// Whether all files are there. A configuration may be older than they are, or may mean
/// another file system.
fn is_complete(system: &FileSystem, choice: &Choice) -> bool {
    std::iter::once(&choice.kernel).chain(&choice.initrds).all(|path| system.is_file(path))
}

fn from_grub(system: &FileSystem, boot: &str) -> Result<Option<Choice>, DiskBootError> {
    for directory in ["grub", "grub2"] {
        let config = system.text(&format!("{boot}/{directory}/grub.cfg"))?;
        if let Some(choice) = config.as_deref().and_then(grub::default_entry) {
            return Ok(Some(choice));
        }
    }
    Ok(None)
}

fn from_entries(system: &FileSystem, boot: &str) -> Result<Option<Choice>, DiskBootError> {
    let directory = format!("{boot}/loader/entries");
    let mut names = system.names(&directory)?;
    names.retain(|name| name.ends_with(".conf"));
    let mut entries = Vec::new();
    for name in names.into_iter().take(MOST_ENTRIES) {
        if let Some(text) = system.text(&format!("{directory}/{name}"))? {
            entries.push((name, text));
        }
    }
    let choice = boot_loader_entries::newest(&entries).map(|mut choice| {
        // Where /boot is no file system of its own, paths may still be written as if.
        for path in std::iter::once(&mut choice.kernel).chain(&mut choice.initrds) {
            if !system.is_file(path) {
                path.insert_str(0, boot);
            }
        }
        choice
    });
    Ok(choice)
}

/// Debian's links to the current kernel, at the root or in /boot.
fn from_links(system: &FileSystem) -> Result<Option<Choice>, DiskBootError> {
    for directory in ["", "/boot"] {
        let resolve = |name: &str| {
            let path = format!("{directory}/{name}");
            system.is_file(&path).then(|| system.resolve(&path)).flatten()
        };
        if let Some(kernel) = resolve("vmlinuz") {
            let initrds = resolve("initrd.img").into_iter().collect();
            return Ok(Some(Choice { kernel, initrds, words: default_words(system)? }));
        }
    }
    Ok(None)
}

/// The newest `vmlinuz-RELEASE` with its initrd, under any of the names distributions use.
fn newest(system: &FileSystem, boot: &str) -> Result<Option<Choice>, DiskBootError> {
    let directory = if boot.is_empty() { "/" } else { boot };
    let names = system.names(directory)?;
    let releases = names.iter().filter_map(|name| name.strip_prefix("vmlinuz-"));
    let usable = releases.filter(|release| {
        !release.contains("rescue") && system.is_file(&format!("{boot}/vmlinuz-{release}"))
    });
    let Some(release) = usable.max_by(|a, b| version::compare(a, b)) else { return Ok(None) };
    let initrds = [
        format!("{boot}/initrd.img-{release}"),
        format!("{boot}/initramfs-{release}.img"),
        format!("{boot}/initrd-{release}"),
        format!("{boot}/initrd-{release}.img"),
    ];
    Ok(Some(Choice {
        kernel: format!("{boot}/vmlinuz-{release}"),
        initrds: initrds.into_iter().find(|path| system.is_file(path)).into_iter().collect(),
        words: default_words(system)?,
    }))
}

fn default_words(system: &FileSystem) -> Result<Vec<String>, DiskBootError> {
    let defaults = system.text("/etc/default/grub")?;
    Ok(defaults.as_deref().map(grub::default_words).unwrap_or_default())
}
