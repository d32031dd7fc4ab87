//! Before RAM is filled: large pages, made before there is anything in them.
//!
//! Where the host makes a large page of small ones it copies them, and has had a fault for each.
//! So it is asked for large pages first. What it does for one is to clear it, which takes as long
//! as unpacking a kernel into it does, and on a cloud's machine, which gets its own memory the
//! same way, many times that: a second thread does its part. Called by the loader.

use std::ops::Range;
use std::thread;

use softcpu::memory::shared::LARGE;
use softcpu::{GuestPhysAddr, PhysMemory};

use super::GuestRam;

/// An address in each stretch of `range` that can be a large page.
fn stretches(range: &Range<u64>) -> impl DoubleEndedIterator<Item = GuestPhysAddr> + use<> {
    let large = LARGE as u64;
    let first = range.start >> large.ilog2();
    let behind = if range.is_empty() { first } else { range.end.div_ceil(large) };
    (first..behind).map(move |number| GuestPhysAddr(number.saturating_mul(large)))
}

impl GuestRam {
    /// The memory for who prepares it, if there is anything to prepare.
    fn to_prepare(&self) -> Option<PhysMemory> {
        self.shared.as_ref()?;
        self.phys_memory().ok()
    }

    /// `range` is about to be filled, by the caller.
    pub(crate) fn about_to_fill(&self, range: &Range<u64>) {
        if let Some(memory) = self.to_prepare() {
            stretches(range).for_each(|at| memory.about_to_fill(at));
        }
    }

    /// Has `fill` fill `ranges` from the first one on, while the last is prepared already.
    pub(crate) fn filled_by<R>(&self, ranges: &[Range<u64>], fill: impl FnOnce() -> R) -> R {
        let Some(memory) = self.to_prepare() else { return fill() };
        thread::scope(|scope| {
            let from_the_end = ranges.iter().flat_map(stretches).rev();
            let prepare = || from_the_end.for_each(|at| memory.about_to_fill(at));
            // A host that has no thread for it has `fill` do all of it.
            let _ = thread::Builder::new().name("loader".to_owned()).spawn_scoped(scope, prepare);
            fill()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stretch_of_a_range_is_found_once() {
        let numbers = |range| stretches(&range).map(|at| at.0 >> 21).collect::<Vec<_>>();
        assert_eq!(numbers(0..1), [0]);
        assert_eq!(numbers(0x1f_ffff..0x20_0001), [0, 1]);
        assert_eq!(numbers(0x20_0000..0x60_0000), [1, 2]);
        assert!(numbers(0x30_0000..0x30_0000).is_empty());
        assert_eq!(numbers(u64::MAX - 1..u64::MAX), [u64::MAX >> 21]);
    }
}
