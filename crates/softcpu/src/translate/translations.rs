//! Translated blocks: where they are in the code memory, and how they lead to one another.
//!
//! The memory is filled in order, region by region ([`super::regions`]), and what is oldest is
//! evicted for what is new. A block whose code has changed stays until then: its first
//! instruction becomes a jump out.
//!
//! All vCPUs share them, one at a time ([`super::code_cache`]), and others run what is changed
//! here. So what is running is only changed where it jumps to, by a store that is seen as a whole.

use foldhash::HashMap;

use super::block::{self, SHORTEST};
use super::clone::Span;
use super::code_cache::Evicted;
use super::frames::{Code, Frames};
use super::manner::Manner;
use super::mode::Mode;
use super::regions::{self, BEFORE, Filling, Regions};
use super::splits::Splits;
#[cfg(test)]
use super::trace::Trace;
use super::wishes::{Wanted, Wish};
use crate::code_memory::CodeMemory;
use crate::decode::cache::Tail;
use crate::memory::code_map::CodeMap;
use crate::memory::ram::RamFrame;

/// A translated block, as the interpreter's block remembers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// In which filling of its region of the code memory it is.
    pub(super) filling: Filling,
    /// What it was made for.
    pub(super) mode: Mode,
    /// Where it is executed.
    pub(super) address: u64,
    /// Its code goes on in the next page.
    pub(super) crosses: bool,
}

/// A translated block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    /// RIP of the code that it stands for, and the mode that it was made for.
    pub(super) rip: u64,
    pub(super) mode: Mode,
    /// Where in the code memory it is, and how long.
    pub(super) offset: u32,
    pub(super) len: u32,
    /// Where in its code it leaves to be looked up again.
    pub(super) way_out: u32,
    /// The number of its first link.
    pub(super) first_link: u32,
    /// Which of its region's ops its first one is, and how many it has.
    pub(super) first_op: u32,
    pub(super) ops: u16,
    /// Guest instructions in it.
    pub(super) instructions: u16,
    /// What changes in it when it is moved.
    pub(super) relocations: Span,
    /// Where its instructions go on that fault.
    pub(super) landings: Span,
    /// The frame its code is in.
    pub(super) frame: RamFrame,
    /// It is entered no more: nothing may be linked from it either.
    pub(super) stale: bool,
    pub(super) manner: Manner,
    /// The number of the vCPU that had it made.
    pub(super) by: u32,
}

/// A jump in code memory that may go straight to another block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    /// Where its distance is.
    pub(super) offset: u32,
    /// The number of the block that it is in.
    pub(super) from: u32,
    pub(super) target: u64,
}

/// All translated code of a machine's vCPUs.
#[derive(Debug)]
pub(crate) struct Translations {
    pub(super) memory: CodeMemory,
    pub(super) regions: Regions,
    /// Traces that were split lately, by the RIP of their code and where they were left for.
    pub(super) splits: HashMap<(u64, u64), Splits>,
    /// What is to be translated in another way.
    pub(super) wishes: HashMap<Wanted, Wish>,
    /// Blocks by the frame their code is in.
    pub(super) frames: Frames,
    /// What blocks were made of, by their number.
    #[cfg(test)]
    pub(super) traces: HashMap<u32, (Trace, Manner)>,
}

impl Translations {
    /// None yet, in `memory`, of which the first `fixed` bytes are something else's.
    pub(super) fn new(memory: CodeMemory, fixed: usize) -> Self {
        let (base, capacity) = (memory.address(0) as u64, memory.capacity());
        Self {
            memory,
            regions: Regions::new(base, capacity, fixed),
            splits: HashMap::default(),
            wishes: HashMap::default(),
            frames: Frames::default(),
            #[cfg(test)]
            traces: HashMap::default(),
        }
    }

    /// Where the code of the block at `rip` is and how long it is, for whoever wants to look
    /// at it.
    pub(super) fn listing(&self, rip: u64) -> Option<(u64, usize)> {
        let all = self.regions.blocks().flatten();
        let placed = all.filter(|placed| placed.rip == rip && !placed.stale).last()?;
        Some((self.memory.address(placed.offset as usize) as u64, placed.len as usize))
    }

    /// Where the link `number` goes.
    pub(super) fn target(&self, number: u32) -> Option<u64> {
        self.regions.link(number).map(|link| link.target)
    }

    /// Gives up `region` as the `number`-th: nobody finds what is in it any more, and nobody who
    /// is elsewhere goes there. Whoever runs there may go on.
    pub(super) fn give_up(&mut self, region: usize, number: u64) -> Evicted {
        let contents = self.regions.give_up(region, number);
        // Those are from a moment ago, or of no use.
        self.splits.clear();
        for placed in &contents.blocks {
            let code = Code::at(placed.rip, placed.mode);
            self.frames.evict(placed.frame, region, Some(code));
        }
        for frame in &contents.tails {
            self.frames.evict(*frame, region, None);
        }
        #[cfg(test)]
        self.traces.retain(|number, _| !regions::is_in(*number, region));
        for wanted in &contents.wishes {
            self.wishes.remove(wanted);
        }
        // The last of those that lead from one place knows where that leads otherwise.
        for jump in contents.incoming.iter().rev() {
            let leads_here = self
                .distance(jump.at)
                .is_some_and(|distance| self.regions.leads_into(jump.at, distance, region));
            if leads_here && self.regions.is_there(jump) {
                self.set_distance(jump.at, jump.own);
            }
        }
        let blocks = contents.blocks.len() as u64;
        let (wishes, tails, incoming) = Default::default();
        self.regions.keep(region, regions::Contents { wishes, tails, incoming, ..contents });
        let bounds = self.regions.bounds(region);
        let at = |offset| self.memory.address(offset) as u64;
        Evicted { number, hosts: at(bounds.start)..at(bounds.end), blocks, turned: region == 0 }
    }

    /// Empties the code memory. Nobody may be running there.
    pub(super) fn clear(&mut self) {
        self.regions.clear();
        self.splits.clear();
        self.wishes.clear();
        self.frames.clear();
        #[cfg(test)]
        self.traces.clear();
    }

    /// What was placed last has been made of `trace`.
    #[cfg(test)]
    pub(super) fn remember(&mut self, trace: &Trace, manner: Manner) {
        let newest = self.regions.newest().and_then(|newest| newest.blocks.len().checked_sub(1));
        if let Some(number) = newest.and_then(|newest| self.regions.number(newest)) {
            self.traces.insert(number, (trace.clone(), manner));
        }
    }

    /// Puts `code` to its place.
    pub(super) fn add(
        &mut self,
        code: &[u8],
        links: &[block::Link],
        placed: Placed,
        version: u32,
        tail: Option<Tail>,
    ) -> Option<Entry> {
        debug_assert!(first_instruction(code) >= SHORTEST, "{code:x?}");
        let (offset, frame) = (placed.offset as usize, placed.frame);
        let address = self.memory.address(offset) as u64;
        self.regions.take(offset, code.len())?;
        let [a, b, c, d] = placed.way_out.to_le_bytes();
        if !self.memory.write(offset.checked_sub(BEFORE)?, &[JUMP, a, b, c, d])
            || !self.memory.write(offset, code)
        {
            return None;
        }
        let number = self.regions.number(self.regions.newest()?.blocks.len())?;
        let region = self.regions.current()?;
        region.links.extend(links.iter().map(|link| Link {
            offset: placed.offset.saturating_add(link.at as u32),
            from: number,
            target: link.target,
        }));
        region.blocks.push(placed);
        region.tails.extend(tail.map(|tail| tail.frame));
        // Elsewhere, what reaches into another page has another one behind it.
        let code = tail.is_none().then(|| Code::at(placed.rip, placed.mode));
        // Others that are in the way are stale, and about to be found out.
        self.frames.add(frame, version, number, code)?;
        if let Some(tail) = tail {
            self.frames.add(tail.frame, tail.version, number, None)?;
        }
        Some(Entry {
            filling: self.regions.filling_of(number)?,
            mode: placed.mode,
            address,
            crosses: tail.is_some(),
        })
    }

    /// The distance of a jump, which is at `offset`.
    fn distance(&self, offset: u32) -> Option<u32> {
        let bytes = self.memory.read(offset as usize, 4).first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    }

    /// Sets the distance of a jump that others may be executing.
    fn set_distance(&mut self, offset: u32, distance: u32) {
        let stored = self.memory.store_u32(offset as usize, distance);
        debug_assert!(stored, "jumps are inside the code memory, and their distances aligned");
    }

    /// Has the jump whose distance is at `offset` go to the block at `to`, as long as that is there.
    pub(super) fn aim(&mut self, offset: u32, to: u64) {
        let base = self.memory.address(0) as u64;
        let Some(own) = self.distance(offset) else { return };
        // One that leads elsewhere already would lead back there.
        if !self.regions.stays(offset, own) {
            return;
        }
        self.regions.note_jump(offset, own, to.wrapping_sub(base));
        let next = base.wrapping_add(offset.into()).wrapping_add(4);
        self.set_distance(offset, to.wrapping_sub(next) as u32);
    }

    /// Has whoever comes to the translation `former`, which is closed, go on at `to`.
    pub(super) fn replace(&mut self, (former, filling): (u32, Filling), to: u64) {
        if self.regions.filling_of(former) == Some(filling)
            && let Some(former) = self.regions.block(former)
        {
            self.aim(former.offset.saturating_sub(4), to);
        }
    }

    /// Has link `number` go straight to `to`, if that is its target: the code at `rip`, in its mode.
    pub(super) fn connect(&mut self, number: u32, rip: u64, to: Entry) {
        let Some(link) = self.regions.link(number).copied() else { return };
        let from = self.regions.block(link.from);
        let alike = |from: &Placed| !from.stale && from.mode == to.mode;
        // Nobody would take back a jump to what has been given up meanwhile.
        if link.target == rip && from.is_some_and(alike) && self.regions.has(to) {
            self.aim(link.offset, to.address);
        }
    }

    /// The block that was placed last, and its code.
    pub(super) fn newest(&self) -> Option<(&Placed, &[u8])> {
        let placed = self.regions.newest()?.blocks.last()?;
        Some((placed, self.memory.read(placed.offset as usize, placed.len as usize)))
    }

    /// Whether `entry` is closed.
    pub(super) fn is_closed(&self, entry: Entry) -> bool {
        self.regions.block_at(entry.address).is_some_and(|placed| placed.stale)
    }

    /// Closes the blocks whose code has changed since `code` knew of `since` hits. Those are told of,
    /// by their RIP.
    pub(super) fn drop_stale(&mut self, code: &CodeMap, since: u64, mut dropped: impl FnMut(u64)) {
        let changed = code.hit_since(since).unwrap_or_else(|| self.frames.all().collect());
        for frame in changed {
            for number in self.frames.take_stale(frame, code.version(frame)) {
                if let Some(rip) = self.close(number) {
                    dropped(rip);
                }
            }
        }
    }

    /// Block `number` is entered no more. Says for what code it stands.
    pub(super) fn close(&mut self, number: u32) -> Option<u64> {
        let placed = self.regions.block_mut(number)?;
        placed.stale = true;
        let stored = self.memory.store_u16(placed.offset as usize, CLOSED);
        debug_assert!(stored, "blocks are inside the code memory, and aligned");
        Some(placed.rip)
    }
}

/// The opcode of a `jmp` by four bytes of distance.
const JUMP: u8 = 0xe9;
/// What a closed block begins with: `jmp`, to the jump in front of it.
const CLOSED: u16 = u16::from_le_bytes([0xeb, 0_u8.wrapping_sub(2 + BEFORE as u8)]);

/// Bytes of the instruction that `code` begins with.
fn first_instruction(code: &[u8]) -> usize {
    iced_x86::Decoder::new(64, code, iced_x86::DecoderOptions::NONE).decode().len()
}
