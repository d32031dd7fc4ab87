//! What is found out about translations as they run, and is to be minded when their code is
//! translated the next time: that it is hot, or that accesses which share a check lie in two
//! pages. Calls back from translated code come here; a translation that could be better is
//! retired, and made anew when its code is wanted again.

use std::collections::hash_map::Entry;

use super::frames::Code;
use super::manner::{Apartness, Manner};
use super::mode::Mode;
use super::regions::Filling;
use super::translations::Translations;
use super::translator::Translator;
use crate::memory::ram::RamFrame;

/// How some code is to be translated, if not as any other.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wish {
    /// Each access is to be checked for itself.
    pub(super) separate: bool,
    /// It is hot: it is worth the best there is.
    pub(super) hot: bool,
    /// These accesses are to share no checks.
    apart: Apartness,
    /// What it was before, by its number and the filling that has it, if nothing has taken its
    /// place yet.
    pub(super) former: Option<(u32, Filling)>,
}

/// What a wish is for: the code at a RIP, by its frame too, in a mode.
pub(super) type Wanted = (RamFrame, u64, Mode);

impl Wish {
    /// It is found to be hot. If it came behind a split, which of its accesses lie in two pages
    /// is worth finding out.
    fn heat(&mut self) {
        self.separate &= self.hot;
        self.hot = true;
    }

    /// Whether there is time to make it elsewhere: it is neither hot nor to take another's place.
    pub(super) fn can_wait(&self) -> bool {
        !self.hot && self.former.is_none()
    }

    /// How what is wished for is translated; accesses could look into the `mirror`.
    pub(super) fn manner(self, mirror: bool) -> Manner {
        let (shares, hot, apart) = (!self.separate, self.hot, self.apart);
        Manner { shares, hot, mirrored: mirror && hot, apart }
    }
}

/// How often lately a trace was left because what it checks at once lies in two pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Splits {
    since: u64,
    times: u32,
}

/// So often within [`SPLIT_WINDOW`], and a trace is better off with a check for each access.
const MANY_SPLITS: u32 = 64;
/// More are not kept.
const MOST_WISHES: usize = 1 << 16;
/// Ticks of the TSC: a millisecond or so.
const SPLIT_WINDOW: u64 = 1 << 22;

impl Translations {
    /// How the code at `rip`, which is in `frame`, is to be translated.
    pub(super) fn wish(&self, frame: RamFrame, rip: u64, mode: Mode) -> Wish {
        self.wishes.get(&(frame, rip, mode)).copied().unwrap_or_default()
    }

    /// The trace at `rip`, in a frame and a mode, was left at time `now` because what it checks at
    /// once lies in two pages, or is not all of one kind. Where that happens again and again it is
    /// made anew. The guest goes on at `next`, where the rest of that is likely still before it.
    /// Says whether the old one was closed.
    fn split(&mut self, of: (RamFrame, Mode), rip: u64, next: u64, now: u64) -> bool {
        self.forget_wishes();
        self.wish_for((of.0, next, of.1)).separate = true;
        let splits = self.splits.entry(rip).or_insert(Splits { since: now, times: 0 });
        if now.wrapping_sub(splits.since) > SPLIT_WINDOW {
            *splits = Splits { since: now, times: 0 };
        }
        splits.times = splits.times.saturating_add(1);
        if splits.times < MANY_SPLITS {
            return false;
        }
        self.splits.remove(&rip);
        self.remake(of, rip, |wish| wish.separate |= !wish.apart.note(next))
    }

    /// The trace at `rip`, in a frame and a mode, is hot, and was left at `next`, a head of a
    /// loop or itself. Says whether the old one was closed.
    fn heated(&mut self, of: (RamFrame, Mode), rip: u64, next: u64) -> bool {
        self.forget_wishes();
        self.wish_for((of.0, next, of.1)).heat();
        self.remake(of, rip, Wish::heat)
    }

    /// The wish for some code, which goes with what is translated now.
    fn wish_for(&mut self, wanted: Wanted) -> &mut Wish {
        let wish = self.wishes.entry(wanted);
        if let Entry::Vacant(_) = &wish
            && let Some(region) = self.regions.current()
        {
            region.wishes.push(wanted);
        }
        wish.or_default()
    }

    /// Makes room for wishes: a guest can have as many as it has code.
    fn forget_wishes(&mut self) {
        if self.wishes.len().max(self.splits.len()) >= MOST_WISHES {
            self.wishes.clear();
            self.regions.forget_wishes();
            self.splits.clear();
        }
    }

    /// The code at `rip`, in a frame and a mode, is to be translated anew, as `wanted`. Says whether
    /// there was a translation, which is closed.
    fn remake(
        &mut self,
        (frame, mode): (RamFrame, Mode),
        rip: u64,
        wanted: impl FnOnce(&mut Wish),
    ) -> bool {
        let wish = self.wish_for((frame, rip, mode));
        wanted(wish);
        if let Some(number) = self.frames.newest(frame, Code::at(rip, mode))
            && let Some(filling) = self.regions.filling_of(number)
            && let Some(placed) = self.regions.block(number)
            && placed.rip == rip
            && !placed.stale
        {
            self.wish_for((frame, rip, mode)).former = Some((number, filling));
            self.close(number);
            return true;
        }
        false
    }
}

impl Translator {
    /// The trace at `rip`, in a frame and a mode, was left at time `now` for `next`, because what it
    /// checks at once cannot be.
    pub(super) fn split(&mut self, of: (RamFrame, Mode), rip: u64, next: u64, now: u64) {
        self.maker.counters.split = self.maker.counters.split.wrapping_add(1);
        if self.code.lock().split(of, rip, next, now) {
            self.code.note_closed();
        }
    }

    /// The trace at `rip`, in a frame and a mode, was left for `next`, because it is hot.
    pub(super) fn heated(&mut self, of: (RamFrame, Mode), rip: u64, next: u64) {
        self.maker.counters.hot = self.maker.counters.hot.wrapping_add(1);
        if self.code.lock().heated(of, rip, next) {
            self.code.note_closed();
        }
    }
}
