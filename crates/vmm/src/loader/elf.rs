//! ELF executables: the headers, the loading of segments, the notes.
//!
//! A vmlinux is read as a stream, because that is what comes out of a decompressor:
//! headers first, then segments in the order of the file, each straight to its physical
//! address. Nothing is held on the host but a bounce buffer. Fields are untrusted: what
//! does not fit the file or guest RAM is an error.
//!
//! Source: System V ABI, chapters 4 and 5 (object files, program loading).

use std::io::{self, Cursor, Read};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::error::KernelError;
use super::image::Image;
use super::place::Placer;
use crate::layout::HOLE_START;

const ELFMAG: &[u8] = b"\x7fELF";
const ELFCLASS32: u8 = 1;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ELFOSABI_GNU: u8 = 3;
const ET_EXEC: u16 = 2;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PF_X: u32 = 1;
const PF_W: u32 = 2;

/// Machines somebody might have a kernel for.
const MACHINES: &[(u16, &str)] = &[
    (2, "SPARC"),
    (8, "MIPS"),
    (20, "32-bit PowerPC"),
    (21, "PowerPC 64"),
    (22, "s390"),
    (40, "32-bit ARM"),
    (43, "SPARC 64"),
    (50, "Itanium"),
    (183, "arm64"),
    (243, "RISC-V"),
    (258, "LoongArch"),
];

/// Where the program headers must end: kernels have them right behind the ELF header.
const HEADERS_LIMIT: u64 = 0x1_0000;
/// The largest note segment that is looked at.
const NOTES_LIMIT: u64 = 0x1_0000;
/// How much is copied at a time.
const CHUNK: usize = 0x4_0000;

/// What `e_machine` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Machine {
    /// x86-64.
    X86_64,
    /// 32-bit x86.
    I386,
    /// Another, by name.
    Other(&'static str),
}

/// Whether `head` begins an ELF file.
pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(ELFMAG)
}

/// The machine an ELF file is for.
pub(super) fn machine(head: &[u8]) -> Result<Machine, KernelError> {
    if head.get(5).is_some_and(|data| *data != ELFDATA2LSB) {
        return Ok(Machine::Other("a big-endian machine"));
    }
    Ok(match u16_at(head, 18)? {
        EM_X86_64 => Machine::X86_64,
        EM_386 => Machine::I386,
        other => {
            let known = MACHINES.iter().find(|(number, _)| *number == other);
            Machine::Other(known.map_or("another machine", |(_, name)| name))
        }
    })
}

/// Whether it is an executable that is linked to fixed addresses, and not marked as a
/// program for Linux's user space (as statically linked ones usually are).
pub(super) fn is_executable(head: &[u8]) -> bool {
    let user_space = head.get(7) == Some(&ELFOSABI_GNU);
    !user_space && u16_at(head, 16).is_ok_and(|kind| kind == ET_EXEC)
}

fn u16_at(head: &[u8], offset: usize) -> Result<u16, KernelError> {
    let bytes = head.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.map(|bytes| u16::from_le_bytes(*bytes)).ok_or(KernelError::Truncated("its ELF header"))
}

/// The part of a 64-bit ELF header behind `e_version`.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header64 {
    e_entry: U64,
    e_phoff: U64,
    _e_shoff: U64,
    _e_flags: U32,
    _e_ehsize: U16,
    e_phentsize: U16,
    e_phnum: U16,
}

/// The same of a 32-bit one.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header32 {
    e_entry: U32,
    e_phoff: U32,
    _e_shoff: U32,
    _e_flags: U32,
    _e_ehsize: U16,
    e_phentsize: U16,
    e_phnum: U16,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ProgramHeader64 {
    p_type: U32,
    p_flags: U32,
    p_offset: U64,
    p_vaddr: U64,
    p_paddr: U64,
    p_filesz: U64,
    p_memsz: U64,
    p_align: U64,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ProgramHeader32 {
    p_type: U32,
    p_offset: U32,
    p_vaddr: U32,
    p_paddr: U32,
    p_filesz: U32,
    p_memsz: U32,
    p_flags: U32,
    p_align: U32,
}

/// ELF's two sizes of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// ELF32.
    Bits32,
    /// ELF64.
    Bits64,
}

/// One program header, of either class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    /// Where it is linked, by virtual address.
    pub(super) vaddr: u64,
    /// Where it lies in physical memory.
    pub(super) paddr: u64,
    filesz: u64,
    /// Its length there.
    pub(super) memsz: u64,
    align: u64,
}

/// An x86 executable, its headers read and the rest still to come.
pub(super) struct Executable<R> {
    class: Class,
    machine: Machine,
    entry: u64,
    segments: Vec<Segment>,
    /// The file from its beginning: what was read for the headers, then the rest.
    stream: io::Chain<Cursor<Vec<u8>>, R>,
}

impl<R: Read> Executable<R> {
    /// Reads the headers from the beginning of an ELF file.
    pub(super) fn read(mut file: R) -> Result<Self, KernelError> {
        // e_ident, e_type, e_machine and e_version are alike in both classes.
        const COMMON: usize = 24;
        const TRUNCATED: KernelError = KernelError::Truncated("its ELF headers");
        let mut head = Vec::new();
        extend(&mut file, &mut head, 64)?;
        if !is_elf(&head) {
            return Err(KernelError::Malformed("what should be its vmlinux is no ELF file"));
        }
        let machine = machine(&head)?;
        if let Machine::Other(name) = machine {
            return Err(KernelError::OtherArchitecture(name));
        }
        let rest = head.get(COMMON..).ok_or(TRUNCATED)?;
        let (class, entry, phoff, phentsize, phnum) = match head.get(4) {
            Some(&ELFCLASS64) => {
                let (h, _) = Header64::ref_from_prefix(rest).map_err(|_| TRUNCATED)?;
                (
                    Class::Bits64,
                    h.e_entry.get(),
                    h.e_phoff.get(),
                    h.e_phentsize.get(),
                    h.e_phnum.get(),
                )
            }
            Some(&ELFCLASS32) => {
                let (h, _) = Header32::ref_from_prefix(rest).map_err(|_| TRUNCATED)?;
                (
                    Class::Bits32,
                    h.e_entry.get().into(),
                    h.e_phoff.get().into(),
                    h.e_phentsize.get(),
                    h.e_phnum.get(),
                )
            }
            _ => return Err(KernelError::Malformed("its ELF class is neither 32 nor 64 bits")),
        };
        let size = u64::from(phentsize).saturating_mul(phnum.into());
        let end = phoff.saturating_add(size);
        if end > HEADERS_LIMIT {
            return Err(KernelError::Malformed("its ELF program headers are not at its beginning"));
        }
        extend(&mut file, &mut head, end)?;
        // Both are below the limit, so they fit.
        let table = head.get(phoff as usize..end as usize).ok_or(TRUNCATED)?;
        let segments = table
            .chunks(usize::from(phentsize).max(1))
            .map(|entry| Segment::read(class, entry))
            .collect::<Option<_>>()
            .ok_or(KernelError::Malformed("its ELF program headers are too short"))?;
        Ok(Self { class, machine, entry, segments, stream: Cursor::new(head).chain(file) })
    }

    /// ELF32 or ELF64.
    pub(super) fn class(&self) -> Class {
        self.class
    }

    /// x86-64 or i386.
    pub(super) fn machine(&self) -> Machine {
        self.machine
    }

    /// `e_entry`, once checked to lie in a segment that has been loaded.
    pub(super) fn entry(&self) -> Result<u64, KernelError> {
        if self.holds_code(self.entry) {
            Ok(self.entry)
        } else {
            Err(KernelError::Malformed("its entry point lies outside it"))
        }
    }

    /// Whether `addr` is inside what a segment brings from the file.
    pub(super) fn holds_code(&self, addr: u64) -> bool {
        self.loaded().any(|s| addr.checked_sub(s.paddr).is_some_and(|offset| offset < s.filesz))
    }

    /// Where the segments end in physical memory: behind bss and brk.
    pub(super) fn end(&self) -> u64 {
        self.loaded().map(|s| s.paddr.saturating_add(s.memsz)).max().unwrap_or(0)
    }

    /// The segments that are loaded.
    pub(super) fn loaded(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.memsz != 0)
    }

    /// Copies all segments to their physical addresses. RAM is zero beforehand, so what
    /// a segment has beyond its part of the file (bss) is only claimed.
    pub(super) fn load(&mut self, placer: &mut Placer<'_>) -> Result<(), KernelError> {
        let mut segments: Vec<Segment> = self.loaded().copied().collect();
        if segments.is_empty() {
            return Err(KernelError::Malformed("it has no segments to load"));
        }
        let ram_end = placer.ram().low_end().0;
        // Debug data between segments is skipped at the cost of decompressing it; more of
        // it than the guest has memory is not a kernel but a decompression bomb.
        let file_limit = ram_end.saturating_mul(2);
        for segment in &segments {
            segment.check(file_limit)?;
        }
        if self.end() > ram_end {
            return Err(KernelError::TooBig { needed: self.end() });
        }
        for segment in &segments {
            placer.claim(segment.paddr, segment.memsz, "kernel")?;
        }
        segments.sort_by_key(|segment| segment.offset);
        let filled =
            |segment: &Segment| segment.paddr..segment.paddr.saturating_add(segment.filesz);
        let filled: Vec<_> = segments.iter().map(filled).collect();
        placer.ram().filled_by(&filled, || self.copy_all(&segments, placer))
    }

    /// Copies `segments`, which come in the order of the file.
    fn copy_all(&mut self, segments: &[Segment], placer: &Placer<'_>) -> Result<(), KernelError> {
        let mut at = 0;
        let mut buffer = vec![0; CHUNK];
        for segment in segments.iter().filter(|segment| segment.filesz != 0) {
            let gap = segment
                .offset
                .checked_sub(at)
                .ok_or(KernelError::Malformed("its segments overlap"))?;
            skip(&mut self.stream, gap, &mut buffer)?;
            copy(&mut self.stream, segment, placer, &mut buffer)?;
            at = segment.offset.saturating_add(segment.filesz);
        }
        Ok(())
    }

    /// What is left of the file after [`load`](Self::load).
    pub(super) fn into_rest(self) -> impl Read {
        self.stream
    }

    /// The note segments, as they lie in `image`.
    pub(super) fn note_segments(&self, image: &Image) -> Result<Vec<Vec<u8>>, KernelError> {
        let notes = self.segments.iter().filter(|segment| segment.kind == PT_NOTE);
        let read = |segment: &Segment| {
            image.bytes_at(segment.offset, segment.filesz.min(NOTES_LIMIT) as usize)
        };
        Ok(notes.map(read).collect::<Result<_, _>>()?)
    }

    /// Finds the note `kind` of `owner` in the note segments, which are read from `image`.
    pub(super) fn note(
        &self,
        image: &Image,
        owner: &[u8],
        kind: u32,
    ) -> Result<Option<Vec<u8>>, KernelError> {
        for segment in self.segments.iter().filter(|segment| segment.kind == PT_NOTE) {
            let notes = image.bytes_at(segment.offset, segment.filesz.min(NOTES_LIMIT) as usize)?;
            let align = if segment.align == 8 { 8 } else { 4 };
            if let Some(description) = find_note(&notes, align, owner, kind) {
                return Ok(Some(description.to_vec()));
            }
        }
        Ok(None)
    }
}

impl Segment {
    /// Whether it may be written to.
    pub(super) const fn is_writable(&self) -> bool {
        self.flags & PF_W != 0
    }

    /// Whether there is code in it.
    pub(super) const fn is_executable(&self) -> bool {
        self.flags & PF_X != 0
    }

    fn read(class: Class, entry: &[u8]) -> Option<Self> {
        Some(match class {
            Class::Bits64 => {
                let (h, _) = ProgramHeader64::ref_from_prefix(entry).ok()?;
                Self {
                    kind: h.p_type.get(),
                    flags: h.p_flags.get(),
                    offset: h.p_offset.get(),
                    vaddr: h.p_vaddr.get(),
                    paddr: h.p_paddr.get(),
                    filesz: h.p_filesz.get(),
                    memsz: h.p_memsz.get(),
                    align: h.p_align.get(),
                }
            }
            Class::Bits32 => {
                let (h, _) = ProgramHeader32::ref_from_prefix(entry).ok()?;
                Self {
                    kind: h.p_type.get(),
                    flags: h.p_flags.get(),
                    offset: h.p_offset.get().into(),
                    vaddr: h.p_vaddr.get().into(),
                    paddr: h.p_paddr.get().into(),
                    filesz: h.p_filesz.get().into(),
                    memsz: h.p_memsz.get().into(),
                    align: h.p_align.get().into(),
                }
            }
        })
    }

    fn check(&self, file_limit: u64) -> Result<(), KernelError> {
        if self.filesz > self.memsz {
            return Err(KernelError::Malformed("a segment is larger in the file than in memory"));
        }
        if self.paddr.checked_add(self.memsz).is_none_or(|end| end > HOLE_START.0) {
            return Err(KernelError::LinkedElsewhere(self.paddr));
        }
        let end = self.offset.saturating_add(self.filesz);
        if end > file_limit { Err(KernelError::TooBig { needed: end }) } else { Ok(()) }
    }
}

/// Reads until `head` is `len` bytes long, or the file ends.
fn extend(file: &mut impl Read, head: &mut Vec<u8>, len: u64) -> Result<(), KernelError> {
    let missing = len.saturating_sub(head.len() as u64);
    file.take(missing).read_to_end(head)?;
    Ok(())
}

fn skip(stream: &mut impl Read, mut len: u64, buffer: &mut [u8]) -> Result<(), KernelError> {
    while len > 0 {
        len = len.saturating_sub(read_chunk(stream, len, buffer)?.len() as u64);
    }
    Ok(())
}

fn copy(
    stream: &mut impl Read,
    segment: &Segment,
    placer: &Placer<'_>,
    buffer: &mut [u8],
) -> Result<(), KernelError> {
    let (mut at, mut left) = (segment.paddr, segment.filesz);
    while left > 0 {
        let chunk = read_chunk(stream, left, buffer)?;
        placer.write(at, chunk, "kernel")?;
        at = at.saturating_add(chunk.len() as u64);
        left = left.saturating_sub(chunk.len() as u64);
    }
    Ok(())
}

/// Reads some bytes, at least one and at most `want`.
fn read_chunk<'b>(
    stream: &mut impl Read,
    want: u64,
    buffer: &'b mut [u8],
) -> Result<&'b [u8], KernelError> {
    let want = buffer.len().min(usize::try_from(want).unwrap_or(usize::MAX));
    let buffer = buffer.get_mut(..want).unwrap_or_default();
    match stream.read(buffer)? {
        0 => Err(KernelError::Truncated("the end of its segments")),
        n => Ok(buffer.get(..n).unwrap_or_default()),
    }
}

/// Walks notes: name size, description size, type, then both, each padded.
fn find_note<'n>(mut notes: &'n [u8], align: usize, owner: &[u8], kind: u32) -> Option<&'n [u8]> {
    loop {
        let (header, rest) = <[U32; 3]>::ref_from_prefix(notes).ok()?;
        let [name_len, description_len, note_kind] = header.map(|field| field.get());
        let (name, rest) = split_padded(rest, name_len, align)?;
        let (description, rest) = split_padded(rest, description_len, align)?;
        if note_kind == kind && name == owner {
            return Some(description);
        }
        notes = rest;
    }
}

fn split_padded(bytes: &[u8], len: u32, align: usize) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(len).ok()?;
    let padded = len.checked_next_multiple_of(align)?.min(bytes.len());
    Some((bytes.get(..len)?, bytes.get(padded..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_found_behind_others() {
        let mut notes = Vec::new();
        for (name, description, kind) in [
            (&b"GNU\0"[..], &b"12345"[..], 3u32),
            (b"Xen\0", b"\x10\0\0\0", 18),
            (b"Xen\0", b"", 19),
        ] {
            notes.extend((name.len() as u32).to_le_bytes());
            notes.extend((description.len() as u32).to_le_bytes());
            notes.extend(kind.to_le_bytes());
            notes.extend(name);
            notes.extend(description);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        assert_eq!(find_note(&notes, 4, b"Xen\0", 18), Some(&b"\x10\0\0\0"[..]));
        assert_eq!(find_note(&notes, 4, b"Xen\0", 19), Some(&b""[..]));
        assert_eq!(find_note(&notes, 4, b"Xen\0", 3), None);
        for end in 0..notes.len() {
            let _ = find_note(&notes[..end], 4, b"none", 0);
        }
    }
}
