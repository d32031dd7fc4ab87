//! The mirror: a process's pages once more, at addresses that are the guest's own plus a
//! constant, so that hot code gets at them without a look into the TLB.
//!
//! The guest's addresses are divided into *spans* of 1 TiB, of which a process uses two or
//! three. For each that is mirrored a *window* of the same size is reserved in the host's
//! address space, all of them as far from the guest's spans. Translated code looks into a table
//! whether the span of an address has one, and then goes there. Nothing is in a window at
//! first: the host's fault is what asks for a page ([`crate::translate`]), and what the walker
//! finds is mapped there with the permissions of the data TLB's entry. So the mirror is a TLB
//! like the others, which has its translations in the host's page tables, and forgets them when
//! the others do.
//!
//! It serves one address space at a time, in the view that users have. What it costs, some
//! microseconds a page, is kept below a share of the time since it began, so that programs that
//! do not come back to their pages lose little ([`Budget`]).

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use foldhash::HashMap;

use self::reserved::{Reserved, map, reserve};
use self::windows::Windows;
use super::frame_filter::FrameFilter;
use crate::addr::{PAGE_OFFSET, PAGE_SHIFT, PAGE_SIZE};
use crate::memory::SharedRam;
use crate::memory::ram::RamFrame;
use crate::system::tsc::host_tsc;

mod asked;
mod reserved;
#[cfg(test)]
mod tests;
mod windows;

/// log2 of the size of a span.
pub(crate) const SPAN_SHIFT: u32 = 40;
const SPAN: u64 = 1 << SPAN_SHIFT;
/// Spans that a user's address can be in; all others have none.
const SPANS: u64 = 128;
/// Bytes beside each window that are never accessible: more than an access that begins in it can
/// reach.
pub(crate) const GUARD: u64 = 1 << 16;
/// Bytes of a table with an entry for each span that 64 bits can say: nearly all of it is one
/// page of zeroes.
const TABLE: usize = 1 << (u64::BITS - SPAN_SHIFT);
/// Spans mirrored at once.
const MOST_WINDOWS: usize = 4;
/// Changes that all mirrors of the process may have made to what is mapped since they were
/// empty. Each makes two mappings at most out of one, and Linux allows 65530 in all.
const MOST_CHANGES: usize = 24 << 10;
static CHANGES: AtomicUsize = AtomicUsize::new(0);

/// A page in a window.
#[derive(Clone, Copy, Debug)]
struct Shown {
    frame: RamFrame,
    writable: bool,
}

/// What is to be shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// The guest's address, of which the offset does not matter.
    pub(crate) addr: u64,
    pub(crate) frame: RamFrame,
    pub(crate) writable: bool,
}

/// How much time may go into it.
#[derive(Clone, Copy, Debug, Default)]
struct Budget {
    since: u64,
    spent: u64,
}

/// Ticks of the TSC that may be spent before anything is gained.
const ADVANCE: u64 = 1 << 24;
/// One part of so many of the time may be spent.
const SHARE: u64 = 8;
/// Ticks of the TSC until room for windows is looked for again where there was none: a tenth of a
/// second or so.
const CROWDED: u64 = 1 << 28;
/// Most that counts of what is spent at once, a quarter of a millisecond or so: whatever took
/// longer was interrupted by the host.
const AT_ONCE: u64 = 1 << 19;

impl Budget {
    fn spend(&mut self, ticks: u64) {
        self.spent = self.spent.saturating_add(ticks.min(AT_ONCE));
    }

    fn has_room(&self, now: u64) -> bool {
        self.spent < ADVANCE.saturating_add(now.wrapping_sub(self.since) / SHARE)
    }
}

/// See the module's words.
#[derive(Debug)]
pub(crate) struct Mirror {
    /// Two tables, one behind the other: the first says of each span whether it has a window,
    /// the second that none has.
    tables: Option<Reserved>,
    windows: Windows,
    /// Windows that were given up, but translated code may still have ways into.
    retired: Vec<Reserved>,
    /// The address space that is mirrored, by its number in the TLB's tags.
    owner: Option<u64>,
    /// The owner is not served for now.
    paused: bool,
    pages: HashMap<u64, Shown>,
    /// Frames that may be stored to.
    stored: Box<FrameFilter>,
    /// This one's part of [`CHANGES`].
    changes: usize,
    budget: Budget,
    /// When an owner was current last.
    left: u64,
    /// When windows were last looked for in vain.
    crowded: Option<u64>,
    /// The count of marked frames of the code map when all pages were last looked at.
    epoch: u64,
    pub(crate) counters: Counters,
}

/// What it did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    /// Pages mapped.
    pub(crate) shown: u64,
    /// Faults of the host that asked for one.
    pub(crate) faults: u64,
    /// Those that the interpreter had to take.
    pub(crate) refused: u64,
    /// Times another address space was taken.
    pub(crate) owners: u64,
}

impl Mirror {
    /// One that serves nobody, and cannot before [`Mirror::prepare`].
    pub(crate) fn new() -> Self {
        Self {
            tables: None,
            windows: Windows::default(),
            retired: Vec::new(),
            owner: None,
            paused: false,
            pages: HashMap::default(),
            stored: Box::default(),
            changes: 0,
            budget: Budget::default(),
            left: 0,
            crowded: None,
            epoch: 0,
            counters: Counters::default(),
        }
    }

    /// Makes the tables, if the host has room for them.
    pub(crate) fn prepare(&mut self) {
        self.tables = Reserved::anywhere(2 * TABLE, libc::PROT_READ);
        if let Some(tables) = &self.tables
            && !tables.make_writable(SPANS as usize)
        {
            self.tables = None;
        }
    }

    /// Whether there may be one.
    pub(crate) fn is_ready(&self) -> bool {
        self.tables.is_some()
    }

    /// The table for translated code in address space `number`, if users' permissions are in
    /// force, and else the one that has nothing.
    #[inline]
    pub(crate) fn table(&self, number: u64, user: bool) -> u64 {
        let Some(tables) = &self.tables else { return 0 };
        let serves = user && self.serves(number);
        tables.start().wrapping_add(if serves { 0 } else { TABLE }) as u64
    }

    /// What makes addresses in windows of guest addresses.
    #[inline]
    pub(crate) fn distance(&self) -> u64 {
        self.windows.distance()
    }

    /// The guest address that `host` is in a window for.
    pub(crate) fn guest_address(&self, host: u64) -> Option<u64> {
        self.windows.guest_address(host)
    }

    /// Whether address space `number` is served.
    #[inline]
    pub(crate) fn serves(&self, number: u64) -> bool {
        !self.paused && self.owner == Some(number)
    }

    /// Whether `number` could be served at time `now`: whoever takes turns with others would lose
    /// it at each.
    pub(crate) fn could_serve(&self, number: u64, now: u64) -> bool {
        self.owner.is_none_or(|owner| owner == number) || now.wrapping_sub(self.left) >= ADVANCE
    }

    /// Code in address space `number` would like to find `addr` here. Says whether it will.
    pub(crate) fn wanted(&mut self, number: u64, addr: u64, now: u64) -> bool {
        let span = addr >> SPAN_SHIFT;
        if span >= SPANS || self.tables.is_none() || !self.could_serve(number, now) {
            return false;
        }
        let changes = self.owner != Some(number);
        if changes {
            self.hide_all();
            self.owner = Some(number);
            self.paused = false;
            self.budget.since = now;
            self.budget.spent = 0;
            self.counters.owners = self.counters.owners.wrapping_add(1);
        }
        if self.paused {
            self.paused = !self.budget.has_room(now);
        }
        // A new owner can do without the last one's windows, but they may well be right.
        !self.paused && self.open(span, !changes, now)
    }

    /// The address space `number` is left for another.
    #[inline]
    pub(crate) fn leaves(&mut self, number: u64) {
        if self.owner == Some(number) {
            self.left = host_tsc();
        }
    }

    /// Time has gone into it since `since`.
    pub(crate) fn spent(&mut self, since: u64) {
        let now = host_tsc();
        self.budget.spend(now.wrapping_sub(since));
        self.paused = !self.budget.has_room(now);
    }

    /// Whether `span` has a window, now at the latest, unless there was no room for one lately: it
    /// takes some milliseconds to find that out.
    fn open(&mut self, span: u64, keeping: bool, now: u64) -> bool {
        if self.windows.has(span) {
            return true;
        }
        if self.crowded.is_some_and(|since| now.wrapping_sub(since) < CROWDED) {
            return false;
        }
        let opened = self.add_window(span, keeping);
        self.crowded = (!opened).then_some(now);
        opened
    }

    /// Whether `span` has a window now, which it had not. If it has no room beside those there are,
    /// all are moved, with `keeping`, or given up for it.
    fn add_window(&mut self, span: u64, keeping: bool) -> bool {
        if self.windows.len() >= MOST_WINDOWS {
            self.close_windows();
        }
        if self.windows.len() != 0 && self.windows.add(span) {
            self.tell(span, 1);
            return true;
        }
        let kept = self.windows.spans().filter(|_| keeping);
        let spans: Vec<u64> = kept.chain([span]).collect();
        let Some(windows) = Windows::of(&spans) else { return false };
        self.close_windows();
        self.windows = windows;
        for span in spans {
            self.tell(span, 1);
        }
        true
    }

    /// Translated code is to find `shown` for `span`.
    fn tell(&self, span: u64, shown: u8) {
        if let Some(tables) = &self.tables
            && span < SPANS
        {
            // SAFETY: the first page of the tables is writable, and the byte is in it. No Rust
            // reference is made to any of it.
            unsafe { tables.start().add(span as usize).write_volatile(shown) };
        }
    }

    /// Gives all windows up. Code that runs must be left before it goes there again: it would
    /// find nothing, at a distance that is no more.
    fn close_windows(&mut self) {
        for span in self.windows.spans() {
            self.tell(span, 0);
        }
        for window in self.windows.give_up() {
            window.clear();
            self.retired.push(window);
        }
        self.forget_pages();
    }

    /// Whether windows were given up since translated code was entered.
    pub(crate) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// No translated code runs: nobody has ways into windows that were given up.
    pub(crate) fn settle(&mut self) {
        self.retired.clear();
    }

    fn forget_pages(&mut self) {
        CHANGES.fetch_sub(std::mem::take(&mut self.changes), Relaxed);
        self.pages.clear();
        self.stored.clear();
    }

    fn count_change(&mut self) {
        self.changes = self.changes.saturating_add(1);
        CHANGES.fetch_add(1, Relaxed);
    }

    /// Shows the `count` pages of `ram` from `first` on, which follow one another there too.
    /// Says whether they can be accessed now.
    pub(crate) fn show(&mut self, ram: &SharedRam, first: Page, count: u64) -> bool {
        let addr = first.addr & !PAGE_OFFSET;
        let span = addr >> SPAN_SHIFT;
        let last = addr.wrapping_add(count.saturating_sub(1) << PAGE_SHIFT);
        if count == 0 || !self.windows.has(span) || last >> SPAN_SHIFT != span {
            return false;
        }
        if CHANGES.load(Relaxed) >= MOST_CHANGES {
            self.hide_all();
        }
        let at = addr.wrapping_add(self.windows.distance());
        let len = (count << PAGE_SHIFT) as usize;
        let Some(offset) = u64::from(first.frame.0).checked_mul(PAGE_SIZE) else { return false };
        // SAFETY: whole pages within a window, which holds nothing but such mappings, with what
        // is RAM. Translated code that gets at them sees the guest's own bytes.
        let mapped = unsafe { map(at, len, first.writable, ram, offset) };
        if !mapped {
            return false;
        }
        self.count_change();
        for n in 0..count {
            let frame = RamFrame(first.frame.0.wrapping_add(n as u32));
            let shown = Shown { frame, writable: first.writable };
            if shown.writable {
                self.stored.add(frame);
            }
            self.pages.insert(addr.wrapping_add(n << PAGE_SHIFT), shown);
        }
        self.counters.shown = self.counters.shown.wrapping_add(count);
        true
    }

    /// Forgets all, and serves nobody.
    pub(crate) fn forget(&mut self) {
        self.owner = None;
        // What is in the windows goes when the next one comes.
    }

    /// Takes everything out of the windows.
    fn hide_all(&mut self) {
        if !self.pages.is_empty() {
            if self.windows.clear() {
                self.forget_pages();
            } else {
                self.close_windows();
            }
        }
    }

    /// Forgets what maps the addresses around `addr` that have all but the lowest `bits` bits
    /// in common with it.
    pub(crate) fn invalidate(&mut self, addr: u64, bits: u32) {
        if self.owner.is_none() || self.pages.is_empty() {
            return;
        }
        let since = host_tsc();
        if bits > PAGE_SHIFT {
            self.take_out(|page, _| (page ^ addr) >> bits == 0);
        } else if self.pages.remove(&(addr & !PAGE_OFFSET)).is_some() {
            self.hide(&mut [addr & !PAGE_OFFSET]);
        }
        self.spent(since);
    }

    /// Takes away the permission to store to `frame`.
    pub(crate) fn drop_writes_to(&mut self, frame: RamFrame) {
        if self.owner.is_some() && self.stored.may_have(frame) {
            self.take_out(|_, shown| shown.writable && shown.frame == frame);
        }
    }

    /// Takes away the permission to store to what `is_marked`, of which there were `epoch`.
    pub(crate) fn drop_writes(&mut self, epoch: u64, is_marked: impl Fn(RamFrame) -> bool) {
        if std::mem::replace(&mut self.epoch, epoch) != epoch && self.owner.is_some() {
            self.take_out(|_, shown| shown.writable && is_marked(shown.frame));
        }
    }

    /// Takes the pages that `which` says out of the windows: whoever wants one again asks.
    fn take_out(&mut self, which: impl Fn(u64, &Shown) -> bool) {
        let mut gone: Vec<u64> = Vec::new();
        self.pages.retain(|page, shown| {
            let goes = which(*page, shown);
            if goes {
                gone.push(*page);
            }
            !goes
        });
        self.hide(&mut gone);
    }

    /// Takes `pages` out of the windows.
    fn hide(&mut self, pages: &mut [u64]) {
        pages.sort_unstable();
        for run in pages.chunk_by(|a, b| a.wrapping_add(PAGE_SIZE) == *b) {
            let Some(first) = run.first() else { continue };
            let at = first.wrapping_add(self.windows.distance()) as *mut u8;
            self.count_change();
            // SAFETY: pages within a window, which nobody has a reference to.
            let hidden = unsafe { reserve(at, run.len() << PAGE_SHIFT) };
            if !hidden {
                // What the guest has unmapped must not be seen any more, whatever the host is
                // short of.
                self.close_windows();
                return;
            }
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.forget_pages();
    }
}
