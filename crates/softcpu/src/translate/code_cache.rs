//! The code memory that the vCPUs of a machine share.
//!
//! What one has translated is there for all. Whoever translates, links or drops something has the
//! lock; translated code itself runs without it, on however many threads, while that is done. Three
//! things make this safe:
//!
//! * **Running code is changed in two places only**: where a jump leads, and the first instruction
//!   of a translation, which becomes a jump out. Both are aligned and stored at once, so a host that
//!   is executing there meets the old or the new, and both are right.
//! * **What has changed is noticed** before a vCPU comes to translated code again: it compares
//!   counts, and has its processor fetch anew ([`serialize`]).
//! * **Code memory is filled again** only when nobody runs what was there. A region is *given up*
//!   first: nothing leads there any more. Each vCPU is told, forgets where it was, and says so from
//!   its run loop, where it runs no translated code. The next region is given up while there is room
//!   in the present one, so nobody waits for that; who would have to goes on in the interpreter.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::mode::SegmentNumbers;
use super::regions::Fillings;
use super::thunks::{self, Thunks};
use super::translations::{Entry, Translations};
use crate::code_memory::{CodeMemory, serialize};
use crate::handle::{Event, VcpuHandle};
use crate::memory::code_map::CodeMap;
use crate::native::Stubs;
use crate::observers::{Observer, Observers};
use crate::sync::lock;

#[cfg(test)]
mod tests;

/// How many of the regions that were given up last are known: a vCPU that has missed more forgets
/// everything.
const LOG: usize = 64;

/// What had to go from the code memory.
#[derive(Clone, Debug)]
pub(crate) struct Evicted {
    /// As the how many-th it was given up.
    pub(super) number: u64,
    /// Where it was executed.
    pub(crate) hosts: Range<u64>,
    pub(crate) blocks: u64,
    /// The memory has been filled to its end since this was said last.
    pub(crate) turned: bool,
}

/// How far a vCPU is with what is done to code that it may run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Translations closed.
    closed: u64,
    /// Regions given up.
    given_up: u64,
}

/// See the module's words. One serves all vCPUs of a machine.
#[derive(Debug)]
pub struct CodeCache {
    /// Where it is executed, and how long it is.
    bounds: Range<u64>,
    /// The code in front of all translations.
    pub(super) thunks: Thunks,
    fixed: usize,
    fillings: Arc<Fillings>,
    /// What translations name.
    stubs: Arc<Stubs>,
    /// The numbers of code segments, which translations are found by.
    pub(super) segments: Arc<SegmentNumbers>,
    /// The code map's count of hits whose blocks have been closed.
    seen: AtomicU64,
    /// Counts translations that were closed, and regions that were given up.
    closed: AtomicU64,
    given_up: AtomicU64,
    /// Who has left which of those.
    observers: Observers,
    translations: Mutex<Translations>,
    /// The regions that were given up last.
    log: Mutex<VecDeque<Evicted>>,
}

impl CodeCache {
    /// One of so many bytes (see [`Config::code_cache`](super::Config::code_cache)), for vCPUs that
    /// have `stubs`, which translations name.
    ///
    /// # Errors
    /// When the host refuses code memory.
    pub fn new(bytes: usize, stubs: &Arc<Stubs>) -> io::Result<Self> {
        let mut memory = CodeMemory::new(bytes)?;
        let start = memory.address(0) as u64;
        let (code, thunks) =
            thunks::make(start).map_err(|_| io::Error::other("the thunks do not assemble"))?;
        if !memory.write(0, &code) {
            return Err(io::Error::other("the thunks do not fit"));
        }
        let bounds = start..start.wrapping_add(memory.capacity() as u64);
        let translations = Translations::new(memory, code.len());
        Ok(Self {
            bounds,
            thunks,
            fixed: code.len(),
            fillings: translations.regions.fillings(),
            stubs: Arc::clone(stubs),
            segments: Arc::default(),
            seen: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            given_up: AtomicU64::new(0),
            observers: Observers::default(),
            translations: Mutex::new(translations),
            log: Mutex::default(),
        })
    }

    /// Whether its translations name `stubs`.
    pub(super) fn names(&self, stubs: &Arc<Stubs>) -> bool {
        Arc::ptr_eq(&self.stubs, stubs)
    }

    /// Enrols a vCPU, which runs no code before it [enters](CodeCache::enter).
    pub(super) fn enrol(&self, handle: VcpuHandle) -> Arc<Observer> {
        self.observers.enrol(handle)
    }

    /// The translations, for as long as nobody else needs them.
    pub(super) fn lock(&self) -> MutexGuard<'_, Translations> {
        lock(&self.translations)
    }

    /// Where code memory is executed.
    pub(super) fn bounds(&self) -> Range<u64> {
        self.bounds.clone()
    }

    /// Bytes of thunks, behind which translations begin.
    pub(super) fn fixed(&self) -> usize {
        self.fixed
    }

    /// Bytes in use, thunks included.
    pub(super) fn used(&self) -> u64 {
        self.fixed.saturating_add(self.lock().regions.used()) as u64
    }

    /// Bytes there are.
    pub(super) fn capacity(&self) -> u64 {
        self.bounds.end.saturating_sub(self.bounds.start)
    }

    /// Whether `entry` is still there.
    #[inline]
    pub(super) fn has(&self, entry: Entry) -> bool {
        self.fillings.has(entry)
    }

    /// Whether the blocks of all code that `code` knows to have changed are closed.
    #[inline(always)]
    pub(super) fn is_up_to_date(&self, code: &CodeMap) -> bool {
        self.seen.load(Ordering::Acquire) == code.hits()
    }

    /// Closes those that are not yet, and tells of them by their RIP.
    #[cold]
    pub(super) fn drop_stale(&self, code: &CodeMap, mut dropped: impl FnMut(u64)) {
        let mut translations = self.lock();
        // Read first: what is hit later is looked for later.
        let (since, now) = (self.seen.load(Ordering::Acquire), code.hits());
        let mut closed = 0_u64;
        translations.drop_stale(code, since, |rip| {
            closed = closed.wrapping_add(1);
            dropped(rip);
        });
        self.closed.fetch_add(closed, Ordering::Release);
        self.seen.store(now, Ordering::Release);
    }

    /// A translation was closed for another reason.
    pub(super) fn note_closed(&self) {
        self.closed.fetch_add(1, Ordering::Release);
    }

    /// How far everything is.
    #[inline(always)]
    fn now(&self) -> Progress {
        let closed = self.closed.load(Ordering::Acquire);
        Progress { closed, given_up: self.given_up.load(Ordering::SeqCst) }
    }

    /// Whether a vCPU that has come to `progress` may go on in translated code.
    #[inline(always)]
    pub(super) fn is_current(&self, progress: Progress) -> bool {
        progress == self.now()
    }

    /// Brings `me`, who runs no translated code just now, from `progress` to where everything is.
    /// It forgets what has gone, each or, if that is not known, all of it.
    #[cold]
    pub(super) fn catch_up(
        &self,
        me: &Observer,
        progress: &mut Progress,
        mut forget: impl FnMut(Option<&Evicted>),
    ) {
        let now = self.now();
        if progress.given_up != now.given_up {
            let log = lock(&self.log);
            let missed = log.iter().filter(|evicted| evicted.number > progress.given_up);
            let known = missed.clone().count() as u64;
            if known < now.given_up.wrapping_sub(progress.given_up) {
                forget(None);
            } else {
                missed.for_each(|evicted| forget(Some(evicted)));
            }
            me.saw(now.given_up);
        }
        *progress = now;
        serialize();
    }

    /// `me`, who has come to `progress`, is about to run code, and catches up before it does.
    pub(super) fn enter(&self, me: &Observer, progress: Progress) {
        me.saw(progress.given_up);
    }

    /// `me` runs no code until it enters again.
    pub(super) fn leave(&self, me: &Observer) {
        me.rests();
    }

    /// Gives up the region that is to be filled next, unless it has been.
    pub(super) fn give_up_next(&self, me: &Observer) -> Option<Evicted> {
        let mut translations = self.lock();
        let next = translations.regions.next();
        if translations.regions.given_up(next).is_some() {
            return None;
        }
        let number = self.given_up.load(Ordering::SeqCst).wrapping_add(1);
        let evicted = translations.give_up(next, number);
        let mut log = lock(&self.log);
        log.truncate(LOG.saturating_sub(1));
        log.push_front(evicted.clone());
        self.given_up.store(number, Ordering::SeqCst);
        drop((log, translations));
        self.observers.tell_late(me, number, Event::CODE_CHANGED);
        Some(evicted)
    }

    /// The same `translations`, with room for `bytes` more. `None` if the next region had better be
    /// [given up](CodeCache::give_up_next) first, or if it has been and others have yet to say that
    /// they are done with it: they are told.
    pub(super) fn with_room<'a>(
        &'a self,
        me: &Observer,
        mut translations: MutexGuard<'a, Translations>,
        bytes: usize,
    ) -> Option<MutexGuard<'a, Translations>> {
        let regions = &translations.regions;
        let next = regions.next();
        let given_up = regions.given_up(next);
        if regions.has_room(bytes) {
            let soon =
                given_up.is_none() && regions.is_nearly_full() && self.observers.are_several();
            return (!soon).then_some(translations);
        }
        let number = given_up?;
        if !self.observers.have_seen(number) {
            self.observers.tell_late(me, number, Event::CODE_CHANGED);
            return None;
        }
        translations.regions.fill(next);
        translations.regions.has_room(bytes).then_some(translations)
    }

    /// Empties the code memory. No vCPU may be running there, nor remember anything of it.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }
}
