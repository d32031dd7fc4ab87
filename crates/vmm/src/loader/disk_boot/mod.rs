//! Finds the kernel of a system that is installed on a disk image, as its boot loader would.
//!
//! A disk that was made for real machines carries a boot loader for their firmware, which this
//! machine does not have. But what that would load lies in an ext4 file system, and how it
//! would choose is written down beside it; so both are read from here. File systems other
//! than ext2, ext3 and ext4 are not read: for those a kernel has to be given.
//!
//! The image is as hostile as a guest, who wrote it: what is read of it is bounded, and what
//! makes no sense is a [`DiskBootError`]. The Launcher calls [`find`] when there is a disk but
//! no kernel.

mod boot_loader_entries;
mod error;
mod file_system;
mod grub;
mod image_read;
mod partition_table;
mod selection;
#[cfg(test)]
mod tests;
mod version;

use std::rc::Rc;

pub use error::DiskBootError;
pub use image_read::ImageRead;

use super::image::Image;
use file_system::FileSystem;
use selection::Choice;

/// What a disk boots.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: Image,
    /// Its initrds, in order; none is a kernel with all it needs built in.
    pub initrds: Vec<Image>,
    /// What its boot loader would tell the kernel, with where its root file system is.
    pub command_line: String,
}

/// Finds what the disk boots. `name` is what errors and images call the disk.
///
/// The file systems are looked at in the order of the partition table; the first with a
/// kernel decides. The root file system is what the boot loader's configuration says, else
/// the one with the kernel if it has an /etc, else the first that has.
///
/// # Errors
/// [`DiskBootError`]: whatever keeps the disk from being booted, with the remedy.
pub fn find(image: &Rc<dyn ImageRead>, name: &str) -> Result<BootFiles, DiskBootError> {
    let mut systems = Vec::new();
    let mut failure = None;
    for partition in partition_table::partitions(image, name)? {
        match FileSystem::open(image, partition, name) {
            Ok(Some(system)) => systems.push(system),
            Ok(None) => {}
            Err(error) => failure = Some(error),
        }
    }
    for (index, system) in systems.iter().enumerate() {
        match selection::choose(system) {
            Ok(Some(choice)) => return assemble(&systems, index, choice, name),
            Ok(None) => {}
            Err(error) => failure = Some(error),
        }
    }
    // A damaged file system may be the one with the kernel, so that is what to say.
    Err(failure.unwrap_or_else(|| match systems.len() {
        0 => DiskBootError::NoFileSystem { name: name.to_owned() },
        _ => DiskBootError::NoKernel { name: name.to_owned() },
    }))
}

fn assemble(
    systems: &[FileSystem],
    index: usize,
    choice: Choice,
    name: &str,
) -> Result<BootFiles, DiskBootError> {
    let Some(system) = systems.get(index) else {
        return Err(DiskBootError::NoKernel { name: name.to_owned() });
    };
    let image = |path: &str| {
        let bytes = system.read(path, file_system::LARGEST_IMAGE)?;
        Ok(Image::from_bytes(format!("{name}:{path}"), bytes))
    };
    let kernel = image(&choice.kernel)?;
    let initrds = choice.initrds.iter().map(|path| image(path)).collect::<Result<Vec<_>, _>>()?;
    let mut words = choice.words;
    if !words.iter().any(|word| word.starts_with("root=")) {
        let root = std::iter::once(system).chain(systems).find(|system| system.has_etc());
        match root {
            Some(root) => {
                let given = root.root_argument(!initrds.is_empty());
                words.splice(0..0, [given, "ro".to_owned()]);
            }
            None => tracing::warn!(
                "{name}: no root file system is recognised on it: give root= by --append"
            ),
        }
    }
    tracing::info!(kernel = kernel.name(), initrds = initrds.len(), "taken from the disk");
    Ok(BootFiles { kernel, initrds, command_line: words.join(" ") })
}
