//! RAM that may be stored to without being changed.
//!
//! A [`PhysMemory`](super::PhysMemory) laid over another shows its pages, and a copy of its
//! own for each that is stored to. Where a page has changed meanwhile, the overlay can show
//! what it was before: it is told by [`Copies`] that somebody else keeps. This is how the
//! interpreter runs what the translator has run already ([`crate::lockstep`]).

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use super::copies::Copies;
use super::ram::RamFrame;
use crate::sync::lock;

/// Pages as they were.
pub(crate) type Before = Arc<Mutex<Copies>>;

/// What is on top.
#[derive(Debug)]
pub(super) struct Overlay {
    /// The pages that have changed below, as they were. They are not changed here.
    before: Before,
    /// This overlay's own.
    own: Mutex<Own>,
    /// Whatever is looked at stands still from then on: it is put into `before`, for others
    /// to see the same.
    frozen: bool,
}

/// Pages of its own, and which of them have been stored to.
#[derive(Debug, Default)]
struct Own {
    pages: Copies,
    stored: HashSet<RamFrame>,
}

impl Overlay {
    pub(super) fn new(before: Before, frozen: bool) -> Self {
        Self { before, own: Mutex::default(), frozen }
    }

    /// Where `frame`, which is at `host` below, is to be read, and whether it may be stored
    /// to there too.
    ///
    /// # Safety
    /// `host` is a mapped page of guest RAM.
    pub(super) unsafe fn page(
        &self,
        host: *mut u8,
        frame: RamFrame,
        stores: bool,
    ) -> (*mut u8, bool) {
        let mut own = lock(&self.own);
        if stores {
            own.stored.insert(frame);
        }
        let storable = own.stored.contains(&frame);
        if let Some(page) = own.pages.get(frame) {
            return (page, storable);
        }
        let mut before = lock(&self.before);
        if self.frozen {
            // SAFETY: says the caller.
            unsafe { before.keep(frame, host) };
        }
        let from = match before.get(frame) {
            Some(was) => was,
            None if stores => host,
            None => return (host, false),
        };
        // Even for a load: who loads first and stores then must not keep the other address.
        // SAFETY: a copy is a page, and `host` is, says the caller.
        (unsafe { own.pages.keep(frame, from) }, storable)
    }

    /// Where the page walker may set bits in `frame`: nowhere, unless there is a copy. Who
    /// ran before may have had a translation that needed no walk, and set none.
    ///
    /// # Safety
    /// As [`Overlay::page`].
    pub(super) unsafe fn page_to_mark(&self, host: *mut u8, frame: RamFrame) -> Option<*mut u8> {
        // SAFETY: says the caller.
        let (page, _) = unsafe { self.page(host, frame, false) };
        (page != host).then_some(page)
    }

    /// What `frame` is here, without a copy being made.
    pub(super) fn shown(&self, frame: RamFrame) -> Option<*const u8> {
        let own = lock(&self.own).pages.get(frame);
        own.or_else(|| lock(&self.before).get(frame)).map(<*mut u8>::cast_const)
    }

    /// The frames that have been stored to here.
    pub(super) fn stored(&self) -> Vec<RamFrame> {
        lock(&self.own).stored.iter().copied().collect()
    }

    /// Forgets this overlay's own pages.
    pub(super) fn clear(&self) {
        let mut own = lock(&self.own);
        own.pages.clear();
        own.stored.clear();
    }
}
