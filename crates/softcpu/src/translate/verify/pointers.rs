//! Host addresses that translated code keeps in the vCPU, and what is known of them where
//! roads through the code meet.

use std::collections::HashMap;

use crate::translate::fields;

/// A host address that may be accessed from the first to the last distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pointer {
    pub(super) first: i64,
    pub(super) last: i64,
    pub(super) stores: bool,
}

impl Pointer {
    /// The same for an address `distance` further on.
    pub(super) fn moved(self, distance: i64) -> Option<Self> {
        let first = self.first.checked_sub(distance)?;
        Some(Self { first, last: self.last.checked_sub(distance)?, ..self })
    }
}

/// All that are known at one place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pointers {
    kept: [Option<Pointer>; 16],
    /// The one in the scratch register.
    pub(super) here: Option<Pointer>,
}

impl Pointers {
    /// Which of them the field `at` is for.
    pub(super) fn place(at: u64) -> Option<usize> {
        (0..16).find(|number| u64::from(fields::shared(*number).0) == at).map(usize::from)
    }

    pub(super) fn kept(&self, at: u64) -> Option<Pointer> {
        Self::place(at).and_then(|place| self.kept.get(place).copied().flatten())
    }

    pub(super) fn keep(&mut self, at: u64, pointer: Pointer) {
        if let Some(kept) = Self::place(at).and_then(|place| self.kept.get_mut(place)) {
            *kept = Some(pointer);
        }
    }

    /// What both know.
    fn and(self, other: Self) -> Self {
        let same = |a: Option<Pointer>, b: Option<Pointer>| a.filter(|a| b == Some(*a));
        let mut both = Self { here: same(self.here, other.here), ..Self::default() };
        for ((both, a), b) in both.kept.iter_mut().zip(self.kept).zip(other.kept) {
            *both = same(a, b);
        }
        both
    }
}

/// What is known where jumps lead.
#[derive(Debug, Default)]
pub(super) struct Roads {
    /// By the jumps seen so far this time.
    seen: HashMap<u64, Pointers>,
    /// No more than what jumps backwards were found to know.
    most: HashMap<u64, Pointers>,
    changed: bool,
}

impl Roads {
    /// The code is looked at from its beginning.
    pub(super) fn begin(&mut self) {
        self.seen.clear();
        self.changed = false;
    }

    /// What is known at `ip`, where `here` is if it is come to without a jump too.
    pub(super) fn arrive(&mut self, ip: u64, here: Option<Pointers>) -> Pointers {
        let roads = [here, self.seen.get(&ip).copied(), self.most.get(&ip).copied()];
        let known = roads.into_iter().flatten().reduce(Pointers::and).unwrap_or_default();
        self.seen.insert(ip, known);
        known
    }

    /// A jump from `ip` to `target` is made with this.
    pub(super) fn leave(&mut self, ip: u64, target: u64, known: &Pointers) {
        let taken = self.seen.entry(target).or_insert(*known);
        let both = taken.and(*known);
        if target <= ip && both != *taken {
            self.most.insert(target, both);
            self.changed = true;
        }
        *taken = both;
    }

    /// Whether nothing was taken to be known that was not.
    pub(super) fn hold(&self) -> bool {
        !self.changed
    }
}
