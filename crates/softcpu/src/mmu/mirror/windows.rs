//! Windows: address space of the host's, of which each has a span of the guest's, all of them as
//! far from there.

use super::reserved::Reserved;
use super::{GUARD, SPAN, SPAN_SHIFT};

/// Distances that are tried between the guest's addresses and the windows. The first ones are
/// for hosts with five levels of page tables, where everything fits.
const FAR: u64 = 1 << 47;
const NEAR: u64 = 3 << SPAN_SHIFT;
const TRIES: u64 = 40;

/// A span's number, and what is reserved for it.
#[derive(Debug)]
struct Window {
    span: u64,
    reserved: Reserved,
}

/// See the module's words.
#[derive(Debug, Default)]
pub(super) struct Windows {
    all: Vec<Window>,
    /// Host addresses less guest addresses.
    distance: u64,
}

impl Windows {
    /// Those of all `spans`, at a distance where there is room.
    pub(super) fn of(spans: &[u64]) -> Option<Self> {
        let far = (1..=TRIES).map(|n| n.wrapping_mul(FAR));
        let near = (1..=TRIES).flat_map(|n| {
            let distance = n.wrapping_mul(NEAR);
            [distance.wrapping_neg(), distance]
        });
        far.chain(near).find_map(|distance| {
            let mut windows = Self { all: Vec::with_capacity(spans.len()), distance };
            spans.iter().all(|span| windows.add(*span)).then_some(windows)
        })
    }

    /// One more, of `span`, if there is room at this distance.
    pub(super) fn add(&mut self, span: u64) -> bool {
        let start = (span << SPAN_SHIFT).wrapping_add(self.distance);
        let end = start.wrapping_add(SPAN);
        // What it has in common with the window beside it is that one's already: an access that
        // reaches from one into the other is as good as the guest's own.
        let from = if self.has(span.wrapping_sub(1)) {
            start.wrapping_add(GUARD)
        } else {
            start.wrapping_sub(GUARD)
        };
        let to = if self.has(span.wrapping_add(1)) {
            end.wrapping_sub(GUARD)
        } else {
            end.wrapping_add(GUARD)
        };
        let reserved = Reserved::at(from, to.wrapping_sub(from) as usize);
        let fits = reserved.is_some();
        self.all.extend(reserved.map(|reserved| Window { span, reserved }));
        fits
    }

    pub(super) fn distance(&self) -> u64 {
        self.distance
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn spans(&self) -> impl Iterator<Item = u64> {
        self.all.iter().map(|window| window.span)
    }

    /// Whether `span` has one.
    pub(super) fn has(&self, span: u64) -> bool {
        self.spans().any(|known| known == span)
    }

    /// The guest address that `host` is in a window for.
    pub(super) fn guest_address(&self, host: u64) -> Option<u64> {
        let addr = host.wrapping_sub(self.distance);
        // An access that begins in a window may reach beyond its end.
        let within = |span: u64| addr.wrapping_sub(span << SPAN_SHIFT) < SPAN.wrapping_add(GUARD);
        self.spans().any(within).then_some(addr)
    }

    /// Takes everything out of them. Says whether the host did.
    pub(super) fn clear(&self) -> bool {
        self.all.iter().all(|window| window.reserved.clear())
    }

    /// Gives them up: what was reserved.
    pub(super) fn give_up(&mut self) -> impl Iterator<Item = Reserved> {
        self.all.drain(..).map(|window| window.reserved)
    }
}
