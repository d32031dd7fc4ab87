//! Translated blocks: where they are in the code memory, and how they lead to one another.
//!
//! Blocks are only ever added, until the memory is full and starts over empty. One whose code
//! has changed is not taken out: its first instruction becomes a jump out.

use std::collections::{HashMap, HashSet};
use std::io;

use super::config::{BadTranslation, Config};
use super::ops::Ops;
use super::thunks::{self, Thunks};
use super::trace::Trace;
use super::{block, verify};
use crate::code_memory::CodeMemory;
use crate::memory::ram::RamFrame;

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
    /// Where in the code memory it is, and how long.
    offset: usize,
    len: usize,
    /// RIP of the code that it stands for.
    rip: u64,
    /// Where in its code it leaves to be looked up again.
    way_out: usize,
    /// The frame its code is in.
    frame: RamFrame,
    /// It is entered no more: nothing may be linked from it either.
    stale: bool,
}

/// How often lately a trace was left because what it checks at once lies in two pages.
#[derive(Clone, Copy, Debug)]
struct Splits {
    since: u64,
    times: u32,
}

/// So often within [`SPLIT_WINDOW`], and a trace is better off with a check for each access.
const MANY_SPLITS: u32 = 64;
/// Ticks of the TSC: a millisecond or so.
const SPLIT_WINDOW: u64 = 1 << 22;

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
    /// What they call the interpreter with.
    ops: Ops,
    links: Vec<Link>,
    /// Traces that were split lately, by the RIP of their code.
    splits: HashMap<u64, Splits>,
    /// Those that are to check each access, and where they were when they did not, if nothing
    /// has taken their place yet.
    separate: HashMap<(RamFrame, u64), Option<u32>>,
    /// The addresses that they had then.
    retired: HashSet<u64>,
    /// Blocks by the frame their code is in, and the version they hold for.
    frames: HashMap<RamFrame, (u32, Vec<u32>)>,
    /// The link that the last block was left by.
    pub(super) pending: Option<u32>,
    /// The code map's count of hits that [`Translator::frames`] is up to date with.
    pub(super) seen: u64,
    /// The block at this address must be interpreted this time.
    pub(super) refused: Option<u64>,
    pub(super) counters: Counters,
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
    /// Why it was left, by the number of the reason: see [`Counters::EXITS`].
    pub exits: [u64; 8],
    /// Those of them for which an event was waiting.
    pub for_events: u64,
    /// Instructions that translated code had interpreted.
    pub interpreted: u64,
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
        ["", "look-up", "new link", "to interpret", "machine", "fault", "split check", ""];

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
            splits: HashMap::new(),
            separate: HashMap::new(),
            retired: HashSet::new(),
            frames: HashMap::new(),
            pending: None,
            seen: 0,
            refused: None,
            counters: Counters::default(),
            verify: config.verify,
            bad: None,
            #[cfg(test)]
            smuggled: Vec::new(),
            #[cfg(test)]
            mistake: None,
        })
    }

    /// Where the code of the block at `rip` is and how long it is, for whoever wants to look
    /// at it.
    pub(crate) fn listing(&self, rip: u64) -> Option<(u64, usize)> {
        let placed = self.blocks.iter().rfind(|placed| placed.rip == rip)?;
        Some((self.memory.address(placed.offset) as u64, placed.len))
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
        self.ops.clear();
        self.links.clear();
        self.splits.clear();
        self.separate.clear();
        self.retired.clear();
        self.frames.clear();
        self.pending = None;
        self.counters.emptied = self.counters.emptied.wrapping_add(1);
    }

    /// Places `trace`, whose code is in `frame` at `version`. `None` when the code memory is
    /// full or the trace is none for us.
    pub(super) fn place(&mut self, trace: Trace, frame: RamFrame, version: u32) -> Option<Entry> {
        let offset = self.used.checked_next_multiple_of(ALIGN)?;
        let address = self.memory.address(offset) as u64;
        let first_link = u32::try_from(self.links.len()).ok()?;
        let rip = trace.ops.first()?.rip;
        let former = self.separate.get(&(frame, rip)).copied();
        let (thunks, share) = (&self.thunks, former.is_none());
        let made =
            block::translate(&trace, thunks, &mut self.ops, address, first_link, share).ok()?;
        #[cfg(test)]
        let made =
            block::Translated { code: [self.smuggled.as_slice(), &made.code].concat(), ..made };
        if (self.verify || cfg!(debug_assertions))
            && let Err(violation) = verify::verify(&made.code, address, &self.thunks)
        {
            debug_assert!(self.verify, "{violation}");
            self.bad = Some(BadTranslation::new(rip, &violation));
            return None;
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
        let (len, way_out) = (made.code.len(), made.way_out);
        self.blocks.push(Placed { offset, len, rip, way_out, frame, stale: false });
        let (known, blocks) = self.frames.entry(frame).or_insert((version, Vec::new()));
        if *known != version {
            // The others are stale, and about to be found out.
            return None;
        }
        blocks.push(number);
        if let Some(former) = former.flatten()
            && let Some(former) = self.blocks.get(former as usize)
        {
            // Whoever has a link to it comes here.
            self.aim(former.offset.saturating_add(1), address);
            self.separate.insert((frame, rip), None);
        }
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

    /// The code that was placed last.
    pub(super) fn newest(&self) -> &[u8] {
        self.blocks.last().map_or(&[], |placed| self.memory.read(placed.offset, placed.len))
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
    fn close(&mut self, number: u32) -> Option<u64> {
        let placed = self.blocks.get_mut(number as usize)?;
        placed.stale = true;
        // jmp: five bytes, which the shortest block has.
        let [a, b, c, d] = (placed.way_out as u32).wrapping_sub(5).to_le_bytes();
        let written = self.memory.write(placed.offset, &[0xe9, a, b, c, d]);
        debug_assert!(written, "blocks are inside the code memory");
        Some(placed.rip)
    }

    /// The trace at `rip` was left at time `now` because what it checks at once lies in two
    /// pages, or is not all of one kind. Where that happens again and again it is made anew.
    pub(super) fn split(&mut self, rip: u64, now: u64) {
        let splits = self.splits.entry(rip).or_insert(Splits { since: now, times: 0 });
        if now.wrapping_sub(splits.since) > SPLIT_WINDOW {
            *splits = Splits { since: now, times: 0 };
        }
        splits.times = splits.times.saturating_add(1);
        if splits.times < MANY_SPLITS {
            return;
        }
        self.splits.remove(&rip);
        let of_it = |placed: &Placed| placed.rip == rip && !placed.stale;
        let Some(number) = self.blocks.iter().rposition(of_it) else { return };
        let Some(placed) = self.blocks.get(number) else { return };
        let key = (placed.frame, rip);
        if self.separate.contains_key(&key) {
            return;
        }
        self.retired.insert(self.memory.address(placed.offset) as u64);
        self.separate.insert(key, Some(number as u32));
        self.close(number as u32);
    }

    /// Whether `entry` can still be entered.
    pub(super) fn holds(&self, entry: Entry) -> bool {
        entry.generation == self.generation
            && (self.retired.is_empty() || !self.retired.contains(&entry.address))
    }
}
