//! Translated blocks: where they are in the code memory, and how they lead to one another.
//!
//! Blocks are only ever added, until the memory is full and starts over empty. One whose code
//! has changed is not taken out: its first instruction becomes a jump out.

use std::collections::HashMap;
use std::io;

use iced_x86::Instruction;

use super::copy::Copier;
use super::thunks::{self, Thunks};
use super::{block, verify};
use crate::code_memory::CodeMemory;
use crate::decode::op::Op;
use crate::memory::ram::RamFrame;
use crate::vcpu::Abort;

/// Code memory per vCPU, bytes. Pages are taken from the host as they fill.
const CAPACITY: usize = 64 << 20;
/// More than any block takes.
const LARGEST: usize = 1 << 16;
/// Blocks start on a boundary that the host's fetch unit likes.
const ALIGN: usize = 16;

/// A translated block, as the interpreter's block remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Which filling of the code memory it is in.
    pub(super) generation: u32,
    /// Where it is executed.
    pub(super) address: u64,
}

/// A translated block.
#[derive(Debug)]
struct Placed {
    /// Where in the code memory it is.
    offset: usize,
    /// Where in its code it leaves to be looked up again.
    way_out: usize,
    /// Its code has changed: nothing may be linked from it any more.
    stale: bool,
    /// What it calls the interpreter with.
    ops: Box<[Op]>,
}

/// A jump in code memory that may go straight to another block.
#[derive(Clone, Copy, Debug)]
struct Link {
    /// Where its distance is.
    offset: usize,
    target: u64,
    from: u32,
}

/// All translated code of one vCPU.
#[derive(Debug)]
pub(crate) struct Translator {
    memory: CodeMemory,
    pub(super) thunks: Thunks,
    /// Bytes used, and how many of them are thunks.
    used: usize,
    fixed: usize,
    pub(super) generation: u32,
    blocks: Vec<Placed>,
    links: Vec<Link>,
    /// Blocks by the frame their code is in, and the version they hold for.
    frames: HashMap<RamFrame, (u32, Vec<u32>)>,
    /// The link that the last block was left by.
    pub(super) pending: Option<u32>,
    /// What the last interpreted op ended in.
    pub(super) abort: Abort,
    /// The code map's count of hits that [`Translator::frames`] is up to date with.
    pub(super) seen: u64,
    /// The block at this address must be interpreted this time.
    pub(super) refused: Option<u64>,
    pub(super) counters: Counters,
    /// What a test has done to each instruction before it is translated.
    #[cfg(test)]
    pub(crate) mistake: Option<fn(&mut Instruction, &mut Op)>,
}

/// What the translator did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Blocks translated.
    pub translated: u64,
    /// Bytes of host code made for them.
    pub bytes: u64,
    /// Times translated code was entered from the run loop.
    pub entered: u64,
    /// Instructions that translated code had interpreted.
    pub interpreted: u64,
    /// Blocks that became stale.
    pub invalidated: u64,
    /// Times the code memory was full, and emptied.
    pub emptied: u64,
}

impl Translator {
    /// # Errors
    /// When the host refuses code memory.
    pub(crate) fn new() -> io::Result<Self> {
        let mut memory = CodeMemory::new(CAPACITY)?;
        let base = memory.address(0) as u64;
        let (code, thunks) =
            thunks::make(base).map_err(|_| io::Error::other("the thunks do not assemble"))?;
        if !memory.write(0, &code) {
            return Err(io::Error::other("the thunks do not fit"));
        }
        Ok(Self {
            memory,
            thunks,
            used: code.len(),
            fixed: code.len(),
            generation: 0,
            blocks: Vec::new(),
            links: Vec::new(),
            frames: HashMap::new(),
            pending: None,
            abort: Abort::EndBlock,
            seen: 0,
            refused: None,
            counters: Counters::default(),
            #[cfg(test)]
            mistake: None,
        })
    }

    /// An empty one like this.
    ///
    /// # Errors
    /// When the host refuses code memory.
    pub(crate) fn another(&self) -> io::Result<Self> {
        Ok(Self {
            #[cfg(test)]
            mistake: self.mistake,
            ..Self::new()?
        })
    }

    /// Where the code of the block at `rip` is and how long it is, for whoever wants to look
    /// at it.
    pub(crate) fn listing(&self, rip: u64) -> Option<(u64, usize)> {
        let is_it = |placed: &Placed| placed.ops.first().is_some_and(|op| op.rip == rip);
        let number = self.blocks.iter().rposition(is_it)?;
        let start = self.blocks.get(number)?.offset;
        let next = self.blocks.get(number.saturating_add(1));
        let end = next.map_or(self.used, |next| next.offset);
        Some((self.memory.address(start) as u64, end.saturating_sub(start)))
    }

    /// What it did so far.
    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Where the link `number` goes.
    pub(super) fn target(&self, number: u32) -> Option<u64> {
        self.links.get(number as usize).map(|link| link.target)
    }

    /// Makes sure that there is room for the largest block there can be; says whether all
    /// others had to go for it.
    pub(super) fn make_room(&mut self) -> bool {
        let full = self.used.saturating_add(LARGEST) > self.memory.capacity();
        if full {
            self.empty();
        }
        full
    }

    /// Empties the code memory.
    pub(crate) fn empty(&mut self) {
        self.used = self.fixed;
        self.generation = self.generation.wrapping_add(1);
        self.blocks.clear();
        self.links.clear();
        self.frames.clear();
        self.pending = None;
        self.counters.emptied = self.counters.emptied.wrapping_add(1);
    }

    /// Places `ops`, decoded from `instructions`, whose code is in `frame` at `version`.
    /// `None` when the code memory is full or the block is none for us.
    pub(super) fn place(
        &mut self,
        instructions: &[Instruction],
        ops: Box<[Op]>,
        copier: &mut Copier<'_>,
        frame: RamFrame,
        version: u32,
    ) -> Option<Entry> {
        let offset = self.used.checked_next_multiple_of(ALIGN)?;
        let address = self.memory.address(offset) as u64;
        let first_link = u32::try_from(self.links.len()).ok()?;
        let made =
            block::translate(instructions, &ops, copier, &self.thunks, address, first_link).ok()?;
        if cfg!(debug_assertions)
            && let Err(violation) = verify::verify(&made.code, address, &self.thunks)
        {
            debug_assert!(false, "{violation}");
        }
        if !self.memory.write(offset, &made.code) {
            return None;
        }
        self.used = offset.saturating_add(made.code.len());
        self.counters.translated = self.counters.translated.wrapping_add(1);
        self.counters.bytes = self.counters.bytes.wrapping_add(made.code.len() as u64);
        let number = u32::try_from(self.blocks.len()).ok()?;
        self.links.extend(made.links.iter().map(|link| Link {
            offset: offset.saturating_add(link.at),
            target: link.target,
            from: number,
        }));
        self.blocks.push(Placed { offset, way_out: made.way_out, stale: false, ops });
        let (known, blocks) = self.frames.entry(frame).or_insert((version, Vec::new()));
        if *known != version {
            // The others are stale, and about to be found out.
            return None;
        }
        blocks.push(number);
        Some(Entry { generation: self.generation, address })
    }

    /// Writes the jump distance at `offset`, so that it goes to `to`.
    fn aim(&mut self, offset: usize, to: u64) {
        let next = (self.memory.address(offset) as u64).wrapping_add(4);
        let written = self.memory.write(offset, &(to.wrapping_sub(next) as u32).to_le_bytes());
        debug_assert!(written, "links are inside the code memory");
    }

    /// The link by which the last block was left, if it may go straight to its target.
    pub(super) fn connect(&mut self, rip: u64, to: u64) {
        let Some(number) = self.pending.take() else { return };
        let Some(link) = self.links.get(number as usize).copied() else { return };
        let from = self.blocks.get(link.from as usize);
        if link.target == rip && from.is_some_and(|from| !from.stale) {
            self.aim(link.offset, to);
        }
    }

    /// Makes sure that no block is entered whose code has changed.
    pub(super) fn drop_stale(&mut self, version: impl Fn(RamFrame) -> u32) {
        let changed: Vec<RamFrame> = self
            .frames
            .iter()
            .filter(|(frame, (known, _))| version(**frame) != *known)
            .map(|(frame, _)| *frame)
            .collect();
        for frame in changed {
            let Some((_, blocks)) = self.frames.remove(&frame) else { continue };
            for number in blocks {
                let Some(placed) = self.blocks.get_mut(number as usize) else { continue };
                placed.stale = true;
                // jmp: five bytes, which the shortest block has.
                let [a, b, c, d] = (placed.way_out as u32).wrapping_sub(5).to_le_bytes();
                let written = self.memory.write(placed.offset, &[0xe9, a, b, c, d]);
                debug_assert!(written, "blocks are inside the code memory");
                self.counters.invalidated = self.counters.invalidated.wrapping_add(1);
            }
        }
    }
}
