//! Thunks that do a run of `rep movs` or `rep stos` at once, by the host's own.
//!
//! A block calls one with the guest's registers in their places and flags that may be lost. If
//! all elements lie in one page each way, forwards, and may be accessed in place, they are done,
//! the registers are what they are behind the instruction, and ZF is set. If not, or if one page
//! is to be looked up first, nothing has happened and ZF is clear: then the interpreter does it.
//! Both scratch registers are used.
//!
//! Within a page nothing can stop the run: the page is in guest RAM, and it is no longer than
//! what the interpreter does between two looks for events. Where the two pages are the same one
//! in RAM, elements come one after the other there too.

use iced_x86::Register as R;

use super::access::MOV;
use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::fields::{self, TLB_ADDEND, TLB_STORES};
use super::registers::{ACCUMULATOR, ADDRESS, VALUE};
use super::strings::{StringUse, Work};
use crate::addr::PAGE_SIZE;
use crate::state::rflags::RFlags;

/// Bytes of the elements there are.
const WORDS: [u8; 4] = [1, 2, 4, 8];

/// The addresses of the thunks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StringRuns([u64; 16]);

impl StringRuns {
    /// The one for `it`.
    pub(super) fn of(&self, it: StringUse) -> Option<u64> {
        self.0.get(number(it)?).copied()
    }

    /// Whether there is one at `address`.
    pub(super) fn has(&self, address: u64) -> bool {
        self.0.contains(&address)
    }

    /// Makes them, at the end of `code`, which is executed at `base`.
    ///
    /// # Errors
    /// None, unless the assembler is wrong.
    pub(super) fn make(code: &mut Assembler, base: u64) -> Result<Self, NotCopied> {
        let mut runs = Self::default();
        for work in [Work::Move, Work::Store] {
            for word in WORDS {
                for narrow in [false, true] {
                    let it = StringUse { work, word, repeated: true, narrow };
                    let here = base.wrapping_add(code.len() as u64);
                    if let Some(run) = number(it).and_then(|number| runs.0.get_mut(number)) {
                        *run = here;
                    }
                    code.string_run(it)?;
                }
            }
        }
        Ok(runs)
    }
}

/// The number of the thunk for `it`, if there is one.
fn number(it: StringUse) -> Option<usize> {
    let work = match it.work {
        Work::Move => 0,
        Work::Store => 8,
        _ => return None,
    };
    let word = WORDS.iter().position(|word| *word == it.word)?;
    Some(work | word << 1 | usize::from(it.narrow))
}

impl Assembler {
    fn string_run(&mut self, it: StringUse) -> Result<(), NotCopied> {
        let (slow, none) = (self.label(), self.label());
        self.test_field(fields::RFLAGS, RFlags::DF.bits() as u32);
        self.jump_if(Condition::NOT_EQUAL, slow);
        self.last_element(it)?;
        // cmp rax, most; of none it is far above.
        let most = (PAGE_SIZE as u32).wrapping_shr(it.word.trailing_zeros()).wrapping_sub(1);
        self.bytes(&[0x48, 0x3d]);
        self.bytes(&most.to_le_bytes());
        self.jump_if(Condition::ABOVE, none);
        let moves = it.work == Work::Move;
        if moves {
            self.page_of_run(it, R::RSI, 0, slow)?;
            self.store(fields::SPARE, ADDRESS);
            self.last_element(it)?;
        }
        self.page_of_run(it, R::RDI, TLB_STORES, slow)?;
        let pointers = if moves { &[R::RDI, R::RSI][..] } else { &[R::RDI] };
        if it.narrow {
            for register in pointers.iter().chain(&[R::RCX]) {
                self.copy_low(*register, *register);
            }
        }
        // add rdi, r13
        self.bytes(&[0x4c, 0x01, 0xef]);
        if moves {
            // add rsi, [spare]
            self.add(R::RSI, fields::SPARE);
        } else {
            self.copy(VALUE, ACCUMULATOR);
        }
        let opcode = if moves { 0xa4 } else { 0xaa };
        match it.word {
            1 => self.bytes(&[0xf3, opcode]),
            2 => self.bytes(&[0x66, 0xf3, opcode | 1]),
            4 => self.bytes(&[0xf3, opcode | 1]),
            _ => self.bytes(&[0xf3, 0x48, opcode | 1]),
        }
        // sub rdi, r13
        self.bytes(&[0x4c, 0x29, 0xef]);
        if moves {
            self.subtract(R::RSI, fields::SPARE);
        }
        if it.narrow {
            for register in pointers {
                self.copy_low(*register, *register);
            }
        }
        // xor eax, eax; ret
        self.bytes(&[0x31, 0xc0, 0xc3]);
        self.bind(none);
        // test ecx, ecx or rcx, rcx
        if !it.narrow {
            self.bytes(&[0x48]);
        }
        self.bytes(&[0x85, 0xc9]);
        self.bind(slow);
        self.bytes(&[0xc3]);
        Ok(())
    }

    /// The number of the run's last element in [`VALUE`].
    fn last_element(&mut self, it: StringUse) -> Result<(), NotCopied> {
        let to = if it.narrow { R::EAX } else { R::RAX };
        self.lea(to, R::RCX, R::None, 1, -1)
    }

    /// Leaves in [`ADDRESS`] what makes host addresses of a run's at `pointer`, whose last
    /// element has the number in [`VALUE`], or goes to `slow`, with ZF clear.
    fn page_of_run(
        &mut self,
        it: StringUse,
        pointer: R,
        table: u32,
        slow: Label,
    ) -> Result<(), NotCopied> {
        let word = u32::from(it.word);
        let last = i64::from(it.word).wrapping_sub(1);
        let (to, first) = if it.narrow { (R::R13D, R::EAX) } else { (ADDRESS, VALUE) };
        self.lea(to, pointer, VALUE, word, last)?;
        self.lea(first, pointer, R::None, 1, 0)?;
        self.entry_of_value();
        self.page_of_address();
        self.compare_tag(table, slow);
        self.with_entry(MOV, table.wrapping_add(TLB_ADDEND));
        Ok(())
    }
}
