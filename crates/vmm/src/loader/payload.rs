//! The compressed vmlinux inside a bzImage: which compression it is, and a stream of
//! what it decompresses to.
//!
//! The guest's own decompressor never runs: natively this takes a fraction of a second,
//! and the guest would start with seconds of interpreted xz. Decompressors are bounded in
//! the memory they may take for their windows; how much comes out is bounded by whoever
//! reads. The formats are those of the kernel's `CONFIG_KERNEL_*` choices.

use std::fmt;
use std::io::{self, BufRead, Read};

use liblzma::bufread::XzDecoder;
use liblzma::stream::Stream;

use super::error::KernelError;
use super::lz4_legacy::Lz4Legacy;

/// The most an xz or lzma decoder may take: dictionaries in use are 32 MiB, or 128 MiB.
const LZMA_MEMORY: u64 = 192 << 20;
/// log2 of the largest zstd window: what `zstd --ultra -22`, as kernels use it, makes.
const ZSTD_WINDOW_LOG: u32 = 27;

/// How a payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Gzip,
    Xz,
    Lzma,
    Zstd,
    Lz4,
    Bzip2,
    /// Known, but refused: nobody has shipped a kernel with it for many years.
    Lzo,
    /// `CONFIG_KERNEL_UNCOMPRESSED`.
    Plain,
}

const MAGIC: &[(&[u8], Format)] = &[
    (b"\x1f\x8b", Format::Gzip),
    (b"\xfd7zXZ\0", Format::Xz),
    (b"\x5d\0\0", Format::Lzma),
    (b"\x28\xb5\x2f\xfd", Format::Zstd),
    (b"\x02\x21\x4c\x18", Format::Lz4),
    (b"BZh", Format::Bzip2),
    (b"\x89LZO\0\r\n\x1a\n", Format::Lzo),
    (b"\x7fELF", Format::Plain),
];

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Format {
    /// Recognises a payload by how it begins.
    pub(super) fn detect(head: &[u8]) -> Option<Self> {
        MAGIC.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, format)| *format)
    }

    /// What it is called.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "lzo",
            Self::Plain => "uncompressed",
        }
    }

    /// A stream of what `payload` decompresses to. It ends with the compressed stream;
    /// what the kernel's build appends to it (the size, as a word) is not looked at.
    pub(super) fn decompress<'r>(
        self,
        payload: impl BufRead + 'r,
    ) -> Result<Box<dyn Read + 'r>, KernelError> {
        let broken = |reason| KernelError::Decompress { format: self.name(), reason };
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::GzDecoder::new(payload)),
            Self::Xz => {
                let stream = Stream::new_stream_decoder(LZMA_MEMORY, 0).map_err(io::Error::from);
                Box::new(XzDecoder::new_stream(payload, stream.map_err(broken)?))
            }
            Self::Lzma => {
                let stream = Stream::new_lzma_decoder(LZMA_MEMORY).map_err(io::Error::from);
                Box::new(XzDecoder::new_stream(payload, stream.map_err(broken)?))
            }
            Self::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(payload);
                let mut decoder = decoder.map_err(broken)?.single_frame();
                decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(broken)?;
                Box::new(decoder)
            }
            Self::Lz4 => Box::new(Lz4Legacy::new(payload).map_err(broken)?),
            Self::Bzip2 => Box::new(bzip2::bufread::BzDecoder::new(payload)),
            Self::Lzo => return Err(KernelError::Compression("lzo")),
            Self::Plain => Box::new(payload),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::synthetic::{FORMATS, compress};
    use super::*;

    fn text() -> Vec<u8> {
        (0..200_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect()
    }

    #[test]
    fn every_format_comes_back_and_stops_before_the_size_word() {
        for format in FORMATS {
            let mut payload = compress(format, &text());
            assert_eq!(Format::detect(&payload), Some(format));
            if format != Format::Plain {
                payload.extend((text().len() as u32).to_le_bytes());
            }
            let mut out = Vec::new();
            format.decompress(&payload[..]).unwrap().read_to_end(&mut out).unwrap();
            assert!(out == text() || format == Format::Plain, "{format}");
        }
    }

    #[test]
    fn truncated_payloads_are_errors_not_short_results() {
        for format in FORMATS.into_iter().filter(|format| *format != Format::Plain) {
            let payload = compress(format, &text());
            for end in [payload.len() / 3, payload.len() - 5] {
                let mut out = Vec::new();
                let Ok(mut stream) = format.decompress(&payload[..end]) else { continue };
                assert!(
                    stream.read_to_end(&mut out).is_err() || out.len() < text().len(),
                    "{format} {end}"
                );
            }
        }
    }

    #[test]
    fn lzo_is_refused_with_a_remedy() {
        let Err(error) = Format::Lzo.decompress(&[][..]) else { panic!("lzo accepted") };
        assert!(error.to_string().contains("CONFIG_KERNEL_ZSTD"));
    }
}
