//! Translated blocks: where they are in the code memory, and how they lead to one another.
//!
//! Blocks are only ever added, until the memory is full and starts over empty. One whose code
//! has changed is not taken out: its first instruction becomes a jump out.

use std::collections::{HashMap, HashSet};
use std::io;

use super::clone::{Code, Span, code_at};
use super::config::{BadTranslation, Config};
use super::invalidation::Schedule;
use super::manner::Manner;
use super::mode::Mode;
use super::ops::Ops;
use super::patience::Patience;
use super::plans::Plans;
use super::relocate::Relocation;
use super::thunks::{self, Thunks};
use super::trace::Trace;
use super::wishes::{Splits, Wish};
use super::{block, verify};
use crate::code_memory::CodeMemory;
use crate::decode::cache::Tail;
use crate::memory::ram::RamFrame;
use crate::system::tsc::host_tsc;

/// More than any block takes.
const LARGEST: usize = 1 << 16;
/// Blocks start on a boundary that the host's fetch unit likes.
const ALIGN: usize = 16;

/// A translated block, as the interpreter's block remembers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Which filling of the code memory it is in.
    pub(super) generation: u32,
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
    /// The numbers of its first link and its first op, and how many ops it has.
    pub(super) first_link: u32,
    pub(super) first_op: u32,
    pub(super) ops: u16,
    /// Guest instructions in it.
    pub(super) instructions: u16,
    /// What changes in it when it is moved.
    pub(super) relocations: Span,
    /// The frame its code is in.
    pub(super) frame: RamFrame,
    /// It is entered no more: nothing may be linked from it either.
    pub(super) stale: bool,
    pub(super) manner: Manner,
}

/// A jump in code memory that may go straight to another block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    /// Where its distance is.
    pub(super) offset: usize,
    pub(super) target: u64,
    pub(super) from: u32,
}

/// All translated code of one vCPU.
#[derive(Debug)]
pub(crate) struct Translator {
    pub(super) memory: CodeMemory,
    pub(super) thunks: Thunks,
    /// Bytes used, and how many of them are thunks.
    used: usize,
    fixed: usize,
    pub(super) generation: u32,
    pub(super) blocks: Vec<Placed>,
    /// What they call the interpreter with.
    pub(super) ops: Ops,
    pub(super) links: Vec<Link>,
    /// What changes in those that can be moved.
    pub(super) relocations: Vec<Relocation>,
    /// Traces that were split lately, by the RIP of their code.
    pub(super) splits: HashMap<u64, Splits>,
    /// What is to be translated in another way, by its frame and RIP, and its mode.
    pub(super) wishes: HashMap<(RamFrame, u64, Mode), Wish>,
    /// The addresses of what was translated otherwise before.
    pub(super) retired: HashSet<u64>,
    /// Blocks by the frame their code is in, and the version they hold for.
    pub(super) frames: HashMap<RamFrame, (u32, Vec<u32>)>,
    /// The block that was placed last for some code, at whichever address.
    pub(super) by_code: HashMap<Code, u32>,
    /// What is known of instructions.
    pub(super) plans: Plans,
    /// The last trace, for the memory it has.
    pub(super) spare: Trace,
    /// The last code that was made, for the memory it has.
    spare_code: Vec<u8>,
    /// The link that the last block was left by, and the number of the mappings it was left
    /// under.
    pub(super) pending: Option<(u32, u64)>,
    /// The code map's count of hits that [`Translator::frames`] is up to date with.
    pub(super) seen: u64,
    /// The block at this address must be interpreted this time.
    pub(super) refused: Option<u64>,
    pub(super) counters: Counters,
    /// Turns of loops until one is taken to be hot.
    turns: u64,
    /// How hot code must be.
    pub(super) patience: Patience,
    /// When code is to be taken for changed.
    pub(super) invalidation: Option<Schedule>,
    /// Every block is looked at before it may run.
    verify: bool,
    /// The block that the last look was not content with.
    pub(crate) bad: Option<BadTranslation>,
    /// What a test has put in front of every block.
    #[cfg(test)]
    pub(super) smuggled: Vec<u8>,
    /// What a test has done to each instruction before it is translated.
    #[cfg(test)]
    pub(crate) mistake: Option<fn(&mut iced_x86::Instruction, &mut crate::decode::op::Op)>,
    /// What blocks were made of, by their number.
    #[cfg(test)]
    pub(super) traces: HashMap<u32, (Trace, Manner)>,
}

/// What the translator did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Blocks translated.
    pub translated: u64,
    /// Translations that were moved to where their code is, too.
    pub moved: u64,
    /// Bytes of host code made for both.
    pub bytes: u64,
    /// Times translated code was entered from the run loop.
    pub entered: u64,
    /// Why it was left, by the number of the reason: see [`Counters::EXITS`].
    pub exits: [u64; 8],
    /// Those of them for which an event was waiting.
    pub for_events: u64,
    /// Instructions that translated code had interpreted.
    pub interpreted: u64,
    /// Times accesses did not lie in one page that share a check.
    pub split: u64,
    /// Times a trace was found to be hot.
    pub hot: u64,
    /// Blocks that became stale.
    pub invalidated: u64,
    /// Times the code memory was full, and emptied.
    pub emptied: u64,
    /// Bytes of code memory in use now, thunks included.
    pub used: u64,
    /// Bytes of code memory there are.
    pub capacity: u64,
}

impl Counters {
    /// What the reasons in [`Counters::exits`] are, by number.
    pub const EXITS: [&'static str; 8] =
        ["", "look-up", "new link", "to interpret", "machine", "fault", "", ""];

    /// Translated code was left for `reason`, while an event was waiting or not.
    pub(super) fn left(&mut self, reason: u64, event: bool) {
        if let Some(exits) = self.exits.get_mut(reason as usize) {
            *exits = exits.wrapping_add(1);
        }
        self.for_events = self.for_events.wrapping_add(u64::from(event));
    }
}

impl Translator {
    /// # Errors
    /// When the host refuses code memory.
    pub(crate) fn new(config: Config) -> io::Result<Self> {
        let mut memory = CodeMemory::new(config.code_cache)?;
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
            ops: Ops::default(),
            links: Vec::new(),
            relocations: Vec::new(),
            splits: HashMap::new(),
            wishes: HashMap::new(),
            retired: HashSet::new(),
            frames: HashMap::new(),
            by_code: HashMap::new(),
            plans: Plans::new(),
            spare: Trace::default(),
            spare_code: Vec::new(),
            pending: None,
            seen: 0,
            refused: None,
            counters: Counters::default(),
            turns: config.turns.max(1),
            patience: Patience::new(host_tsc()),
            invalidation: config.invalidate.map(Schedule::new),
            verify: config.verify,
            bad: None,
            #[cfg(test)]
            smuggled: Vec::new(),
            #[cfg(test)]
            mistake: None,
            #[cfg(test)]
            traces: HashMap::new(),
        })
    }

    /// Where the code of the block at `rip` is and how long it is, for whoever wants to look
    /// at it.
    pub(crate) fn listing(&self, rip: u64) -> Option<(u64, usize)> {
        let placed = self.blocks.iter().rfind(|placed| placed.rip == rip)?;
        Some((self.memory.address(placed.offset as usize) as u64, placed.len as usize))
    }

    /// What it did so far.
    pub(crate) fn counters(&self) -> Counters {
        Counters {
            used: self.used as u64,
            capacity: self.memory.capacity() as u64,
            ..self.counters
        }
    }

    /// Where the link `number` goes.
    pub(super) fn target(&self, number: u32) -> Option<u64> {
        self.links.get(number as usize).map(|link| link.target)
    }

    /// Makes sure that there is room for the largest block there can be; says whether all
    /// others had to go for it.
    pub(super) fn make_room(&mut self) -> bool {
        let full = !self.has_room();
        if full {
            self.empty();
        }
        full
    }

    pub(super) fn has_room(&self) -> bool {
        self.used.saturating_add(LARGEST) <= self.memory.capacity()
    }

    /// Empties the code memory.
    pub(crate) fn empty(&mut self) {
        self.used = self.fixed;
        self.generation = self.generation.wrapping_add(1);
        self.blocks.clear();
        self.ops.clear();
        self.links.clear();
        self.relocations.clear();
        self.splits.clear();
        self.wishes.clear();
        self.retired.clear();
        self.frames.clear();
        self.by_code.clear();
        #[cfg(test)]
        self.traces.clear();
        self.pending = None;
        self.counters.emptied = self.counters.emptied.wrapping_add(1);
    }

    /// Places `trace`, whose code is in `frame` at `version`. `None` when the code memory is
    /// full or the trace is none for us.
    pub(super) fn place(
        &mut self,
        trace: &Trace,
        frame: RamFrame,
        version: u32,
        tail: Option<Tail>,
    ) -> Option<Entry> {
        let offset = self.next_offset()?;
        let address = self.memory.address(offset as usize) as u64;
        let first_link = u32::try_from(self.links.len()).ok()?;
        let (rip, mode) = (trace.ops.first()?.rip, trace.mode);
        let wish = self.wish(frame, rip, mode);
        let (thunks, manner) = (&self.thunks, wish.manner());
        let spare = std::mem::take(&mut self.spare_code);
        let made =
            block::translate(trace, thunks, &mut self.ops, address, first_link, manner, spare)
                .ok()?;
        #[cfg(test)]
        let made = if self.smuggled.is_empty() {
            made
        } else {
            let code = [self.smuggled.as_slice(), &made.code].concat();
            block::Translated { code, relocations: None, ..made }
        };
        let relocations = made.relocations.unwrap_or_default();
        let placed = Placed {
            rip,
            mode,
            offset,
            len: u32::try_from(made.code.len()).ok()?,
            way_out: u32::try_from(made.way_out).ok()?,
            first_link,
            first_op: u32::try_from(made.first_op).ok()?,
            ops: u16::try_from(self.ops.count().saturating_sub(made.first_op)).ok()?,
            instructions: u16::try_from(trace.steps.len()).ok()?,
            relocations: Span::push(&mut self.relocations, &relocations),
            frame,
            stale: false,
            manner,
        };
        #[cfg(test)]
        self.traces.insert(self.blocks.len() as u32, (trace.clone(), manner));
        let entry = self.add(&made.code, &made.links, placed, version, tail)?;
        self.spare_code = made.code;
        self.counters.translated = self.counters.translated.wrapping_add(1);
        if let Some(former) = wish.former.and_then(|former| self.blocks.get(former as usize)) {
            // Whoever has a link to it comes here.
            self.aim(former.offset.saturating_add(1) as usize, entry.address);
            self.wishes.entry((frame, rip, mode)).and_modify(|wish| wish.former = None);
        }
        Some(entry)
    }

    /// Where the next block begins.
    pub(super) fn next_offset(&self) -> Option<u32> {
        u32::try_from(self.used.checked_next_multiple_of(ALIGN)?).ok()
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
        let (offset, frame) = (placed.offset as usize, placed.frame);
        let address = self.memory.address(offset) as u64;
        if (self.verify || cfg!(debug_assertions))
            && let Err(violation) = verify::verify(code, address, &self.thunks)
        {
            debug_assert!(self.verify, "{violation}");
            self.bad = Some(BadTranslation::new(placed.rip, &violation));
            return None;
        }
        if !self.memory.write(offset, code) {
            return None;
        }
        self.used = offset.saturating_add(code.len());
        self.counters.bytes = self.counters.bytes.wrapping_add(code.len() as u64);
        let number = u32::try_from(self.blocks.len()).ok()?;
        self.links.extend(links.iter().map(|link| Link {
            offset: offset.saturating_add(link.at),
            target: link.target,
            from: number,
        }));
        self.blocks.push(placed);
        for (frame, version) in
            [Some((frame, version)), tail.map(|tail| (tail.frame, tail.version))]
                .into_iter()
                .flatten()
        {
            let (known, blocks) = self.frames.entry(frame).or_insert((version, Vec::new()));
            if *known != version {
                // The others are stale, and about to be found out.
                return None;
            }
            blocks.push(number);
        }
        // Elsewhere, what reaches into another page has another one behind it.
        if tail.is_none() {
            self.by_code.insert(code_at(frame, placed.rip, placed.mode), number);
        }
        Some(Entry {
            generation: self.generation,
            mode: placed.mode,
            address,
            crosses: tail.is_some(),
        })
    }

    /// Writes the jump distance at `offset`, so that it goes to `to`.
    fn aim(&mut self, offset: usize, to: u64) {
        let next = (self.memory.address(offset) as u64).wrapping_add(4);
        let written = self.memory.write(offset, &(to.wrapping_sub(next) as u32).to_le_bytes());
        debug_assert!(written, "links are inside the code memory");
    }

    /// Has the link by which the last block was left go straight to `to`, if that is its target:
    /// the code at `rip`, in `mode`, under the mappings numbered `mappings`.
    pub(super) fn connect(&mut self, rip: u64, to: Entry, mappings: u64) {
        let Some((number, left_under)) = self.pending.take() else { return };
        let Some(link) = self.links.get(number as usize).copied() else { return };
        let from = self.blocks.get(link.from as usize);
        let alike = |from: &Placed| !from.stale && from.mode == to.mode;
        if link.target == rip && left_under == mappings && from.is_some_and(alike) {
            self.aim(link.offset, to.address);
        }
    }

    /// The block that was placed last, and its code.
    pub(super) fn newest(&self) -> Option<(&Placed, &[u8])> {
        let placed = self.blocks.last()?;
        Some((placed, self.memory.read(placed.offset as usize, placed.len as usize)))
    }

    /// The thunks.
    pub(crate) fn thunk_code(&self) -> &[u8] {
        self.memory.read(0, self.fixed)
    }

    /// Makes sure that no block is entered whose code has changed. Those that were are told
    /// of, by their RIP.
    pub(super) fn drop_stale(
        &mut self,
        version: impl Fn(RamFrame) -> u32,
        mut dropped: impl FnMut(u64),
    ) {
        let changed: Vec<RamFrame> = self
            .frames
            .iter()
            .filter(|(frame, (known, _))| version(**frame) != *known)
            .map(|(frame, _)| *frame)
            .collect();
        for frame in changed {
            let Some((_, blocks)) = self.frames.remove(&frame) else { continue };
            for number in blocks {
                if let Some(rip) = self.close(number) {
                    dropped(rip);
                    self.counters.invalidated = self.counters.invalidated.wrapping_add(1);
                }
            }
        }
    }

    /// Block `number` is entered no more. Says for what code it stands.
    pub(super) fn close(&mut self, number: u32) -> Option<u64> {
        let placed = self.blocks.get_mut(number as usize)?;
        placed.stale = true;
        // jmp: five bytes, which the shortest block has.
        let [a, b, c, d] = placed.way_out.wrapping_sub(5).to_le_bytes();
        let written = self.memory.write(placed.offset as usize, &[0xe9, a, b, c, d]);
        debug_assert!(written, "blocks are inside the code memory");
        Some(placed.rip)
    }

    pub(super) fn turns(&self) -> u64 {
        self.turns
    }

    /// Whether `entry` went with all others when the code memory was full.
    pub(super) fn was_emptied_since(&self, entry: Entry) -> bool {
        entry.generation != self.generation
    }

    /// Whether `entry` can still be entered, in `mode`.
    pub(super) fn holds(&self, entry: Entry, mode: Mode) -> bool {
        entry.generation == self.generation
            && entry.mode == mode
            && (self.retired.is_empty() || !self.retired.contains(&entry.address))
    }
}
