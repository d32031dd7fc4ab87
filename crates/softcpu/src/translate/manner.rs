//! How a trace is translated: what is known of it from before, or from where the time goes.

use crate::addr::PAGE_OFFSET;

/// How a trace is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Manner {
    /// Accesses may share checks.
    pub(super) shares: bool,
    /// It is known to be hot: it need not find out.
    pub(super) hot: bool,
    /// Accesses look into the mirror first ([`super::mirrored`]).
    pub(super) mirrored: bool,
    /// Accesses from where these make theirs are to be checked each for itself.
    pub(super) apart: Apartness,
}

/// Accesses of a page of code, by where in it the next instruction is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Apartness([Option<u16>; 4]);

impl Apartness {
    /// Notes the access before `next`, if there is room.
    pub(super) fn note(&mut self, next: u64) -> bool {
        let free = self.0.iter_mut().find(|at| at.is_none());
        free.map(|free| *free = Some((next & PAGE_OFFSET) as u16)).is_some()
    }

    pub(super) fn has(&self, next: u64) -> bool {
        self.0.contains(&Some((next & PAGE_OFFSET) as u16))
    }
}
