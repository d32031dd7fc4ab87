//! Host addresses that translated code keeps in the vCPU, and what is known of them where
//! roads through the code meet.

use foldhash::{HashMap, HashSet};
use iced_x86::Register as R;

use super::known::{Known, Shown, Sum, Term};
use crate::translate::fields;

/// A host address that may be accessed from the first to the last distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pointer {
    pub(super) first: i64,
    pub(super) last: i64,
    pub(super) stores: bool,
}

impl Pointer {
    /// What both allow.
    fn and(self, other: Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Self { first, last, stores: self.stores && other.stores })
    }

    /// The same for an address `distance` further on.
    pub(super) fn moved(self, distance: i64) -> Option<Self> {
        let first = self.first.checked_sub(distance)?;
        Some(Self { first, last: self.last.checked_sub(distance)?, ..self })
    }
}

/// What makes host addresses of sums of a register or two and some distances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addend {
    terms: [Option<Term>; 2],
    first: i64,
    last: i64,
    stores: bool,
}

impl Addend {
    /// What `shown` is of, if that is so simple.
    fn of(shown: &Shown) -> Option<Self> {
        let mut terms = shown.first.terms.iter().copied();
        let two = [terms.next(), terms.next()];
        let simple = terms.next().is_none()
            && shown.first.terms == shown.last.terms
            && !shown.first.is_narrow();
        let (first, last) = (shown.first.offset, shown.last.offset);
        simple.then_some(Self { terms: two, first, last, stores: shown.stores })
    }

    fn shown(&self) -> Shown {
        let terms: Vec<Term> = self.terms.iter().flatten().copied().collect();
        let sum = |offset| Sum { terms: terms.clone(), offset };
        Shown { first: sum(self.first), last: sum(self.last), stores: self.stores, at: u64::MAX }
    }

    /// What both allow.
    fn and(self, other: Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        let stores = self.stores && other.stores;
        let some = self.terms == other.terms && first <= last;
        some.then_some(Self { first, last, stores, ..self })
    }
}

/// What may be kept, or in the scratch register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    Pointer(Pointer),
    Addend(Addend),
}

impl Kept {
    /// What `known` is, if it may be kept.
    pub(super) fn of(known: &Known) -> Option<Self> {
        match known {
            Known::Pointer(pointer) => Some(Self::Pointer(*pointer)),
            Known::Addend(shown) => Addend::of(shown).map(Self::Addend),
            _ => None,
        }
    }

    pub(super) fn known(self) -> Known {
        match self {
            Self::Pointer(pointer) => Known::Pointer(pointer),
            Self::Addend(addend) => Known::Addend(addend.shown()),
        }
    }

    fn and(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Addend(a), Self::Addend(b)) => a.and(b).map(Self::Addend),
            (Self::Pointer(a), Self::Pointer(b)) => a.and(b).map(Self::Pointer),
            _ => None,
        }
    }
}

/// All that are known at one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pointers {
    kept: [Option<Kept>; 16],
    /// The one in the scratch register.
    pub(super) here: Option<Kept>,
}

impl Pointers {
    /// Which of them the field `at` is for.
    pub(super) fn place(at: u64) -> Option<usize> {
        (0..16).find(|number| u64::from(fields::shared(*number).0) == at).map(usize::from)
    }

    pub(super) fn kept(&self, at: u64) -> Option<Kept> {
        Self::place(at).and_then(|place| self.kept.get(place).copied().flatten())
    }

    pub(super) fn keep(&mut self, at: u64, what: Kept) {
        if let Some(kept) = Self::place(at).and_then(|place| self.kept.get_mut(place)) {
            *kept = Some(what);
        }
    }

    /// `register` changes by `distance`; `None`: by no constant.
    pub(super) fn changes(&mut self, register: R, distance: Option<i64>) {
        for kept in &mut self.kept {
            if let Some(Kept::Addend(addend)) = kept {
                let mut shown = addend.shown();
                let holds = shown.changes(register, distance);
                *kept = holds.then(|| Addend::of(&shown).map(Kept::Addend)).flatten();
            }
        }
    }

    /// Whether there is something that registers count for.
    pub(super) fn have_addends(&self) -> bool {
        self.kept.iter().any(|kept| matches!(kept, Some(Kept::Addend(_))))
    }

    /// All registers change.
    pub(super) fn without_addends(mut self) -> Self {
        for kept in &mut self.kept {
            kept.take_if(|kept| matches!(kept, Kept::Addend(_)));
        }
        self
    }

    /// A field of the vCPU changes: what is made of it does not hold.
    pub(super) fn field_changes(&mut self, part: &Term) {
        for kept in &mut self.kept {
            kept.take_if(|kept| matches!(kept, Kept::Addend(addend) if addend.shown().has(part)));
        }
    }

    /// What both know.
    fn and(self, other: Self) -> Self {
        let same = |a: Option<Kept>, b: Option<Kept>| a?.and(b?);
        let mut both = Self { here: same(self.here, other.here), ..Self::default() };
        for ((both, a), b) in both.kept.iter_mut().zip(self.kept).zip(other.kept) {
            *both = same(a, b);
        }
        both
    }
}

/// Looks at all of the code after which a place that jumps lead back to is given up.
const MANY_TIMES: u32 = 8;

/// What is known where jumps lead.
#[derive(Debug, Default)]
pub(super) struct Roads {
    /// By the jumps seen so far this time.
    seen: HashMap<u64, Pointers>,
    /// No more than what jumps backwards were found to know.
    most: HashMap<u64, Pointers>,
    /// Places that somebody has come to this time.
    reached: HashSet<u64>,
    /// How often that became less.
    times: HashMap<u64, u32>,
    changed: bool,
}

impl Roads {
    /// The code is looked at from its beginning.
    pub(super) fn begin(&mut self) {
        self.seen.clear();
        self.reached.clear();
        self.changed = false;
    }

    /// What is known at `ip`, where `here` is if it is come to without a jump too. `None`: nobody
    /// comes there, as far as is known.
    pub(super) fn arrive(&mut self, ip: u64, here: Option<Pointers>) -> Option<Pointers> {
        let roads = [here, self.seen.get(&ip).copied(), self.most.get(&ip).copied()];
        let known = roads.into_iter().flatten().reduce(Pointers::and)?;
        self.seen.insert(ip, known);
        self.reached.insert(ip);
        Some(known)
    }

    /// A jump from `ip` to `target` is made with this.
    pub(super) fn leave(&mut self, ip: u64, target: u64, known: &Pointers) {
        let taken = self.seen.entry(target).or_insert(*known);
        let both = taken.and(*known);
        if target <= ip && (both != *taken || !self.reached.contains(&target)) {
            let times = self.times.entry(target).or_default();
            *times = times.saturating_add(1);
            // What would become less at each turn of a loop is nothing.
            let most = if *times <= MANY_TIMES { both } else { Pointers::default() };
            self.most.insert(target, most);
            self.changed = true;
        }
        *taken = both;
    }

    /// Whether nothing was taken to be known that was not.
    pub(super) fn hold(&self) -> bool {
        !self.changed
    }
}
