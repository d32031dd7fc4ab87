//! What is found out about translations as they run, and is to be minded when their code is
//! translated the next time: that it is hot, or that accesses which share a check lie in two
//! pages. Calls back from translated code come here; a translation that could be better is
//! retired, and made anew when its code is wanted again.

use std::collections::hash_map::Entry;

use super::frames::Code;
use super::manner::{Apartness, Manner};
use super::mode::Mode;
use super::regions::Filling;
use super::route::Extent;
use super::splits::{SplitAt, Splits};
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
    /// They are not in the mirror either, where ends of pages would not matter.
    unmirrored: bool,
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

    /// How far its route goes.
    pub(super) fn extent(&self) -> Extent {
        match (self.hot, self.separate) {
            (true, _) => Extent::Hot,
            (false, true) => Extent::Rest,
            (false, false) => Extent::Usual,
        }
    }

    /// How what is wished for is translated; accesses could look into the `mirror`.
    pub(super) fn manner(self, mirror: bool) -> Manner {
        let (hot, mirrored) = (self.hot, mirror && self.hot);
        if mirrored && !self.unmirrored {
            return Manner { shares: true, hot, mirrored, apart: Apartness::default() };
        }
        Manner { shares: !self.separate, hot, mirrored, apart: self.apart }
    }
}

/// What came of a trace that was left because what it checks at once lies in two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// It is noted.
    Noted,
    /// It is noted, of a trace that looks into the mirror, where pages have no ends.
    Mirrored,
    /// It happens too often: the trace was closed.
    Closed,
}

/// More are not kept.
const MOST_WISHES: usize = 1 << 16;

impl Translations {
    /// How the code at `rip`, which is in `frame`, is to be translated.
    pub(super) fn wish(&self, frame: RamFrame, rip: u64, mode: Mode) -> Wish {
        self.wishes.get(&(frame, rip, mode)).copied().unwrap_or_default()
    }

    /// A trace in a frame and a mode, whose hot code looks into the mirror or not, was left at time
    /// `now`. Where that happens again and again it is made anew.
    fn split(&mut self, of: (RamFrame, Mode), at: SplitAt, mirrors: bool, now: u64) -> Split {
        let SplitAt { rip, next, begins } = at;
        self.forget_wishes();
        let mut first = false;
        let splits = self.splits.entry((rip, next)).or_insert_with(|| {
            first = true;
            Splits::new(now)
        });
        let often = splits.note(begins, now);
        if first {
            self.wish_for((of.0, next, of.1)).separate = true;
        }
        let mirrored = mirrors && self.wish(of.0, rip, of.1).hot;
        if !often {
            return if mirrored { Split::Mirrored } else { Split::Noted };
        }
        self.splits.remove(&(rip, next));
        let closed = self.remake(of, rip, |wish| {
            wish.separate |= !wish.apart.note(next);
            wish.unmirrored |= mirrored;
        });
        if closed { Split::Closed } else { Split::Noted }
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
    /// A trace in a frame and a mode, whose hot code looks into the mirror or not, was left at time
    /// `now` because what it checks at once cannot be. Says whether it has looked there.
    pub(super) fn split(
        &mut self,
        of: (RamFrame, Mode),
        at: SplitAt,
        mirrors: bool,
        now: u64,
    ) -> bool {
        self.maker.counters.split = self.maker.counters.split.wrapping_add(1);
        let split = self.code.lock().split(of, at, mirrors, now);
        if split == Split::Closed {
            self.code.note_closed();
        }
        split == Split::Mirrored
    }

    /// The trace at `rip`, in a frame and a mode, was left for `next`, because it is hot.
    pub(super) fn heated(&mut self, of: (RamFrame, Mode), rip: u64, next: u64) {
        self.maker.counters.hot = self.maker.counters.hot.wrapping_add(1);
        if self.code.lock().heated(of, rip, next) {
            self.code.note_closed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_pages_do_not_matter_to_what_the_mirror_has() {
        let mut wish = Wish::default();
        assert!(wish.apart.note(0x1234));
        let pages = |wish: Wish, mirror| wish.manner(mirror).apart.has(0x1234);
        assert!(pages(wish, false) && pages(wish, true));
        wish.heat();
        assert!(pages(wish, false) && !pages(wish, true));
        wish.separate = true;
        assert!(!wish.manner(false).shares && wish.manner(true).shares);
        wish.unmirrored = true;
        assert!(pages(wish, true) && !wish.manner(true).shares);
    }
}
