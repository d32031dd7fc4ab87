//! Building blocks: fetch the bytes, decode them, lower each instruction.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::cache::{Block, BlockCache, Tail, Unsettled};
use super::lower::{self, Lowered};
use super::op::{Op, OpFlags};
use crate::addr::{PAGE_OFFSET, PAGE_SIZE, room_in_page};
use crate::exception::Exception;
use crate::interp::transfer;
use crate::memory::access;
use crate::memory::ram::RamFrame;
use crate::state::CodeSize;
use crate::vcpu::{Abort, Vcpu};

/// Most instructions in a block: bounds how long an interrupt waits. A loop whose body does not fit
/// begins in its middle for who translates it, where a block ends that nothing ends but this.
const MAX_OPS: usize = 64;
/// Most bytes looked at for one block.
const WINDOW: usize = 384;
/// Longest instruction, bytes.
pub(crate) const MAX_INSTRUCTION: usize = 15;

/// What one pass over the bytes came to; the ops it made are fresh in the cache.
struct Pass {
    /// Bytes of code consumed.
    len: usize,
    /// The first instruction needs bytes beyond the window.
    short: bool,
}

impl Vcpu {
    /// Decodes the block at `rip`, whose first byte is at `linear` in the page `host`.
    pub(crate) fn build_block(
        &mut self,
        blocks: &mut BlockCache,
        rip: u64,
        linear: u64,
        host: u64,
        frame: RamFrame,
    ) -> Result<Block, Abort> {
        self.counters.decoded = self.counters.decoded.wrapping_add(1);
        let offset = linear & PAGE_OFFSET;
        let mut window = [0; WINDOW];
        let window = head_mut(&mut window, room_in_page(linear) as usize);
        let memory = std::sync::Arc::clone(&self.memory);
        let observer = std::sync::Arc::clone(&self.observer);
        loop {
            copy_code(host, offset, window);
            let pass = self.decode_pass(blocks, rip, window, MAX_OPS)?;
            if pass.short {
                return self.build_straddling(blocks, rip, linear, host, frame);
            }
            // Mark what was consumed, and make sure that the bytes are still those: see CodeMap.
            if !memory.code().is_marked(frame) {
                self.mmu.drop_writes_to(frame);
            }
            let code = head(window, pass.len);
            let range = offset..offset.saturating_add(code.len() as u64);
            let (same, version, epoch) =
                memory.code().decode(&observer, frame, range, || holds(host, offset, code));
            if same {
                let unsettled = (!memory.code().settled(&observer, epoch))
                    .then(|| Unsettled { epoch, bytes: code.into() });
                let block = Block::new(rip, linear, self.code_size, frame, version);
                return Ok(block.with(None, unsettled));
            }
        }
    }

    /// A block of one instruction whose bytes go on in the next page.
    fn build_straddling(
        &mut self,
        blocks: &mut BlockCache,
        rip: u64,
        linear: u64,
        host: u64,
        frame: RamFrame,
    ) -> Result<Block, Abort> {
        let offset = linear & PAGE_OFFSET;
        let room = room_in_page(linear);
        let mut page = linear.wrapping_add(room);
        if self.code_size != CodeSize::Bits64 {
            page &= 0xffff_ffff;
        }
        let Some((host2, frame2)) = self.fetch_page(page)? else {
            return Err(self.raise(Exception::general_protection(0)));
        };
        let memory = std::sync::Arc::clone(&self.memory);
        let observer = std::sync::Arc::clone(&self.observer);
        for marked in [frame, frame2] {
            if !memory.code().is_marked(marked) {
                self.mmu.drop_writes_to(marked);
            }
        }
        let mut bytes = [0; 2 * MAX_INSTRUCTION];
        let (first, rest) = bytes.split_at_mut(MAX_INSTRUCTION.min(room as usize));
        let second = head_mut(rest, MAX_INSTRUCTION);
        let ((), version, epoch) =
            memory.code().decode(&observer, frame, offset..PAGE_SIZE, || {
                copy_code(host, offset, first);
            });
        let ((), version2, epoch2) =
            memory.code().decode(&observer, frame2, 0..MAX_INSTRUCTION as u64, || {
                copy_code(host2, 0, second);
            });
        let len = first.len().saturating_add(second.len());
        let pass = self.decode_pass(blocks, rip, head(&bytes, len), 1)?;
        let epoch = epoch.max(epoch2);
        let unsettled = (!memory.code().settled(&observer, epoch))
            .then(|| Unsettled { epoch, bytes: head(&bytes, pass.len).into() });
        let tail = Tail { page, frame: frame2, version: version2 };
        let block = Block::new(rip, linear, self.code_size, frame, version);
        Ok(block.with(Some(tail), unsettled))
    }

    fn decode_pass(
        &mut self,
        blocks: &mut BlockCache,
        rip: u64,
        bytes: &[u8],
        limit: usize,
    ) -> Result<Pass, Abort> {
        let mut decoder = Decoder::with_ip(self.code_size as u32, bytes, rip, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        let mut pass = Pass { len: 0, short: false };
        blocks.fresh.clear();
        while blocks.fresh.len() < limit {
            if decoder.position() >= bytes.len() {
                break;
            }
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid()
                && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes
            {
                pass.short = blocks.fresh.is_empty();
                break;
            }
            if instruction.len() == 0 {
                break;
            }
            let start = pass.len;
            pass.len = pass.len.saturating_add(instruction.len());
            let encoding = bytes.get(start..pass.len).unwrap_or_default();
            let Lowered { op, ends } = match lower::lower(self, &instruction, encoding) {
                Ok(lowered) => lowered,
                Err(lower::StubsFull) if !blocks.fresh.is_empty() => {
                    pass.len = start;
                    break;
                }
                Err(lower::StubsFull) => {
                    blocks.clear();
                    self.native.reset_own();
                    self.code_hit = true;
                    match lower::lower(self, &instruction, encoding) {
                        Ok(lowered) => lowered,
                        Err(lower::StubsFull) => return Err(self.ud()),
                    }
                }
            };
            blocks.fresh.push(op);
            if ends {
                return Ok(pass);
            }
        }
        if let Some(last) = blocks.fresh.last() {
            let end = goto(last);
            blocks.fresh.push(end);
        }
        Ok(pass)
    }
}

/// Puts the `len` bytes of `block` behind `bytes`, from the page at `host` and, if it goes on there,
/// the one at `tail_host`. What they are now need not be what they were: the caller looks.
pub(crate) fn copy_block(
    block: &Block,
    len: usize,
    host: u64,
    tail_host: Option<u64>,
    bytes: &mut Vec<u8>,
) {
    let mut window = [0; WINDOW];
    let window = head_mut(&mut window, len);
    let room = (room_in_page(block.linear) as usize).min(window.len());
    let (first, rest) = window.split_at_mut(room);
    copy_code(host, block.linear & PAGE_OFFSET, first);
    if let Some(tail_host) = tail_host {
        copy_code(tail_host, 0, rest);
    }
    bytes.extend_from_slice(window);
}

/// The synthetic op that continues after `last`.
fn goto(last: &Op) -> Op {
    let next = last.next_rip();
    Op {
        run: transfer::fall_through,
        rip: next,
        imm: next,
        len: 0,
        flags: last.flags & OpFlags::LEGACY | OpFlags::IMM_MOVES,
        ..*last
    }
}

/// Copies code out of the guest page at `host`.
fn copy_code(host: u64, offset: u64, into: &mut [u8]) {
    // SAFETY: `host` is a mapped page of guest RAM (the code TLB or a walk just said so),
    // and callers keep offset + len within it.
    unsafe { access::copy(host.wrapping_add(offset) as *const u8, into.as_mut_ptr(), into.len()) }
}

/// Whether the guest page at `host` holds exactly `code` (at most [`WINDOW`] bytes) now.
fn holds(host: u64, offset: u64, code: &[u8]) -> bool {
    let mut now = [0; WINDOW];
    let now = head_mut(&mut now, code.len());
    copy_code(host, offset, now);
    now == code
}

/// The first `len` bytes, or all when there are fewer.
fn head(bytes: &[u8], len: usize) -> &[u8] {
    bytes.get(..len).unwrap_or(bytes)
}

fn head_mut(bytes: &mut [u8], len: usize) -> &mut [u8] {
    bytes.split_at_mut(len.min(bytes.len())).0
}

impl Block {
    /// Whether the bytes at `host` (and, for a straddler, those in the tail) are still
    /// the ones this block was decoded from.
    pub(crate) fn unchanged(&self, host: u64, tail_host: u64) -> bool {
        let Some(unsettled) = self.unsettled() else { return true };
        let offset = self.linear & PAGE_OFFSET;
        let first = unsettled.bytes.len().min(room_in_page(offset) as usize);
        let (head, tail) = unsettled.bytes.split_at(first);
        holds(host, offset, head) && (tail.is_empty() || holds(tail_host, 0, tail))
    }
}
