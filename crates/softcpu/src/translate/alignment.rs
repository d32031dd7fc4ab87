//! Where translations and the loops in them begin: hosts fetch and cache what they decode by
//! aligned stretches, and a short loop that lies across one more of them runs slower. And where
//! numbers lie that are changed while code is running, on other vCPUs.

use super::assembler::Assembler;

/// Where translations begin, bytes: on a line of the cache.
pub(super) const BLOCKS: usize = 64;
/// Where hot loops do.
const LOOPS: usize = 32;
const _: () = assert!(BLOCKS.is_multiple_of(LOOPS));

/// A nop, and in front of it what makes it longer: more prefixes than that some hosts decode
/// slowly.
const NOP: [u8; 4] = [0x66, 0x66, 0x66, 0x90];

/// Where the distances of links are, bytes: a host that executes one while another thread changes
/// it sees either the old distance or the new one.
const DISTANCES: usize = size_of::<u32>();

impl Assembler {
    /// Nothing, up to where a loop may begin.
    pub(super) fn align(&mut self) {
        self.nothing(self.len().next_multiple_of(LOOPS).saturating_sub(self.len()));
    }

    /// Nothing, up to where the distance of a jump or call that comes `behind` so many bytes and an
    /// opcode of one may be changed while others execute it.
    pub(super) fn align_distance(&mut self, behind: usize) {
        let at = self.len().saturating_add(behind).saturating_add(1);
        self.nothing(at.next_multiple_of(DISTANCES).saturating_sub(at));
    }

    /// So many bytes that do nothing.
    pub(super) fn nothing(&mut self, mut rest: usize) {
        while rest > 0 {
            let len = rest.min(NOP.len());
            self.bytes(NOP.get(NOP.len().saturating_sub(len)..).unwrap_or_default());
            rest = rest.saturating_sub(len);
        }
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    use super::*;

    #[test]
    fn what_is_in_between_does_nothing() {
        for before in 0..=LOOPS {
            let mut code = Assembler::new(0x1000);
            code.bytes(&vec![0xcc; before]);
            code.align();
            let (code, _) = code.finish().unwrap();
            assert_eq!(code.len(), before.next_multiple_of(LOOPS));
            let rest = Decoder::new(64, &code[before..], DecoderOptions::NONE);
            assert!(rest.into_iter().all(|it| it.mnemonic() == Mnemonic::Nop), "{before}");
            let mut code = Assembler::new(0x1000);
            code.bytes(&vec![0x90; before]);
            code.align_distance(7);
            assert_eq!((code.len() + 7 + 1) % 4, 0);
            assert!(code.len() < before + 4);
        }
    }
}
