//! What a file looks like by its first bytes: which kind of kernel, or what else.
//!
//! Nobody gives a tarball as a kernel on purpose, so the error should say that it is one.

use std::fmt;

use super::bzimage;
use super::elf::{self, Machine};
use super::error::KernelError;
use super::multiboot;

/// How much of a file decides what it is: the multiboot header may be in the first 8 KiB,
/// an ISO 9660 volume descriptor is a little beyond 32 KiB.
pub(super) const HEAD_LEN: usize = 0x8800;

/// The kinds of kernel there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KernelKind {
    /// Linux's own wrapping: setup code, decompressor and compressed vmlinux.
    BzImage,
    /// An ELF file with a multiboot header.
    Multiboot,
    /// Another ELF file: a vmlinux.
    Elf,
}

/// What a file is that is no kernel. Displays as a noun with its article.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LooksLike {
    /// Nothing in it.
    Empty,
    /// A format that is known by its magic number.
    Known(&'static str),
    /// Mostly printable characters.
    Text,
    /// An ELF file, but not a statically placed executable.
    ElfOther,
    /// A PE file without Linux's boot header.
    EfiProgram,
    /// No idea.
    Unknown,
}

impl fmt::Display for LooksLike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "an empty file",
            Self::Known(what) => what,
            Self::Text => "a text file",
            Self::ElfOther => "an ELF program, library or object that is not linked as a kernel",
            Self::EfiProgram => "an EFI program (PE file) that only firmware can start",
            Self::Unknown => "data of no known format",
        })
    }
}

/// Magic numbers: offset, bytes, and what a file with them is.
const MAGIC: &[(usize, &[u8], &str)] = &[
    (0, b"\x1f\x8b", "gzip-compressed data (a tarball or initrd?)"),
    (0, b"\xfd7zXZ\0", "xz-compressed data (a tarball or module?)"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data (an initrd?)"),
    (0, b"BZh", "bzip2-compressed data (a tarball?)"),
    (0, b"\x02\x21\x4c\x18", "lz4-compressed data (an initrd?)"),
    (0, b"\x04\x22\x4d\x18", "lz4-compressed data"),
    (0, b"070701", "a cpio archive (an initrd: use --initrd)"),
    (0, b"070702", "a cpio archive (an initrd: use --initrd)"),
    (0, b"!<arch>\n", "an ar archive (a Debian package? unpack it with dpkg-deb -x)"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"hsqs", "a squashfs file system"),
    (0x438, b"\x53\xef", "an ext2/3/4 file system"),
    (0x8001, b"CD001", "a CD image (ISO 9660)"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree"),
    (4, b"zimg", "a compressed EFI image (zboot)"),
];

/// Decides what a file with this head (the first [`HEAD_LEN`] bytes, or all) is.
pub(super) fn identify(head: &[u8]) -> Result<KernelKind, KernelError> {
    if elf::is_elf(head) {
        return identify_elf(head);
    }
    if bzimage::has_header(head) {
        return Ok(KernelKind::BzImage);
    }
    // Images that begin with a small header of their own: arm64's and RISC-V's boot.rst.
    match head.get(0x38..0x3c) {
        Some(b"ARM\x64") => return Err(KernelError::OtherArchitecture("arm64")),
        Some(b"RSC\x05") => return Err(KernelError::OtherArchitecture("RISC-V")),
        _ => {}
    }
    if head.get(0x24..0x28) == Some(b"\x18\x28\x6f\x01") {
        return Err(KernelError::OtherArchitecture("32-bit ARM"));
    }
    if multiboot::find_header(head).is_some() {
        return Err(KernelError::Multiboot("only ELF files are supported, give the .elf or .flat"));
    }
    Err(KernelError::NotAKernel(looks_like(head)))
}

fn identify_elf(head: &[u8]) -> Result<KernelKind, KernelError> {
    match elf::machine(head)? {
        Machine::X86_64 | Machine::I386 => {}
        Machine::Other(name) => return Err(KernelError::OtherArchitecture(name)),
    }
    if !elf::is_executable(head) {
        return Err(KernelError::NotAKernel(LooksLike::ElfOther));
    }
    Ok(if multiboot::find_header(head).is_some() { KernelKind::Multiboot } else { KernelKind::Elf })
}

fn looks_like(head: &[u8]) -> LooksLike {
    if head.is_empty() {
        return LooksLike::Empty;
    }
    let has = |offset: usize, magic: &[u8]| {
        head.get(offset..).is_some_and(|rest| rest.starts_with(magic))
    };
    if let Some((_, _, what)) = MAGIC.iter().find(|(offset, magic, _)| has(*offset, magic)) {
        return LooksLike::Known(what);
    }
    if has(0, b"MZ") {
        return LooksLike::EfiProgram;
    }
    if has(510, b"\x55\xaa") {
        return LooksLike::Known("a disk image or boot sector");
    }
    let text = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | 0x1b | 0x20..=0x7e | 0x80..);
    if head.iter().all(text) && std::str::from_utf8(head.get(..64).unwrap_or(head)).is_ok() {
        return LooksLike::Text;
    }
    LooksLike::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(head: &[u8]) -> String {
        identify(head).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_kernel_is_called_by_its_name() {
        assert!(says(b"").contains("an empty file"));
        assert!(says(b"\x1f\x8b\x08\0\0\0").contains("gzip"));
        assert!(says(b"#!/bin/sh\necho hello\n").contains("a text file"));
        assert!(says(b"070701000123").contains("--initrd"));
        assert!(says(&[1, 2, 3, 4]).contains("no known format"));
        let mut pe = vec![0; 512];
        pe[..2].copy_from_slice(b"MZ");
        assert!(says(&pe).contains("EFI program"));
    }

    #[test]
    fn other_architectures_are_named() {
        let mut image = vec![0; 64];
        image[..2].copy_from_slice(b"MZ");
        image[0x38..0x3c].copy_from_slice(b"ARM\x64");
        assert!(says(&image).contains("arm64"));
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64, 0);
        elf[16] = 2;
        elf[18] = 183;
        assert!(says(&elf).contains("a kernel for arm64"));
        elf[18] = 62;
        assert_eq!(identify(&elf).unwrap(), KernelKind::Elf);
        elf[7] = 3;
        assert!(says(&elf).contains("not linked as a kernel"));
        for shared_or_object in [1, 3, 4] {
            elf[16] = shared_or_object;
            assert!(says(&elf).contains("not linked as a kernel"));
        }
    }
}
