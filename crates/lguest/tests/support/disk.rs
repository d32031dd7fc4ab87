//! Disk images for guests, and what the host's own programs say of them afterwards.

use imago::FormatCreateBuilder;
use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A program for administrators, whose folder an ordinary user's PATH leaves out.
fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// A new raw image of zeroes.
pub(crate) fn raw(path: &Path, size: u64) -> PathBuf {
    File::create_new(path).unwrap().set_len(size).unwrap();
    path.to_owned()
}

/// A new raw image with an empty ext4 file system on it. e2fsprogs is part of every Debian.
pub(crate) fn ext4(path: &Path, size: u64) -> PathBuf {
    let path = raw(path, size);
    let output = program("mkfs.ext4").args(["-q", "-F"]).arg(&path).output();
    let output = output.expect("mkfs.ext4: apt install e2fsprogs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    path
}

/// A new qcow2 image, made by the library that lguest reads them with; `behind` is a raw
/// image in the same folder.
pub(crate) fn qcow2(path: &Path, size: u64, behind: Option<&str>) -> PathBuf {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let builder = Qcow2::<ImageFile>::create_builder(ImageFile::try_from(file).unwrap()).size(size);
    match behind {
        Some(name) => builder.backing(name.to_owned(), "raw".to_owned()).create().unwrap(),
        None => builder.create().unwrap(),
    }
    path.to_owned()
}

/// The ext4 file system `offset` bytes into an image is whole: not a block is out of place.
#[track_caller]
pub(crate) fn fsck(image: &Path, offset: u64) {
    let mut name = image.as_os_str().to_owned();
    if offset != 0 {
        name.push(format!("?offset={offset}"));
    }
    let output = program("fsck.ext4").args(["-f", "-n"]).arg(&name).output();
    let output = output.expect("fsck.ext4: apt install e2fsprogs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {said}", image.display());
}

/// Plays back what the journal holds, as the next mount would; then as [`fsck`].
#[track_caller]
pub(crate) fn fsck_after_a_crash(image: &Path) {
    let output = program("fsck.ext4").args(["-p"]).arg(image).output();
    let output = output.expect("fsck.ext4: apt install e2fsprogs");
    // 0 nothing to do, 1 all is well now; what needs a decision is 4.
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 1)), "{}: {said}", image.display());
    fsck(image, 0);
}

/// Part of a file, from `offset` on.
pub(crate) fn part(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact(&mut bytes).unwrap();
    bytes
}

/// SHA-256 as coreutils know it.
pub(crate) fn checksum(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sha256sum: apt install coreutils");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().to_owned()
}
