//! Kernels for the 64-bit lguest ABI: known by their note, loaded with page tables and a
//! start info (`docs/lguest-abi.md`, sections 1 to 3; [`lguest_abi::long`]).
//!
//! What the host makes lies at the end of RAM, downwards: initrd, page tables, command line,
//! start info. The guest takes that memory back when it has read it.

use std::ops::Range;

use lguest_abi::long::entry::{DIRECT_MAP, KERNEL_MAP, START_MAGIC, StartInfo};
use lguest_abi::long::note::{self, Descriptor};
use lguest_abi::long::{VERSION, Wire};
use softcpu::addr::{PAGE_OFFSET, PAGE_SIZE};

use super::super::elf::{Class, Executable, Machine, Segment};
use super::super::error::{KernelError, LoadError};
use super::super::image::Image;
use super::super::place::Placer;
use super::super::{BootSource, initrd};
use super::long_tables::{Tables, Translations};
use crate::memory::GuestRam;

/// Segments lie at or above this physical address.
const LOWEST: u64 = 0x10_0000;
/// The longest command line, without the zero that ends it.
const COMMAND_LINE_MAX: usize = 4095;

/// What the host has to say to the guest.
#[derive(Clone, Copy, Debug)]
pub struct LongTold {
    /// Bytes of RAM; the bus is above.
    pub memory: u64,
    /// Bytes of the bus.
    pub bus_len: u64,
    /// Features on offer.
    pub features: u64,
    /// How fast the TSC counts.
    pub tsc_khz: u64,
    /// Random bytes.
    pub seed: [u8; 32],
}

/// A guest that is ready to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongGuest {
    /// The first instruction, virtual.
    pub entry: u64,
    /// The top level of its page tables, physical.
    pub tables: u64,
    /// The start info, in the direct map.
    pub start_info: u64,
}

/// Whether this ELF file has the note.
pub(super) fn is_long_guest(image: &Image) -> Result<bool, KernelError> {
    let Ok(kernel) = Executable::read(image.section(0, image.len())) else { return Ok(false) };
    if kernel.class() != Class::Bits64 || kernel.machine() != Machine::X86_64 {
        return Ok(false);
    }
    Ok(find_note(&kernel, image)?.is_some())
}

fn find_note<R: std::io::Read>(
    kernel: &Executable<R>,
    image: &Image,
) -> Result<Option<Descriptor>, KernelError> {
    for segment in kernel.note_segments(image)? {
        if let Some(found) = note::find(&segment).map_err(KernelError::LongNote)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Loads a kernel with the note into fresh RAM without a hole, of which the bus takes the end.
///
/// # Errors
/// [`LoadError`]: whatever is wrong with what the user gave.
pub fn load_long(
    ram: &GuestRam,
    source: &BootSource<'_>,
    told: LongTold,
) -> Result<LongGuest, LoadError> {
    let name = source.kernel.name();
    let in_kernel = |reason: KernelError| LoadError::Kernel { name: name.to_owned(), reason };
    let mut placer = Placer::new(ram);
    let kernel = load_kernel(source.kernel, &mut placer).map_err(in_kernel)?;
    let end = kernel.image.end;
    if end > told.memory {
        return Err(in_kernel(KernelError::TooBig { needed: end }));
    }
    if source.command_line.len() > COMMAND_LINE_MAX {
        let len = source.command_line.len();
        return Err(LoadError::CommandLineTooLong { len, max: COMMAND_LINE_MAX });
    }
    if source.command_line.contains('\0') {
        return Err(LoadError::CommandLineZero);
    }
    let last = told.memory.saturating_sub(1);
    let initrd = initrd::place_together(&mut placer, source.initrds, end, last)?;
    let top = initrd.as_ref().map_or(told.memory, |range| range.start);

    let translations = translations(&kernel, told);
    let len = Tables::bytes(&translations);
    let line = source.command_line.as_bytes();
    // Below the tables: a page for the command line and its zero, and one for the start info.
    let room = len.saturating_add(PAGE_SIZE.saturating_mul(2));
    let start = top.checked_sub(room).filter(|start| *start >= end).ok_or_else(|| {
        let missing = end.saturating_add(room).saturating_sub(top);
        in_kernel(KernelError::TooBig { needed: told.memory.saturating_add(missing) })
    })?;
    let (line_at, tables_at) =
        (start.saturating_add(PAGE_SIZE), start.saturating_add(PAGE_SIZE.saturating_mul(2)));
    placer.claim(start, room, "boot structures")?;
    placer.write(line_at, line, "command line")?;
    let tables = Tables::build(&translations, tables_at);
    placer.write(tables_at, &tables, "page tables")?;
    let initrd = initrd.unwrap_or(top..top);
    let info = StartInfo {
        magic: START_MAGIC,
        size: size_of::<StartInfo>() as u32,
        flags: 0,
        version_min: VERSION,
        version_max: VERSION,
        features: told.features,
        memory: told.memory,
        kernel: kernel.image.start,
        kernel_len: end.saturating_sub(kernel.image.start),
        cmdline: line_at,
        cmdline_len: line.len() as u64,
        initrd: initrd.start,
        initrd_len: initrd.end.saturating_sub(initrd.start),
        tables: tables_at,
        tables_start: tables_at,
        tables_len: len,
        direct_map: DIRECT_MAP,
        bus: told.memory,
        bus_len: told.bus_len,
        tsc_khz: told.tsc_khz,
        seed: told.seed,
    };
    let mut bytes = [0; size_of::<StartInfo>()];
    // The bytes are just as many as it takes.
    info.write(&mut bytes);
    placer.write(start, &bytes, "start info")?;
    let (entry, start_info) = (kernel.note.entry, DIRECT_MAP.saturating_add(start));
    tracing::debug!(entry = format_args!("{entry:#x}"), end, "64-bit lguest guest loaded");
    Ok(LongGuest { entry, tables: tables_at, start_info })
}

/// A kernel in RAM.
struct Kernel {
    note: Descriptor,
    image: Range<u64>,
    /// What is mapped where it is linked.
    mapped: Vec<Segment>,
}

fn load_kernel(image: &Image, placer: &mut Placer<'_>) -> Result<Kernel, KernelError> {
    let mut kernel = Executable::read(image.section(0, image.len()))?;
    let note = find_note(&kernel, image)?;
    let note = note.ok_or(KernelError::LongImage("it has no lguest note"))?;
    kernel.load(placer)?;
    let start = kernel.loaded().map(|segment| segment.paddr).min().unwrap_or(0);
    if start < LOWEST {
        return Err(KernelError::LongImage("a segment lies below 1 MiB"));
    }
    let mapped: Vec<Segment> =
        kernel.loaded().filter(|segment| segment.vaddr >= KERNEL_MAP).copied().collect();
    check(&mapped)?;
    Ok(Kernel { note, image: start..kernel.end(), mapped })
}

/// Pages of one segment, by virtual address; the first page and the one behind the last.
fn pages(segment: &Segment) -> Option<Range<u64>> {
    // A segment may end with the address space.
    let last = segment.vaddr.checked_add(segment.memsz.checked_sub(1)?)?;
    Some(segment.vaddr & !PAGE_OFFSET..last | PAGE_OFFSET)
}

fn check(segments: &[Segment]) -> Result<(), KernelError> {
    for (n, segment) in segments.iter().enumerate() {
        if (segment.vaddr ^ segment.paddr) & PAGE_OFFSET != 0 {
            return Err(KernelError::LongImage(
                "the lowest 12 bits of a segment's virtual and physical address differ",
            ));
        }
        let here = pages(segment);
        let here = here.ok_or(KernelError::LongImage("a segment goes beyond all addresses"))?;
        let shares = |other: &Segment| {
            pages(other).is_some_and(|there| there.start < here.end && here.start < there.end)
        };
        if segments.iter().skip(n.saturating_add(1)).any(shares) {
            return Err(KernelError::LongImage("two segments share a page"));
        }
    }
    Ok(())
}

/// The three maps of section 3.
fn translations(kernel: &Kernel, told: LongTold) -> Vec<Translations> {
    let mut all = vec![
        Translations::ram(0, told.memory, true),
        Translations::ram(DIRECT_MAP, told.memory.saturating_add(told.bus_len), false),
    ];
    all.extend(kernel.mapped.iter().map(|segment| {
        Translations {
            at: segment.vaddr & !PAGE_OFFSET,
            phys: segment.paddr & !PAGE_OFFSET,
            len: segment
                .memsz
                .saturating_add(segment.paddr & PAGE_OFFSET)
                .checked_next_multiple_of(PAGE_SIZE)
                .unwrap_or(0),
            writable: segment.is_writable(),
            executable: segment.is_executable(),
            large: false,
        }
    }));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loader::{PlatformKind, platform_of};

    /// A 64-bit ELF file with these segments (kind, flags, vaddr, paddr, bytes).
    fn elf(segments: &[(u32, u32, u64, u64, &[u8])]) -> Image {
        let mut head = b"\x7fELF\x02\x01\x01".to_vec();
        head.resize(16, 0);
        head.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        let mut body = Vec::new();
        let mut table = Vec::new();
        let behind = 64 + 56 * segments.len();
        for (kind, flags, vaddr, paddr, bytes) in segments {
            table.extend([kind.to_le_bytes(), flags.to_le_bytes()].concat());
            let at = (behind + body.len()) as u64;
            let len = bytes.len() as u64;
            for word in [at, *vaddr, *paddr, len, len, 4] {
                table.extend(word.to_le_bytes());
            }
            body.extend_from_slice(bytes);
        }
        for word in [0_u64, 64, 0] {
            head.extend(word.to_le_bytes());
        }
        head.extend([0, 0, 0, 0, 64, 0, 56, 0, segments.len() as u8, 0, 0, 0, 0, 0, 0, 0]);
        Image::from_bytes("it", [head, table, body].concat())
    }

    fn noted(version: u32) -> [u8; note::NOTE_BYTES] {
        let entry = KERNEL_MAP;
        note::note_bytes(Descriptor {
            version_min: version,
            version_max: version,
            entry,
            features: 0,
        })
    }

    const CODE: (u32, u32, u64, u64, &[u8]) = (1, 5, KERNEL_MAP, 0x10_0000, &[0x90; 5000]);

    fn load(image: &Image, memory: u64) -> Result<(LongGuest, GuestRam), String> {
        let ram = GuestRam::without_hole(memory + 4096).unwrap();
        let source = BootSource {
            kernel: image,
            initrds: &[Image::from_bytes("initrd", vec![7; 5000])],
            command_line: "a b",
            cpus: std::num::NonZeroU32::MIN,
        };
        let told =
            LongTold { memory, bus_len: 4096, features: 3, tsc_khz: 1_000_000, seed: [9; 32] };
        let guest = load_long(&ram, &source, told).map_err(|error| error.to_string())?;
        Ok((guest, ram))
    }

    #[test]
    fn the_note_decides_and_says_what_is_wrong() {
        let kind = |image: &Image| platform_of(image).map_err(|error| error.to_string());
        let with = |note: &[u8]| elf(&[CODE, (4, 4, 0, 0, note)]);
        assert_eq!(kind(&with(&noted(1))), Ok(PlatformKind::LguestLong));
        assert_eq!(kind(&elf(&[CODE])), Ok(PlatformKind::Pc));
        assert!(kind(&with(&noted(2))).unwrap_err().contains("speaks versions 2 to 2"));
    }

    #[test]
    fn everything_told_lies_in_ram_outside_the_image() {
        let image = elf(&[CODE, (4, 4, 0, 0, &noted(1))]);
        let memory = 64 << 20;
        let (guest, ram) = load(&image, memory).unwrap();
        assert_eq!(guest.entry, KERNEL_MAP);
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            let at = vm_memory::GuestAddress(at);
            vm_memory::Bytes::read_slice(ram.mmap().as_ref(), &mut bytes, at).unwrap();
            bytes
        };
        let info = StartInfo::read(&read(guest.start_info - DIRECT_MAP, 176)).unwrap();
        assert_eq!((info.memory, info.bus, info.bus_len), (memory, memory, 4096));
        assert_eq!((info.kernel, info.kernel_len), (0x10_0000, 5000));
        assert_eq!(read(info.cmdline, 4), b"a b\0");
        assert_eq!(read(info.initrd, 5000), [7; 5000]);
        assert_eq!(info.initrd % 4096, 0);
        assert!(info.tables_start + info.tables_len <= info.initrd);
        assert_eq!((info.tables, info.seed), (guest.tables, [9; 32]));
    }

    #[test]
    fn images_against_the_rules_are_refused_by_name() {
        let note = noted(1);
        let note: (u32, u32, u64, u64, &[u8]) = (4, 4, 0, 0, &note);
        let refused = |segments: &[_]| load(&elf(segments), 64 << 20).unwrap_err();
        let low = (1, 5, KERNEL_MAP, 0x8_0000, CODE.4);
        assert!(refused(&[low, note]).contains("below 1 MiB"));
        let skewed = (1, 5, KERNEL_MAP + 8, 0x10_0000, CODE.4);
        assert!(refused(&[skewed, note]).contains("12 bits"));
        let near = (1, 6, KERNEL_MAP + 0x1800, 0x20_0800, CODE.4);
        assert!(refused(&[CODE, near, note]).contains("share a page"));
        let beyond = (1, 6, u64::MAX - 0xfff, 0x20_0000, CODE.4);
        assert!(refused(&[beyond, note]).contains("beyond all addresses"));
        let high = (1, 5, KERNEL_MAP, 0x400_0000, CODE.4);
        assert!(refused(&[high, note]).contains("give --mem"));
    }
}
