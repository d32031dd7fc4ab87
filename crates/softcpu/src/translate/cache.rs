//! Translated blocks: where they are in the code memory, and how they lead to one another.
//!
//! The memory is filled in order, region by region ([`super::regions`]), and what is oldest is
//! evicted for what is new. A block whose code has changed stays until then: its first
//! instruction becomes a jump out.

use std::io;
use std::ops::Range;

use foldhash::HashMap;

use super::clone::Span;
use super::config::{BadTranslation, Config};
use super::frames::{Code, Frames};
use super::invalidation::Schedule;
use super::manner::Manner;
use super::mode::Mode;
use super::orders::Orders;
use super::patience::Patience;
use super::regions::{self, Filling, Regions};
use super::route::Route;
use super::thunks::{self, Thunks};
use super::trace::Trace;
use super::wishes::{Splits, Wanted, Wish};
use super::workbench::Workbench;
use super::{block, verify};
use crate::code_memory::CodeMemory;
use crate::decode::cache::Tail;
use crate::memory::code_map::CodeMap;
use crate::memory::ram::RamFrame;
use crate::system::tsc::host_tsc;

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

/// All translated code of one vCPU.
#[derive(Debug)]
pub(crate) struct Translator {
    pub(super) memory: CodeMemory,
    pub(super) thunks: Thunks,
    /// Bytes of thunks.
    fixed: usize,
    pub(super) regions: Regions,
    /// Traces that were split lately, by the RIP of their code.
    pub(super) splits: HashMap<u64, Splits>,
    /// What is to be translated in another way.
    pub(super) wishes: HashMap<Wanted, Wish>,
    /// Blocks by the frame their code is in.
    pub(super) frames: Frames,
    pub(super) bench: Workbench,
    /// The last route and what was made last, for the memory they have.
    pub(super) spare_route: Route,
    spare_made: block::Translated,
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
    /// Who translates beside the vCPU.
    pub(super) orders: Option<Orders>,
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

/// What had to go from the code memory.
#[derive(Clone, Debug)]
pub(crate) struct Evicted {
    /// Where it was executed.
    pub(crate) hosts: Range<u64>,
    pub(crate) blocks: u64,
    /// The memory has been filled to its end since this was said last.
    pub(crate) turned: bool,
}

/// What the translator did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Blocks translated.
    pub translated: u64,
    /// Translations that were moved to where their code is, too.
    pub moved: u64,
    /// Blocks that were translated beside the vCPU, among those.
    pub beside: u64,
    /// Bytes of guest code made there, be it of use still or not.
    pub beside_bytes: u64,
    /// Those that had been made for another vCPU, among those translated.
    pub shared: u64,
    /// Those that were ordered but taken back, for want of patience.
    pub taken_back: u64,
    /// Bytes of guest code translated.
    pub guest_bytes: u64,
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
    /// Pages that the mirror of a process was given.
    pub mirrored: u64,
    /// Faults of the host that asked for one, and how many of them the interpreter had to take.
    pub mirror_faults: u64,
    /// See there.
    pub mirror_refused: u64,
    /// Times another process got the mirror.
    pub mirror_owners: u64,
    /// Blocks that became stale.
    pub invalidated: u64,
    /// Blocks that had to make room for others.
    pub evicted: u64,
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
        let capacity = memory.capacity();
        let (code, thunks) =
            thunks::make(base).map_err(|_| io::Error::other("the thunks do not assemble"))?;
        if !memory.write(0, &code) {
            return Err(io::Error::other("the thunks do not fit"));
        }
        Ok(Self {
            memory,
            thunks,
            fixed: code.len(),
            regions: Regions::new(base, capacity, code.len()),
            splits: HashMap::default(),
            wishes: HashMap::default(),
            frames: Frames::default(),
            bench: Workbench::new(),
            spare_route: Route::default(),
            spare_made: block::Translated::default(),
            pending: None,
            seen: 0,
            refused: None,
            counters: Counters::default(),
            turns: config.turns.max(1),
            patience: Patience::new(host_tsc()),
            orders: None,
            invalidation: config.invalidate.map(Schedule::new),
            verify: config.verify,
            bad: None,
            #[cfg(test)]
            smuggled: Vec::new(),
            #[cfg(test)]
            mistake: None,
            #[cfg(test)]
            traces: HashMap::default(),
        })
    }

    /// Where the code of the block at `rip` is and how long it is, for whoever wants to look
    /// at it.
    pub(crate) fn listing(&self, rip: u64) -> Option<(u64, usize)> {
        let all = self.regions.blocks().flatten();
        let placed = all.filter(|placed| placed.rip == rip && !placed.stale).last()?;
        Some((self.memory.address(placed.offset as usize) as u64, placed.len as usize))
    }

    /// What it did so far.
    pub(crate) fn counters(&self) -> Counters {
        Counters {
            used: self.fixed.saturating_add(self.regions.used()) as u64,
            capacity: self.memory.capacity() as u64,
            ..self.counters
        }
    }

    /// Where its code memory is executed from and to.
    pub(super) fn bounds(&self) -> (u64, u64) {
        let start = self.memory.address(0) as u64;
        (start, start.wrapping_add(self.memory.capacity() as u64))
    }

    /// Where the link `number` goes.
    pub(super) fn target(&self, number: u32) -> Option<u64> {
        self.regions.link(number).map(|link| link.target)
    }

    /// Makes sure that there is room for `bytes` more. What is oldest may have to go for it: no
    /// code may be running then, and nobody may jump to what was there.
    pub(super) fn make_room(&mut self, bytes: usize) -> Option<Evicted> {
        if self.regions.has_room(bytes) {
            return None;
        }
        let (region, contents) = self.regions.next();
        // Those are from a moment ago, or of no use.
        self.splits.clear();
        if contents.blocks.is_empty() {
            return None;
        }
        for placed in &contents.blocks {
            let code = Code::at(placed.rip, placed.mode);
            self.frames.evict(placed.frame, region, Some(code));
        }
        for frame in contents.tails {
            self.frames.evict(frame, region, None);
        }
        #[cfg(test)]
        self.traces.retain(|number, _| !regions::is_in(*number, region));
        for wanted in contents.wishes {
            self.wishes.remove(&wanted);
        }
        // The last of those that lead from one place knows where that leads otherwise.
        for jump in contents.incoming.into_iter().rev() {
            // One that a closed block began with is no jump any more.
            let leads_here = self
                .distance(jump.at)
                .is_some_and(|distance| self.regions.leads_into(jump.at, distance, region));
            if leads_here && self.regions.is_there(&jump) {
                let written = self.memory.write(jump.at as usize, &jump.own.to_le_bytes());
                debug_assert!(written, "jumps are inside the code memory");
            }
        }
        self.pending = self.pending.filter(|(link, _)| !regions::is_in(*link, region));
        let blocks = contents.blocks.len() as u64;
        self.counters.evicted = self.counters.evicted.wrapping_add(blocks);
        let bounds = self.regions.bounds(region);
        let at = |offset| self.memory.address(offset) as u64;
        Some(Evicted { hosts: at(bounds.start)..at(bounds.end), blocks, turned: region == 0 })
    }

    /// Empties the code memory.
    pub(crate) fn empty(&mut self) {
        let blocks: u64 = self.regions.blocks().map(|blocks| blocks.len() as u64).sum();
        self.regions.clear();
        self.splits.clear();
        self.wishes.clear();
        self.frames.clear();
        #[cfg(test)]
        self.traces.clear();
        self.pending = None;
        self.counters.evicted = self.counters.evicted.wrapping_add(blocks);
    }

    /// Places `trace`, whose code is in `frame` at `version`. `None` when the code memory is
    /// full or the trace is none for us.
    pub(super) fn place(
        &mut self,
        trace: &Trace,
        frame: RamFrame,
        version: u32,
        tail: Option<Tail>,
        mirrors: bool,
    ) -> Option<Entry> {
        let offset = self.regions.next_offset()?;
        let address = self.memory.address(offset as usize) as u64;
        let first_link = self.regions.number(self.regions.newest()?.links.len())?;
        let (rip, mode) = (trace.ops.first()?.rip, trace.mode);
        let wish = self.wish(frame, rip, mode);
        let manner = wish.manner(mirrors);
        let region = self.regions.current()?;
        let site = block::Site { thunks: &self.thunks, base: address, first_link };
        let spare = std::mem::take(&mut self.spare_made);
        let made = self.bench.translate(trace, site, &mut region.ops, manner, spare).ok()?;
        #[cfg(test)]
        let made = if self.smuggled.is_empty() {
            made
        } else {
            let code = [self.smuggled.as_slice(), &made.code].concat();
            block::Translated { code, movable: false, landings: Vec::new(), ..made }
        };
        let placed = Placed {
            rip,
            mode,
            offset,
            len: u32::try_from(made.code.len()).ok()?,
            way_out: u32::try_from(made.way_out).ok()?,
            first_link,
            first_op: u32::try_from(made.first_op).ok()?,
            ops: u16::try_from(region.ops.count().saturating_sub(made.first_op)).ok()?,
            instructions: u16::try_from(trace.steps.len()).ok()?,
            relocations: Span::of_movable(&mut region.relocations, &made.relocations, made.movable),
            landings: Span::push(&mut region.landings, &made.landings),
            frame,
            stale: false,
            manner,
        };
        let entry = self.add(&made.code, &made.links, placed, version, tail)?;
        self.spare_made = made;
        self.count(trace.bytes());
        #[cfg(test)]
        self.remember(trace, manner);
        if let Some((number, filling)) = wish.former {
            self.wishes.entry((frame, rip, mode)).and_modify(|wish| wish.former = None);
            if self.regions.filling_of(number) == Some(filling)
                && let Some(former) = self.regions.block(number)
            {
                // Whoever has a link to it comes here.
                self.aim(former.offset.saturating_add(1), entry.address);
            }
        }
        Some(entry)
    }

    /// Counts a translation of so many bytes.
    pub(super) fn count(&mut self, guest_bytes: u64) {
        self.counters.translated = self.counters.translated.wrapping_add(1);
        self.counters.guest_bytes = self.counters.guest_bytes.wrapping_add(guest_bytes);
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
        let (offset, frame) = (placed.offset as usize, placed.frame);
        let address = self.memory.address(offset) as u64;
        let landings = placed.landings.of(&self.regions.newest()?.landings).unwrap_or_default();
        if (self.verify || cfg!(debug_assertions))
            && let Err(violation) = verify::verify(code, address, &self.thunks, landings)
        {
            debug_assert!(self.verify, "{violation}");
            self.bad = Some(BadTranslation::new(placed.rip, &violation));
            return None;
        }
        self.regions.take(offset, code.len())?;
        if !self.memory.write(offset, code) {
            return None;
        }
        self.counters.bytes = self.counters.bytes.wrapping_add(code.len() as u64);
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

    /// Has the jump whose distance is at `offset` go to the block at `to`, as long as that is there.
    fn aim(&mut self, offset: u32, to: u64) {
        let base = self.memory.address(0) as u64;
        let at = offset as usize;
        let Some(own) = self.distance(offset) else { return };
        // One that leads elsewhere already would lead back there.
        if !self.regions.stays(offset, own) {
            return;
        }
        self.regions.note_jump(offset, own, to.wrapping_sub(base));
        let next = base.wrapping_add(offset.into()).wrapping_add(4);
        let written = self.memory.write(at, &(to.wrapping_sub(next) as u32).to_le_bytes());
        debug_assert!(written, "jumps are inside the code memory");
    }

    /// Has the link by which the last block was left go straight to `to`, if that is its target:
    /// the code at `rip`, in `mode`, under the mappings numbered `mappings`.
    pub(super) fn connect(&mut self, rip: u64, to: Entry, mappings: u64) {
        let Some((number, left_under)) = self.pending.take() else { return };
        let Some(link) = self.regions.link(number).copied() else { return };
        let from = self.regions.block(link.from);
        let alike = |from: &Placed| !from.stale && from.mode == to.mode;
        if link.target == rip && left_under == mappings && from.is_some_and(alike) {
            self.aim(link.offset, to.address);
        }
    }

    /// The block that was placed last, and its code.
    pub(super) fn newest(&self) -> Option<(&Placed, &[u8])> {
        let placed = self.regions.newest()?.blocks.last()?;
        Some((placed, self.memory.read(placed.offset as usize, placed.len as usize)))
    }

    /// The thunks.
    pub(crate) fn thunk_code(&self) -> &[u8] {
        self.memory.read(0, self.fixed)
    }

    /// Makes sure that no block is entered whose code has changed: there were hits that `code`
    /// knows of. Those that are not entered any more are told of, by their RIP.
    pub(super) fn drop_stale(&mut self, code: &CodeMap, mut dropped: impl FnMut(u64)) {
        let since = std::mem::replace(&mut self.seen, code.hits());
        let changed = code.hit_since(since).unwrap_or_else(|| self.frames.all().collect());
        for frame in changed {
            for number in self.frames.take_stale(frame, code.version(frame)) {
                if let Some(rip) = self.close(number) {
                    dropped(rip);
                    self.counters.invalidated = self.counters.invalidated.wrapping_add(1);
                }
            }
        }
    }

    /// Block `number` is entered no more. Says for what code it stands.
    pub(super) fn close(&mut self, number: u32) -> Option<u64> {
        let placed = self.regions.block_mut(number)?;
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

    /// Whether `entry` can still be entered, in `mode`.
    pub(super) fn holds(&self, entry: Entry, mode: Mode) -> bool {
        entry.mode == mode && self.regions.has(entry) && !self.regions.is_retired(entry)
    }
}
