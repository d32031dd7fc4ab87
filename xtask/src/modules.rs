//! The kernel modules that guests with devices need: virtio's drivers, ext4, what DHCP needs.
//!
//! Of a kernel package's hundreds of megabytes of modules a handful is kept, unpacked, with
//! the order they load in; a guest's busybox can neither unpack nor sort them. Which of them
//! a kernel has built in differs between kernels, so a missing one is no error here: the
//! guest's checks will tell.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What the guests load, before what that depends on is added.
const WANTED: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    // ext4 asks for it by what it does, not by name.
    "crc32c_generic",
    "ext4",
    "af_packet",
];

/// The file that lists kept modules, in the order they load in.
const ORDER: &str = "order";
/// No module of these is nearly as large.
const LARGEST: u64 = 64 << 20;

/// Keeps in `into` what of the tree of modules at `tree` is wanted.
pub(crate) fn keep(tree: &Path, into: &Path) -> Result<()> {
    let mut files = BTreeMap::new();
    find(tree, &mut files).with_context(|| tree.display().to_string())?;
    if files.is_empty() {
        bail!("{} holds no kernel modules", tree.display());
    }
    fs::create_dir_all(into)?;
    let mut order = Vec::new();
    for name in WANTED {
        keep_one(name, &files, into, &mut order)?;
    }
    fs::write(into.join(ORDER), order.join("\n"))?;
    Ok(())
}

/// Modules kept by [`keep`] with their contents, in the order they load in.
pub(crate) fn kept(directory: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let order = directory.join(ORDER);
    let order = fs::read_to_string(&order).with_context(|| order.display().to_string())?;
    let read = |name: &str| {
        let path = directory.join(name);
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        Ok((name.to_owned(), bytes))
    };
    order.lines().map(read).collect()
}

/// Keeps a module after everything it depends on.
fn keep_one(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    into: &Path,
    order: &mut Vec<String>,
) -> Result<()> {
    let kept = format!("{name}.ko");
    let Some(path) = files.get(name) else { return Ok(()) };
    if order.contains(&kept) {
        return Ok(());
    }
    let module = read(path).with_context(|| path.display().to_string())?;
    for needed in depends(&module) {
        // The kernel's build refuses modules that depend on each other in a circle.
        keep_one(&needed, files, into, order)?;
    }
    fs::write(into.join(&kept), module)?;
    order.push(kept);
    Ok(())
}

/// All modules by name. File names may have a dash where the name has an underscore.
fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if let Some((name, "ko" | "ko.xz")) =
            entry.file_name().to_string_lossy().split_once('.')
        {
            files.insert(name.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let file = fs::File::open(path)?;
    let mut module = Vec::new();
    if path.extension().is_some_and(|extension| extension == "xz") {
        liblzma::read::XzDecoder::new(file).take(LARGEST).read_to_end(&mut module)?;
    } else {
        file.take(LARGEST).read_to_end(&mut module)?;
    }
    Ok(module)
}

/// What a module says it depends on: the value of `depends` in its section `.modinfo`, which
/// holds `name=value` strings that end in zeroes (modpost writes them).
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module.get(at + KEY.len()..).unwrap_or_default();
    let value = value.split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_kept_after_what_they_depend_on() {
        let home = std::env::temp_dir().join(format!("lguest-modules-{}", std::process::id()));
        let tree = home.join("tree/kernel/drivers");
        fs::create_dir_all(&tree).unwrap();
        let module = |name: &str, depends: &str| {
            let bytes = format!("ELF\0license=GPL\0depends={depends}\0name={name}\0");
            fs::write(tree.join(name), bytes).unwrap();
        };
        module("virtio_ring.ko", "virtio");
        module("virtio.ko", "");
        module("virtio_blk.ko", "virtio_ring,virtio");
        module("virtio-rng.ko", "virtio,built_in");
        module("unwanted.ko", "virtio");
        keep(&home.join("tree"), &home.join("kept")).unwrap();
        let names: Vec<_> = kept(&home.join("kept")).unwrap().into_iter().map(|m| m.0).collect();
        fs::remove_dir_all(&home).unwrap();
        assert_eq!(names, ["virtio.ko", "virtio_ring.ko", "virtio_blk.ko", "virtio_rng.ko"]);
    }

    #[test]
    fn a_module_without_the_key_depends_on_nothing() {
        assert_eq!(depends(b"ELF\0undepends=x\0"), Vec::<String>::new());
        assert_eq!(depends(b"\0depends=crc16,jbd2-x\0"), ["crc16", "jbd2_x"]);
    }
}
