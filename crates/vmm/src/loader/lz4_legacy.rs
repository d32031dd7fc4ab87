//! The LZ4 *legacy* frame, which `lz4 -l` makes and kernels use: a magic number, then
//! blocks, each a 32-bit length and that much compressed data, each decompressing to
//! at most 8 MiB on its own. There is no end mark: the stream ends where the data does.
//!
//! Source: lz4's `doc/lz4_Frame_format.md`, "Legacy frame".

use std::io::{self, BufRead, Read};

/// The magic number a frame begins with; frames may follow one another.
const MAGIC: u32 = 0x184c_2102;
/// What a block decompresses to at most.
const BLOCK: usize = 8 << 20;
/// What a block of incompressible data takes at most.
const COMPRESSED_BLOCK: u32 = (BLOCK + BLOCK / 255 + 16) as u32;

/// Decompresses a legacy frame.
#[derive(Debug)]
pub(super) struct Lz4Legacy<R> {
    input: R,
    /// The decompressed block, and how much of it has been read.
    block: Vec<u8>,
    at: usize,
    /// The compressed block.
    packed: Vec<u8>,
}

impl<R: BufRead> Lz4Legacy<R> {
    /// Begins a frame, whose magic number is still to be read.
    pub(super) fn new(mut input: R) -> io::Result<Self> {
        let mut magic = [0; 4];
        input.read_exact(&mut magic)?;
        if u32::from_le_bytes(magic) != MAGIC {
            return Err(damaged("no magic number"));
        }
        Ok(Self { input, block: Vec::new(), at: 0, packed: Vec::new() })
    }

    /// Decompresses the next block; false at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let len = loop {
            let mut word = [0; 4];
            match self.input.read_exact(&mut word) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                other => other?,
            }
            // The last word is the decompressed size that the kernel's build appends.
            if self.input.fill_buf()?.is_empty() {
                return Ok(false);
            }
            let word = u32::from_le_bytes(word);
            if word != MAGIC {
                break word;
            }
        };
        if len > COMPRESSED_BLOCK {
            return Err(damaged("a block is too long"));
        }
        self.packed.clear();
        let read = self.input.by_ref().take(len.into()).read_to_end(&mut self.packed)?;
        if read as u64 != u64::from(len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.block.resize(BLOCK, 0);
        let size = lz4_flex::block::decompress_into(&self.packed, &mut self.block)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        self.block.truncate(size);
        self.at = 0;
        Ok(true)
    }
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<R: BufRead> Read for Lz4Legacy<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut rest = self.block.get(self.at..).unwrap_or_default();
            if !rest.is_empty() || buf.is_empty() {
                let n = rest.read(buf)?;
                self.at = self.at.saturating_add(n);
                return Ok(n);
            }
            if !self.next_block()? {
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(blocks: &[&[u8]]) -> Vec<u8> {
        let mut frame = MAGIC.to_le_bytes().to_vec();
        for block in blocks {
            let packed = lz4_flex::block::compress(block);
            frame.extend((packed.len() as u32).to_le_bytes());
            frame.extend(packed);
        }
        frame
    }

    fn unpack(frame: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Lz4Legacy::new(frame)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn blocks_follow_one_another_with_or_without_a_size_word() {
        let mut packed = frame(&[&[1; 100], &[2; 5], &[3; 70_000]]);
        let expected = [&[1; 100][..], &[2; 5], &[3; 70_000]].concat();
        assert_eq!(unpack(&packed).unwrap(), expected);
        packed.extend([9, 9, 0, 0]);
        assert_eq!(unpack(&packed).unwrap(), expected);
        let two = [frame(&[&[1; 10]]), frame(&[&[2; 10]])].concat();
        assert_eq!(unpack(&two).unwrap().len(), 20);
    }

    #[test]
    fn damage_is_an_error() {
        assert!(unpack(b"").is_err() && unpack(b"abcd").is_err());
        let packed = frame(&[&[7; 1000]]);
        assert!(unpack(&packed[..packed.len() - 1]).is_err());
        let mut long = packed.clone();
        long[4..8].copy_from_slice(&(COMPRESSED_BLOCK + 1).to_le_bytes());
        assert!(unpack(&long).is_err());
        let mut wrong = packed;
        wrong[8] = 0xff;
        assert!(unpack(&wrong).is_err());
    }
}
