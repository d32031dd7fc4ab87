//! The loader as a whole, on made-up images.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::payload::Format;
use super::synthetic::*;
use super::*;
use crate::layout::{HIGH_MEMORY, HOLE_START};
use crate::memory::{MIB, MIN_RAM};

const CPUS: NonZeroU32 = NonZeroU32::new(2).unwrap();

fn load_with(
    mib: u64,
    kernel: Vec<u8>,
    initrds: &[Image],
    command_line: &str,
) -> (GuestRam, Result<LoadedGuest, LoadError>) {
    let ram = GuestRam::new(mib * MIB).unwrap();
    let kernel = Image::from_bytes("vmlinuz", kernel);
    let source = BootSource { kernel: &kernel, initrds, command_line, cpus: CPUS };
    let loaded = load(&ram, &source);
    (ram, loaded)
}

fn error(kernel: Vec<u8>) -> String {
    load_with(64, kernel, &[], "").1.unwrap_err().to_string()
}

fn bytes(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.mmap().read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn u32_at(ram: &GuestRam, at: u64) -> u32 {
    ram.mmap().read_obj(GuestAddress(at)).unwrap()
}

fn u64_at(ram: &GuestRam, at: u64) -> u64 {
    ram.mmap().read_obj(GuestAddress(at)).unwrap()
}

/// [`vmlinux`]'s segments are where they belong, and nothing behind them is.
fn assert_vmlinux(ram: &GuestRam) {
    let file = vmlinux();
    let code = 64 + 56 * 2;
    assert!(bytes(ram, 0x100_0000, 0x1_0000) == file[code..code + 0x1_0000]);
    assert_eq!(bytes(ram, 0x100_0000 + 0x1_0000, 16), [0; 16]);
    assert_eq!(bytes(ram, 0x120_0000, 3000), vec![0xda; 3000]);
    assert_eq!(bytes(ram, 0x120_0000 + 3000, 5000), vec![0; 5000]);
}

#[test]
fn a_bzimage_loads_in_every_format() {
    for format in FORMATS {
        let (ram, loaded) =
            load_with(64, linux(format), &[Image::from_bytes("initrd", vec![7; 5000])], "quiet");
        let EntryPoint::Linux64 { rip, boot_params } = loaded.unwrap().entry else {
            panic!("{format}")
        };
        assert_eq!(rip.0, 0x100_0040, "{format}");
        assert_vmlinux(&ram);
        let params = boot_params.0;
        assert_eq!(bytes(&ram, params + 0x202, 4), b"HdrS");
        assert_eq!(bytes(&ram, params + 0x210, 2), [0xff, 1]);
        let cmd_line = u32_at(&ram, params + 0x228).into();
        assert_eq!(bytes(&ram, cmd_line, 6), b"quiet\0");
        let (initrd, len) = (u32_at(&ram, params + 0x218), u32_at(&ram, params + 0x21c));
        assert_eq!(bytes(&ram, initrd.into(), len as usize), vec![7; 5000]);
        assert_eq!(bytes(&ram, u64_at(&ram, params + 0x70), 8), b"RSD PTR ");
        assert_eq!(bytes(&ram, params + 0x1e8, 1), [4]);
    }
}

#[test]
fn a_vmlinux_is_entered_by_its_note_or_else_at_its_entry() {
    let code = Part::load(0x100_0000, vec![0x90; 4096], 8192);
    let plain = elf64(0x100_0010, std::slice::from_ref(&code));
    let (ram, loaded) = load_with(64, plain, &[], "");
    let EntryPoint::Linux64 { rip, boot_params } = loaded.unwrap().entry else { panic!() };
    assert_eq!(rip.0, 0x100_0010);
    assert_eq!(u32_at(&ram, boot_params.0 + 0x202), 0x5372_6448);

    let noted = elf64(0x100_0010, &[code.clone(), Part::pvh_note(0x100_0020)]);
    let (ram, loaded) = load_with(64, noted, &[Image::from_bytes("i", vec![1; 10])], "ro");
    let EntryPoint::Pvh { eip, start_info } = loaded.unwrap().entry else { panic!() };
    assert_eq!((eip.0, u32_at(&ram, start_info.0)), (0x100_0020, 0x336e_c578));
    assert_eq!(bytes(&ram, u64_at(&ram, start_info.0 + 24), 3), b"ro\0");
    assert_eq!(bytes(&ram, u64_at(&ram, start_info.0 + 32), 8), b"RSD PTR ");

    let wild = elf64(0x100_0010, &[code.clone(), Part::pvh_note(0x200_0000)]);
    assert!(error(wild).contains("PVH entry point lies outside"));
    let (_, loaded) =
        load_with(64, elf32(0x100_0000, &[code.clone(), Part::pvh_note(0x100_0000)]), &[], "");
    assert!(matches!(loaded.unwrap().entry, EntryPoint::Pvh { .. }));
    assert!(error(elf32(0x100_0000, &[code])).contains("32-bit x86 kernel without PVH entry"));
}

#[test]
fn multiboot_gets_modules_command_line_and_map() {
    let code = [multiboot_header(3), vec![0x90; 100]].concat();
    let file = elf32(0x40_000c, &[Part::load(0x40_0000, code, 0x10_0000)]);
    let initrds = [
        Image::from_bytes("env", b"NR_CPUS=2\n".to_vec()),
        Image::from_bytes("second", vec![2; 9]),
    ];
    let (ram, loaded) = load_with(64, file, &initrds, "arg");
    let EntryPoint::Multiboot { eip, info } = loaded.unwrap().entry else { panic!() };
    assert_eq!(eip.0, 0x40_000c);
    assert_eq!(bytes(&ram, u32_at(&ram, info.0 + 16).into(), 12), b"vmlinuz arg\0");
    let mods = u64::from(u32_at(&ram, info.0 + 24));
    assert_eq!(u32_at(&ram, info.0 + 20), 2);
    assert_eq!(bytes(&ram, u32_at(&ram, mods).into(), 10), b"NR_CPUS=2\n");
    assert_eq!(u32_at(&ram, mods + 4) - u32_at(&ram, mods), 10);

    // Linked to low memory, as kernels that stay in real mode are.
    let low = [multiboot_header(0), vec![0x90; 0x6000]].concat();
    let (_, loaded) = load_with(64, elf32(0x800c, &[Part::load(0x8000, low, 0x8000)]), &[], "");
    assert!(matches!(loaded.unwrap().entry, EntryPoint::Multiboot { .. }));

    let video = [multiboot_header(7), vec![0x90; 100]].concat();
    assert!(
        error(elf32(0x40_000c, &[Part::load(0x40_0000, video.clone(), 200)]))
            .contains("video mode")
    );
    assert!(error(video).contains("only ELF files"));
}

#[test]
fn what_is_wrong_with_a_kernel_is_said() {
    let good = linux(Format::Gzip);
    let edited = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        error(file)
    };
    assert!(edited(0x206, &[7, 2]).contains("boot protocol 2.07"));
    assert!(edited(0x236, &[0]).contains("32-bit"));
    assert!(edited(0x24c, &[0; 4]).contains("names no payload"));
    assert!(edited(0x24c, &[0xff; 4]).contains("truncated"));
    assert!(edited(0x248, &[0xff; 4]).contains("truncated"));
    assert!(edited(5 * 512 + 0x180, b"abc").contains("unknown format"));
    assert!(edited(5 * 512 + 0x180 + 300, &[0xff; 40]).contains("damaged: its gzip payload"));
    assert!(error(linux(Format::Lzo)).contains("lzo"));
    assert!(error(bzimage(&compress(Format::Xz, b"no ELF file"), 11)).contains("no ELF"));
    let payload = elf32(0x100_0000, &[Part::load(0x100_0000, vec![0], 1)]);
    assert!(error(bzimage(&compress(Format::Xz, &payload), 11)).contains("32-bit"));
}

#[test]
fn what_is_wrong_with_segments_is_said() {
    let one =
        |paddr, len: usize, memsz| error(elf64(paddr, &[Part::load(paddr, vec![1; len], memsz)]));
    assert!(one(0x100_0000, 8, 100 * MIB).contains("it needs 116 MiB, so give --mem 116M"));
    assert!(
        one(0xffff_ffff_8000_0000, 8, 8).contains("linked for physical address 0xffffffff80000000")
    );
    assert!(one(u64::MAX, 8, 8).contains("linked for physical"));
    assert!(one(HOLE_START.0, 8, 8).contains("linked for physical"));
    assert!(one(0x100_0000, 8, 4).contains("larger in the file"));
    assert!(one(0x7000, 8, 8).contains("would overlap the boot information"));
    assert!(one(0xe_0000, 8, 8).contains("would overlap the ACPI tables"));
    // The command line is placed after the kernel, so the clash is found from its side.
    assert!(one(0x2_0000, 8, 8).contains("overlap"));
    assert!(error(elf64(0x100_0000, &[])).contains("no segments"));
    let twice = vec![Part::load(0x100_0000, vec![1; 8], 8); 2];
    assert!(error(elf64(0x100_0000, &twice)).contains("overlap the kernel"));
    let elsewhere = elf64(0x100_0100, &[Part::load(0x100_0000, vec![1; 8], 0x1000)]);
    assert!(error(elsewhere).contains("entry point"));
}

#[test]
fn command_lines_have_limits() {
    let (_, loaded) = load_with(64, linux(Format::Zstd), &[], &"x".repeat(2047));
    loaded.unwrap();
    let (_, loaded) = load_with(64, linux(Format::Zstd), &[], &"x".repeat(2048));
    assert!(
        loaded.unwrap_err().to_string().contains("2048 bytes long, but this kernel takes 2047")
    );
    let (_, loaded) = load_with(64, linux(Format::Zstd), &[], "a\0b");
    assert!(matches!(loaded.unwrap_err(), LoadError::CommandLineZero));
}

#[test]
fn a_file_may_be_cut_off_anywhere() {
    let full = linux(Format::Xz);
    let (ram, loaded) = load_with(64, full.clone(), &[], "");
    loaded.unwrap();
    let source = |kernel: &[u8]| Image::from_bytes("vmlinuz", kernel.to_vec());
    let payload_end = full.len() - 100;
    for end in (0..payload_end).step_by(7).chain(payload_end - 20..payload_end) {
        let kernel = source(&full[..end]);
        let source = BootSource { kernel: &kernel, initrds: &[], command_line: "", cpus: CPUS };
        assert!(load(&ram, &source).is_err(), "{end}");
    }
    let elf = vmlinux();
    for end in (0..64 + 56 * 2 + 0x1_0000 + 3000).step_by(101) {
        let kernel = source(&elf[..end]);
        let source = BootSource { kernel: &kernel, initrds: &[], command_line: "", cpus: CPUS };
        assert!(load(&ram, &source).is_err(), "{end}");
    }
}

#[test]
fn a_bomb_does_not_go_off() {
    // A header that claims a segment at the end of 4 GiB of zeroes, 4 MiB compressed.
    let mut elf = elf64(0x100_0000, &[Part::load(0x100_0000, vec![1; 8], 8)]);
    elf[64 + 8..64 + 16].copy_from_slice(&(4u64 << 30).to_le_bytes());
    elf.resize(8 << 20, 0);
    let started = std::time::Instant::now();
    assert!(error(bzimage(&compress(Format::Zstd, &elf), 0)).contains("too big"));
    assert!(started.elapsed().as_secs() < 5);
}

#[test]
fn memory_may_be_of_any_size() {
    for mib in [32, 64, 512, 3071, 3072, 3073, 4096, 6000] {
        let initrd =
            [Image::from_bytes("a", vec![1; 3 << 20]), Image::from_bytes("b", vec![2; 999])];
        let (ram, loaded) = load_with(mib, linux(Format::Lz4), &initrd, "console=ttyS0");
        let mut placed = loaded.unwrap().placed;
        placed.sort_by_key(|placed| placed.range.start);
        for pair in placed.windows(2) {
            assert!(pair[0].range.end <= pair[1].range.start, "{mib}: {pair:?}");
        }
        let map = memory_map(&ram);
        for Placed { range, what } in placed {
            assert!(range.end <= ram.low_end().0, "{mib} {what}");
            let within = |entry: &&MapEntry| {
                entry.start <= range.start && range.end <= entry.start + entry.len
            };
            let kind = map.iter().find(within).map(|entry| entry.kind);
            let expected = if ["ACPI tables", "reset vector"].contains(&what) {
                RangeType::Reserved
            } else {
                RangeType::Usable
            };
            assert_eq!(kind, Some(expected), "{mib} {what}");
            assert!(what != "initrd" || (range.end <= 0x8000_0000 && range.start % 4096 == 0));
            assert!(what != "kernel" || range.start >= HIGH_MEMORY.0);
        }
    }
}

/// The seeds of the fuzz target, written where its replay (`tests/loader_fuzz.rs`) finds
/// them. Run with `--ignored` after changing what images look like.
#[test]
#[ignore = "writes the corpus into the source tree"]
fn write_corpus() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz_corpus/loader");
    let seed = |name: &str, choice: u8, kernel: Vec<u8>| {
        let bytes = [vec![choice], kernel].concat();
        assert!(bytes.len() < 16 << 10, "{name} is {}", bytes.len());
        std::fs::write(format!("{directory}/{name}"), bytes).unwrap();
    };
    let code = Part::load(0x100_0000, vec![0x90; 300], 8192);
    let small = elf64(0x100_0010, &[code.clone(), Part::load(0x101_0000, vec![3; 40], 0x4000)]);
    for format in FORMATS {
        seed(
            &format!("bzimage-{format}"),
            2,
            bzimage(&compress(format, &small), small.len() as u32),
        );
    }
    seed("bzimage-lzo", 0, linux(Format::Lzo));
    seed("vmlinux", 0, small.clone());
    seed("vmlinux-pvh", 1, elf64(0x100_0010, &[code.clone(), Part::pvh_note(0x100_0020)]));
    seed("vmlinux-pvh-32", 3, elf32(0x100_0010, &[code, Part::pvh_note(0x100_0020)]));
    let multiboot = [multiboot_header(3), vec![0x90; 100]].concat();
    seed("multiboot", 5, elf32(0x40_000c, &[Part::load(0x40_0000, multiboot, 0x1000)]));
    seed("text", 0, b"#!/bin/sh\nexec reboot\n".to_vec());
    seed("empty", 255, Vec::new());
    let mut arm64 = vec![0; 64];
    arm64[0x38..0x3c].copy_from_slice(b"ARM\x64");
    seed("arm64", 0, arm64);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn flipped_bits_never_panic(
        format in 0..FORMATS.len(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8u8), 1..6),
        in_headers in any::<bool>(),
    ) {
        let elf = elf64(0x100_0010, &[Part::load(0x100_0000, vec![0x90; 3000], 8192), Part::pvh_note(0x100_0020)]);
        let mut file = match in_headers {
            true => elf,
            false => bzimage(&compress(FORMATS[format], &elf), elf.len() as u32),
        };
        for (index, bit) in flips {
            let at = index.index(file.len());
            file[at] ^= 1 << bit;
        }
        file.insert(0, 1);
        fuzz::fuzz_loader(&file);
    }

    #[test]
    fn initrds_of_any_size_never_overlap_anything(sizes in prop::collection::vec(0..9_000_000usize, 0..4)) {
        let initrds: Vec<Image> = sizes.iter().map(|size| Image::from_bytes("i", vec![1; *size])).collect();
        let (_, loaded) = load_with(MIN_RAM / MIB, linux(Format::Zstd), &initrds, "");
        match loaded {
            Ok(guest) => prop_assert!(guest.placed.iter().all(|placed| placed.range.end <= MIN_RAM)),
            Err(LoadError::InitrdTooBig { needed, .. }) => prop_assert!(needed > MIN_RAM),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}

/// A real kernel, for looking at by hand: times, addresses, and what RAM then holds.
#[test]
#[ignore = "set LGUEST_KERNEL to a kernel file"]
fn a_real_kernel_loads() {
    let path = std::env::var("LGUEST_KERNEL").unwrap();
    let ram = GuestRam::new(512 * MIB).unwrap();
    let kernel = Image::open(path.as_ref()).unwrap();
    let source =
        BootSource { kernel: &kernel, initrds: &[], command_line: "console=ttyS0", cpus: CPUS };
    let started = std::time::Instant::now();
    let guest = load(&ram, &source).unwrap();
    println!("{:?} in {:?}", guest.entry, started.elapsed());
    for placed in &guest.placed {
        println!("{:#012x?} {}", placed.range, placed.what);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().filter(|line| line.starts_with("Vm")).for_each(|line| println!("{line}"));
    if let EntryPoint::Linux64 { rip, .. } = guest.entry {
        println!("first bytes {:02x?}", bytes(&ram, rip.0, 32));
    }
}
