//! Makes empty qcow2 images: QEMU's specification (docs/interop/qcow2.txt), version 3, with
//! clusters of 64 KiB and counts of 16 bits.
//!
//! Four clusters: the header, the table of reference count blocks, the only such block (it
//! counts these four clusters), and the first-level table with no entries yet.

use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Bytes of a disk that one entry of the first-level table stands for.
const PER_ENTRY: u64 = CLUSTER / 8 * CLUSTER;

/// Makes an image of a disk of `size` bytes, in place of whatever is at `path`.
pub(crate) fn create(path: &Path, size: u64) -> Result<()> {
    let entries = size.div_ceil(PER_ENTRY);
    ensure!(entries <= CLUSTER / 8, "a first-level table for {size} bytes needs several clusters");
    write(path, &header(size, entries as u32)).with_context(|| path.display().to_string())
}

fn header(size: u64, entries: u32) -> Vec<u8> {
    let mut header = b"QFI\xfb".to_vec();
    let mut word = |value: u32| header.extend(value.to_be_bytes());
    word(3); // version
    [0, 0, 0].into_iter().for_each(&mut word); // no backing file
    word(CLUSTER_BITS);
    [(size >> 32) as u32, size as u32].into_iter().for_each(&mut word);
    word(0); // no encryption
    word(entries);
    [0, 3 * CLUSTER as u32].into_iter().for_each(&mut word); // the first-level table
    [0, CLUSTER as u32].into_iter().for_each(&mut word); // reference counts
    word(1); // clusters of their table
    [0, 0, 0].into_iter().for_each(&mut word); // no snapshots
    [0; 6].into_iter().for_each(&mut word); // no features
    word(4); // bits of a count, as a power of two
    word(104); // length of this
    header
}

fn write(path: &Path, header: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(header)?;
    file.seek(SeekFrom::Start(CLUSTER))?;
    file.write_all(&(2 * CLUSTER).to_be_bytes())?;
    file.seek(SeekFrom::Start(2 * CLUSTER))?;
    file.write_all(&[0, 1].repeat(4))?;
    file.set_len(4 * CLUSTER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_header_has_its_length() {
        assert_eq!(header(1 << 30, 2).len(), 104);
    }

    /// The real thing as the oracle, where it is installed.
    #[test]
    fn qemu_finds_nothing_wrong() {
        let path = std::env::temp_dir().join(format!("lguest-{}.qcow2", std::process::id()));
        create(&path, 3 << 30).unwrap();
        match Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output() {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(_) => eprintln!("no qemu-img on this machine: not compared"),
        }
        std::fs::remove_file(&path).unwrap();
        assert!(create(&path, 1 << 60).is_err());
    }
}
