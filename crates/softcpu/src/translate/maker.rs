//! What a vCPU makes translations with, and gives them their places: all that it needs of its own
//! for that, while it has the translations of all vCPUs for itself.

use super::block;
use super::cache::{Entry, Placed, Translations};
use super::clone::Span;
use super::config::BadTranslation;
use super::counters::Counters;
use super::regions::Landing;
use super::thunks::Thunks;
use super::trace::Trace;
use super::verify;
use super::workbench::Workbench;
use crate::decode::cache::Tail;
use crate::memory::ram::RamFrame;

/// See the module's words.
#[derive(Debug)]
pub(super) struct Maker {
    /// The number of the vCPU.
    pub(super) number: u32,
    pub(super) thunks: Thunks,
    pub(super) bench: Workbench,
    /// What was made last, for the memory it has.
    spare: block::Translated,
    pub(super) counters: Counters,
    /// Every block is looked at before it may run.
    verify: bool,
    /// The block that the last look was not content with.
    pub(super) bad: Option<BadTranslation>,
    /// What a test has put in front of every block.
    #[cfg(test)]
    pub(super) smuggled: Vec<u8>,
}

impl Maker {
    /// That of vCPU `number`, for code memory that has `thunks`. It looks at each translation if it
    /// is to `verify` them.
    pub(super) fn new(number: u32, thunks: Thunks, verify: bool) -> Self {
        Self {
            number,
            thunks,
            bench: Workbench::new(),
            spare: block::Translated::default(),
            counters: Counters::default(),
            verify,
            bad: None,
            #[cfg(test)]
            smuggled: Vec::new(),
        }
    }

    /// Places `trace`, whose code is in `frame` at `version`. `None` when the code memory is
    /// full or the trace is none for us.
    pub(super) fn place(
        &mut self,
        code: &mut Translations,
        trace: &Trace,
        (frame, version, tail): (RamFrame, u32, Option<Tail>),
        mirrors: bool,
    ) -> Option<Entry> {
        let offset = code.regions.next_offset()?;
        let address = code.memory.address(offset as usize) as u64;
        let first_link = code.regions.number(code.regions.newest()?.links.len())?;
        let (rip, mode) = (trace.ops.first()?.rip, trace.mode);
        let wish = code.wish(frame, rip, mode);
        let manner = wish.manner(mirrors);
        let region = code.regions.current()?;
        let site = block::Site { thunks: &self.thunks, base: address, first_link };
        let spare = std::mem::take(&mut self.spare);
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
            by: self.number,
        };
        self.look_at(rip, &made.code, address, &made.landings)?;
        let entry = code.add(&made.code, &made.links, placed, version, tail)?;
        self.spare = made;
        self.count(trace.bytes(), placed.len);
        #[cfg(test)]
        code.remember(trace, manner);
        if let Some(former) = wish.former {
            code.wishes.entry((frame, rip, mode)).and_modify(|wish| wish.former = None);
            // Whoever has a link to it comes here.
            code.replace(former, entry.address);
        }
        Some(entry)
    }

    /// Looks whether `code`, which stands for the guest's at `rip`, may run at `address`, if that is
    /// wanted.
    pub(super) fn look_at(
        &mut self,
        rip: u64,
        code: &[u8],
        address: u64,
        landings: &[Landing],
    ) -> Option<()> {
        if !self.verify && !cfg!(debug_assertions) {
            return Some(());
        }
        let Err(violation) = verify::verify(code, address, &self.thunks, landings) else {
            return Some(());
        };
        debug_assert!(self.verify, "{violation}");
        self.bad = Some(BadTranslation::new(rip, &violation));
        None
    }

    /// Counts a translation of so many bytes.
    pub(super) fn count(&mut self, guest_bytes: u64, bytes: u32) {
        let counters = &mut self.counters;
        counters.translated = counters.translated.wrapping_add(1);
        counters.guest_bytes = counters.guest_bytes.wrapping_add(guest_bytes);
        counters.bytes = counters.bytes.wrapping_add(bytes.into());
    }
}
