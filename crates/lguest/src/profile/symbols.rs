//! The names of a guest kernel's functions: from a vmlinux with symbols, or a System.map.
//!
//! Untrusted input: lengths and offsets are looked at before use. What is not understood is
//! left out; a file without a single function is refused.
//!
//! Source: System V ABI, chapter 4 (sections, symbol tables).

use std::path::Path;

use crate::Error;

/// A function longer than this has lost the name of what follows it.
const FARTHEST: u64 = 1 << 20;
/// A file of more bytes is no kernel.
const LONGEST: u64 = 4 << 30;

/// `st_info`'s types, section types and flags.
const STT_NOTYPE: u8 = 0;
const STT_FUNC: u8 = 2;
const SHT_SYMTAB: u64 = 2;
const SHF_EXECINSTR: u64 = 4;

/// Functions by address, lowest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Symbols(Vec<(u64, String)>);

impl Symbols {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// It cannot be read, or has no functions.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let complain = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let remedy = "give --symbols a vmlinux with symbols, or a System.map";
        let read = || {
            if std::fs::metadata(path)?.len() > LONGEST {
                return Err(std::io::ErrorKind::FileTooLarge.into());
            }
            std::fs::read(path)
        };
        let bytes = read().map_err(|error| complain(format!("{error}: {remedy}")))?;
        let mut found = if bytes.starts_with(b"\x7fELF") { elf(&bytes) } else { map(&bytes) };
        if found.is_empty() {
            return Err(complain(format!("there are no functions in it: {remedy}")));
        }
        found.sort();
        found.dedup_by_key(|(address, _)| *address);
        Ok(Self(found))
    }

    /// What the code at `rip` is to be called.
    pub(crate) fn name(&self, rip: u64) -> String {
        let after = self.0.partition_point(|(address, _)| *address <= rip);
        match after.checked_sub(1).and_then(|last| self.0.get(last)) {
            Some((address, name)) if rip - address < FARTHEST => format!("guest:{name}"),
            _ => format!("guest:{rip:#x}"),
        }
    }
}

/// The functions of a System.map: lines of address, type and name.
fn map(bytes: &[u8]) -> Vec<(u64, String)> {
    let line = |line: &[u8]| {
        let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let (kind, name) = (words.next()?, words.next()?);
        matches!(kind, "t" | "T" | "w" | "W").then(|| (address, printable(name)))
    };
    bytes.split(|byte| *byte == b'\n').filter_map(line).collect()
}

/// The functions of a 64-bit ELF file.
fn elf(bytes: &[u8]) -> Vec<(u64, String)> {
    functions(bytes).unwrap_or_default()
}

/// One of a section header's fields that matter here.
struct Section {
    kind: u64,
    flags: u64,
    offset: u64,
    len: u64,
    link: u64,
}

fn functions(bytes: &[u8]) -> Option<Vec<(u64, String)>> {
    // 64-bit, little-endian.
    if bytes.get(4..6)? != [2, 1] {
        return None;
    }
    let table = number(bytes, 0x28, 8)?;
    let (size, count) = (number(bytes, 0x3a, 2)?, number(bytes, 0x3c, 2)?);
    let section = |index: u64| {
        let at = index.checked_mul(size)?.checked_add(table)?;
        let field = |offset: u64, len| number(bytes, at.checked_add(offset)?, len);
        Some(Section {
            kind: field(4, 4)?,
            flags: field(8, 8)?,
            offset: field(0x18, 8)?,
            len: field(0x20, 8)?,
            link: field(0x28, 4)?,
        })
    };
    let sections: Vec<Section> = (0..count).map_while(section).collect();
    let symbols = sections.iter().find(|section| section.kind == SHT_SYMTAB)?;
    let names = part(bytes, sections.get(usize::try_from(symbols.link).ok()?)?)?;
    let function = |symbol: &[u8; 24]| {
        let kind = symbol[4] & 0xf;
        let holder = sections.get(usize::from(u16::from_le_bytes([symbol[6], symbol[7]])))?;
        if !matches!(kind, STT_NOTYPE | STT_FUNC) || holder.flags & SHF_EXECINSTR == 0 {
            return None;
        }
        let at = usize::try_from(number(symbol, 0, 4)?).ok()?;
        let name = names.get(at..)?.split(|byte| *byte == 0).next()?;
        let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty())?;
        Some((number(symbol, 8, 8)?, printable(name)))
    };
    Some(part(bytes, symbols)?.as_chunks::<24>().0.iter().filter_map(function).collect())
}

fn part<'a>(bytes: &'a [u8], section: &Section) -> Option<&'a [u8]> {
    let start = usize::try_from(section.offset).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(section.len).ok()?)?)
}

/// The little-endian number of `len` bytes, at most 8, at `at`.
fn number(bytes: &[u8], at: u64, len: usize) -> Option<u64> {
    let start = usize::try_from(at).ok()?;
    let part = bytes.get(start..start.checked_add(len)?)?;
    Some(part.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Names are lines in a file that others read.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }).take(256).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Status;

    const MAP: &str = "0000000000000000 D per_cpu_start\n\
                       ffffffff81000000 T _text\n\
                       ffffffff81000040 t helper\n\
                       ffffffff81000040 T alias\n\
                       nonsense\n";

    fn opened(bytes: &[u8]) -> Result<Symbols, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("symbols");
        std::fs::write(&path, bytes).unwrap();
        Symbols::open(&path)
    }

    #[test]
    fn code_is_named_by_the_function_it_is_in() {
        let symbols = opened(MAP.as_bytes()).unwrap();
        assert_eq!(symbols.name(0xffff_ffff_8100_003f), "guest:_text");
        assert_eq!(symbols.name(0xffff_ffff_8100_0040), "guest:alias");
        assert_eq!(symbols.name(0x40_1000), "guest:0x401000", "data has no code");
        assert_eq!(symbols.name(0xffff_ffff_9100_0040), "guest:0xffffffff91000040");
        assert_eq!(Symbols::default().name(16), "guest:0x10");
    }

    #[test]
    fn an_elf_file_has_its_functions() {
        // This test itself is one.
        let path = std::env::current_exe().unwrap();
        let bytes = std::fs::read(path).unwrap();
        let found = elf(&bytes);
        assert!(found.iter().any(|(_, name)| name.contains("an_elf_file_has_its_functions")));
        // No part of it makes the reader fall over.
        for len in [0, 5, 6, 0x3d, 0x40, 4096, bytes.len() / 2, bytes.len() - 1] {
            elf(&bytes[..len]);
        }
        let mut head = bytes[..0x40].to_vec();
        head[0x28..0x30].fill(0xff);
        head[0x3a..0x3e].fill(0xff);
        assert!(elf(&head).is_empty());
    }

    #[test]
    fn what_has_no_functions_is_one_line_with_a_remedy() {
        for bytes in [&b""[..], b"\x7fELF", b"ffffffff81000000 D data\n", &[0xff; 100]] {
            let error = opened(bytes).unwrap_err();
            assert!(error.to_string().contains("System.map"), "{error}");
            assert_eq!(error.status(), Status::BadInput);
        }
        assert!(Symbols::open(Path::new("/nonexistent/map")).is_err());
    }
}
