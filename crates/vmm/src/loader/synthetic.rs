//! Kernel images made up for tests: small ELF files, compressed in every way, wrapped as
//! a bzImage.

use std::io::{Read, Write};

use liblzma::stream::{Check, Filters, LzmaOptions, Stream};

use super::payload::Format;

/// The formats a bzImage may be compressed in.
pub(super) const FORMATS: [Format; 7] = [
    Format::Gzip,
    Format::Xz,
    Format::Lzma,
    Format::Zstd,
    Format::Lz4,
    Format::Bzip2,
    Format::Plain,
];

/// Compresses as the kernel's build does.
pub(super) fn compress(format: Format, data: &[u8]) -> Vec<u8> {
    let lzma = |stream| {
        let mut out = Vec::new();
        liblzma::read::XzEncoder::new_stream(data, stream).read_to_end(&mut out).unwrap();
        out
    };
    match format {
        Format::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Format::Xz => {
            let mut filters = Filters::new();
            filters.x86().lzma2(&LzmaOptions::new_preset(1).unwrap());
            lzma(Stream::new_stream_encoder(&filters, Check::Crc32).unwrap())
        }
        Format::Lzma => {
            lzma(Stream::new_lzma_encoder(&LzmaOptions::new_preset(1).unwrap()).unwrap())
        }
        Format::Zstd => zstd::stream::encode_all(data, 19).unwrap(),
        Format::Lz4 => {
            let mut out = 0x184c_2102u32.to_le_bytes().to_vec();
            for block in data.chunks(8 << 20) {
                let packed = lz4_flex::block::compress(block);
                out.extend((packed.len() as u32).to_le_bytes());
                out.extend(packed);
            }
            out
        }
        Format::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Format::Lzo => b"\x89LZO\0\r\n\x1a\n".to_vec(),
        Format::Plain => {
            // Must look like an ELF file to be taken for one.
            if data.starts_with(b"\x7fELF") { data.to_vec() } else { [b"\x7fELF", data].concat() }
        }
    }
}

/// A segment of a made-up ELF file.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) kind: u32,
    pub(super) paddr: u64,
    pub(super) data: Vec<u8>,
    pub(super) memsz: u64,
}

impl Part {
    /// PT_LOAD: `data` at `paddr`, zeroes up to `memsz`.
    pub(super) fn load(paddr: u64, data: Vec<u8>, memsz: u64) -> Self {
        Self { kind: 1, paddr, data, memsz }
    }

    /// PT_NOTE with the PVH entry point.
    pub(super) fn pvh_note(entry: u32) -> Self {
        let words = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry];
        let data: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        Self { kind: 4, paddr: 0, memsz: data.len() as u64, data }
    }
}

/// An ELF64 executable for x86-64.
pub(super) fn elf64(entry: u64, parts: &[Part]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    file.extend(entry.to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend([0; 12]);
    for field in [64u16, 56, parts.len() as u16, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    let mut offset = (64 + 56 * parts.len()) as u64;
    for part in parts {
        file.extend(part.kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let len = part.data.len() as u64;
        for field in [offset, part.paddr, part.paddr, len, part.memsz, 4] {
            file.extend(field.to_le_bytes());
        }
        offset += len;
    }
    parts.iter().for_each(|part| file.extend(&part.data));
    file
}

/// An ELF32 executable for i386.
pub(super) fn elf32(entry: u32, parts: &[Part]) -> Vec<u8> {
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0".to_vec();
    for field in [entry, 52, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    for field in [52u16, 32, parts.len() as u16, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    let mut offset = (52 + 32 * parts.len()) as u32;
    for part in parts {
        let (len, paddr) = (part.data.len() as u32, part.paddr as u32);
        for field in [part.kind, offset, paddr, paddr, len, part.memsz as u32, 7, 4] {
            file.extend(field.to_le_bytes());
        }
        offset += len;
    }
    parts.iter().for_each(|part| file.extend(&part.data));
    file
}

/// A multiboot header.
pub(super) fn multiboot_header(flags: u32) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, checksum].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A small kernel: 64 KiB of code that tells positions apart, a data segment with bss
/// behind it, and relocations that are not loaded.
pub(super) fn vmlinux() -> Vec<u8> {
    let code = (0..0x1_0000u32).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8 & 0x0f).collect();
    let parts = [
        Part::load(0x100_0000, code, 0x1_0000),
        Part::load(0x120_0000, vec![0xda; 3000], 0x10_0000),
    ];
    let mut file = elf64(0x100_0040, &parts);
    file.extend([0x4e; 5000]);
    file
}

/// Wraps a payload as a bzImage of protocol 2.15, four setup sectors.
pub(super) fn bzimage(payload: &[u8], unpacked_len: u32) -> Vec<u8> {
    const SETUP: usize = 5 * 512;
    const PAYLOAD_OFFSET: usize = 0x180;
    let mut file = vec![0; SETUP + PAYLOAD_OFFSET];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(0x1f1, &[4]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &[0x3f, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &(PAYLOAD_OFFSET as u32).to_le_bytes());
    put(0x24c, &(payload.len() as u32 + 4).to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    file.extend(payload);
    file.extend(unpacked_len.to_le_bytes());
    // Whatever follows in a real one (the setup's data, a signature).
    file.extend([0x5a; 100]);
    file
}

/// A bzImage of [`vmlinux`].
pub(super) fn linux(format: Format) -> Vec<u8> {
    bzimage(&compress(format, &vmlinux()), vmlinux().len() as u32)
}
