//! Where translations and the loops in them begin: hosts fetch and cache what they decode by
//! aligned stretches, and a short loop that lies across one more of them runs slower.

use super::assembler::Assembler;

/// Where translations begin, bytes: on a line of the cache.
pub(super) const BLOCKS: usize = 64;
/// Where hot loops do.
const LOOPS: usize = 32;
const _: () = assert!(BLOCKS.is_multiple_of(LOOPS));

/// Instructions that do nothing, by their length: those that the manuals recommend (SDM vol. 2,
/// NOP).
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
    &[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
    &[0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
];

impl Assembler {
    /// Nothing, up to where a loop may begin.
    pub(super) fn align(&mut self) {
        let end = self.len().next_multiple_of(LOOPS);
        while let Some(rest) = end.checked_sub(self.len())
            && let Some(nop) = NOPS.iter().rev().find(|nop| nop.len() <= rest)
        {
            self.bytes(nop);
        }
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Decoder, DecoderOptions};

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
            let is_nop = |code: Code| {
                matches!(code, Code::Nopd | Code::Nopw | Code::Nop_rm32 | Code::Nop_rm16)
            };
            assert!(rest.into_iter().all(|it| is_nop(it.code())), "{before}");
        }
    }
}
