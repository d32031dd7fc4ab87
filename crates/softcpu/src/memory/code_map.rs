//! Which RAM has been decoded as code, so that writes to it are noticed.
//!
//! Linux patches its own text all the time (alternatives, static keys, ftrace) and
//! reuses code pages for data and back. Every RAM frame has a bitmap of the 64-byte
//! lines from which a block was decoded, and a version. A store to a marked line
//! bumps the version; a block is only run while the version it was decoded under
//! still stands. Frames without marked lines cost nothing: their stores stay on the
//! TLB's fast path. Frames with some take the slow path on every store, but only
//! a hit on a marked line throws blocks away, so code and data on one page get along.
//!
//! The race that matters is between a vCPU that decodes and another that stores:
//! the decoder marks first, then reads the version, then the bytes, then looks
//! whether its mark survived; the writer stores first, then looks at the marks. In
//! sequentially consistent order one of them sees the other. A vCPU whose TLB still
//! lets it store to the frame unseen is told to drop that permission
//! ([`Event::CODE_PAGES`]), and until it has said so ([`CodeMap::settled`]) fresh
//! blocks are compared with memory before every run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::outside::Outside;
use super::ram::RamFrame;
use crate::handle::{Event, VcpuHandle};
pub use crate::observers::Observer;
use crate::observers::Observers;

/// log2 of the size of a line.
const LINE_SHIFT: u32 = 6;

/// How many of the frames that were hit last are known.
const LOG: usize = 1 << 14;

/// The marks and versions of all RAM frames.
#[derive(Debug)]
pub struct CodeMap {
    lines: Box<[AtomicU64]>,
    versions: Box<[AtomicU32]>,
    /// Counts first marks of frames.
    epoch: AtomicU64,
    /// Counts stores that hit code.
    hits: AtomicU64,
    /// The frames that were hit last: the lower half of the hit's number, and the frame.
    log: Box<[AtomicU64]>,
    /// Who has dropped its cached permissions to store, up to which epoch.
    observers: Observers,
    /// Stores of others than vCPUs.
    outside: Outside,
}

impl CodeMap {
    /// For that many RAM frames, none of them code yet.
    #[must_use]
    pub fn new(frames: usize) -> Self {
        Self {
            lines: zeroed_lines(frames),
            versions: zeroed_versions(frames),
            epoch: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            // No hit has the number that these have in their places.
            log: (1..=LOG as u64).map(|n| AtomicU64::new(n << 32)).collect(),
            observers: Observers::default(),
            outside: Outside::default(),
        }
    }

    /// How many RAM frames it covers.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.lines.len()
    }

    /// Enrols a vCPU. It counts as idle until [`CodeMap::enter`].
    pub fn enrol(&self, handle: VcpuHandle) -> Arc<Observer> {
        self.observers.enrol(handle)
    }

    /// `observer` is about to run guest code: `drop_writes` takes its cached write
    /// permissions away, as often as it takes to be up to date.
    pub fn enter(&self, observer: &Observer, mut drop_writes: impl FnMut()) {
        loop {
            let now = self.epoch.load(Ordering::SeqCst);
            observer.saw(now);
            drop_writes();
            if self.epoch.load(Ordering::SeqCst) == now {
                return;
            }
        }
    }

    /// `observer` runs no guest code until it enters again.
    pub fn leave(&self, observer: &Observer) {
        observer.rests();
    }

    /// Whether stores to `frame` must be looked at one by one.
    #[inline]
    #[must_use]
    pub fn is_marked(&self, frame: RamFrame) -> bool {
        self.lines.get(frame.0 as usize).is_some_and(|lines| lines.load(Ordering::SeqCst) != 0)
    }

    /// How many stores have hit code: when it stands still, no version has changed.
    #[inline]
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Acquire)
    }

    /// The frames that were hit since there were `since` hits, some more than once. `None` if that
    /// is not known: there were too many, or one is not in the log yet. Their versions have
    /// changed already.
    #[must_use]
    pub fn hit_since(&self, since: u64) -> Option<Vec<RamFrame>> {
        let now = self.hits();
        if now.wrapping_sub(since) > LOG as u64 {
            return None;
        }
        (since..now)
            .map(|number| {
                let noted = self.log.get(number as usize % LOG)?.load(Ordering::SeqCst);
                (noted >> 32 == number & u64::from(u32::MAX)).then_some(RamFrame(noted as u32))
            })
            .collect()
    }

    /// The frame's version.
    #[inline]
    #[must_use]
    pub fn version(&self, frame: RamFrame) -> u32 {
        self.versions.get(frame.0 as usize).map_or(0, |version| version.load(Ordering::Acquire))
    }

    /// Marks the bytes `offset..offset+len` of `frame` as code, runs `decode`, and does
    /// so again if a writer came in between. Returns what `decode` made, the version
    /// it stands under, and the epoch after which no other vCPU can write unseen.
    pub fn decode<T>(
        &self,
        me: &Observer,
        frame: RamFrame,
        range: std::ops::Range<u64>,
        mut decode: impl FnMut() -> T,
    ) -> (T, u32, u64) {
        let mask = line_mask(range.start, range.end.saturating_sub(range.start));
        let Some(lines) = self.lines.get(frame.0 as usize) else { return (decode(), 0, 0) };
        loop {
            let before = lines.fetch_or(mask, Ordering::SeqCst);
            if before == 0 {
                self.epoch.fetch_add(1, Ordering::SeqCst);
                self.observers.tell_others(me, Event::CODE_PAGES);
            }
            let epoch = self.epoch.load(Ordering::SeqCst);
            let version = self.version(frame);
            let made = decode();
            if lines.load(Ordering::SeqCst) & mask == mask && self.version(frame) == version {
                return (made, version, epoch);
            }
        }
    }

    /// Changes whenever a frame gets its first mark.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Whether every vCPU but `me` has dropped the write permissions it held when
    /// `epoch` was current.
    #[must_use]
    pub fn settled(&self, me: &Observer, epoch: u64) -> bool {
        self.observers.others_have_seen(me, epoch)
    }

    /// What others than vCPUs have stored.
    pub(crate) fn outside(&self) -> &Outside {
        &self.outside
    }

    /// `len` bytes at `offset` of `frame` have been stored. Says whether code was hit.
    #[inline]
    pub fn written(&self, frame: RamFrame, offset: u64, len: u64) -> bool {
        // The store must be visible before the marks are read: see the module's words.
        fence(Ordering::SeqCst);
        let Some(lines) = self.lines.get(frame.0 as usize) else { return false };
        let marked = lines.load(Ordering::SeqCst);
        if marked == 0 || marked & line_mask(offset, len) == 0 {
            return false;
        }
        lines.store(0, Ordering::SeqCst);
        if let Some(version) = self.versions.get(frame.0 as usize) {
            version.fetch_add(1, Ordering::SeqCst);
        }
        let number = self.hits.fetch_add(1, Ordering::SeqCst);
        if let Some(place) = self.log.get(number as usize % LOG) {
            place.store(number << 32 | u64::from(frame.0), Ordering::SeqCst);
        }
        self.observers.tell(Event::CODE_CHANGED);
        true
    }

    /// As [`CodeMap::written`], for what was stored by anybody else than a vCPU's guest code.
    pub fn written_from_outside(&self, frame: RamFrame, offset: u64, len: u64) -> bool {
        self.outside.stored(frame, offset, len);
        self.written(frame, offset, len)
    }
}

/// The lines that `len` bytes at `offset` of a frame touch.
fn line_mask(offset: u64, len: u64) -> u64 {
    let first = (offset >> LINE_SHIFT) & 63;
    let last = (offset.saturating_add(len.saturating_sub(1)) >> LINE_SHIFT).min(63);
    (u64::MAX << first) & (u64::MAX >> 63_u64.saturating_sub(last))
}

/// `n` zero atomics without touching them: the kernel's zero pages stand for frames
/// that never hold code.
fn zeroed_lines(n: usize) -> Box<[AtomicU64]> {
    let raw = Box::into_raw(vec![0_u64; n].into_boxed_slice());
    // SAFETY: AtomicU64 has the size, alignment and bit validity of u64, and the box is ours.
    unsafe { Box::from_raw(raw as *mut [AtomicU64]) }
}

fn zeroed_versions(n: usize) -> Box<[AtomicU32]> {
    let raw = Box::into_raw(vec![0_u32; n].into_boxed_slice());
    // SAFETY: AtomicU32 has the size, alignment and bit validity of u32, and the box is ours.
    unsafe { Box::from_raw(raw as *mut [AtomicU32]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_cover_the_lines_touched() {
        assert_eq!(line_mask(0, 1), 1);
        assert_eq!(line_mask(63, 2), 0b11);
        assert_eq!(line_mask(4095, 8), 1 << 63);
        assert_eq!(line_mask(0, 4096), u64::MAX);
    }

    #[test]
    fn only_hits_on_code_bump_the_version() {
        let map = CodeMap::new(2);
        let me = map.enrol(VcpuHandle::new());
        let frame = RamFrame(1);
        let ((), version, _) = map.decode(&me, frame, 128..160, || ());
        assert!(map.is_marked(frame) && !map.is_marked(RamFrame(0)));
        assert!(!map.written(frame, 0, 64));
        assert_eq!(map.version(frame), version);
        assert!(map.written(frame, 120, 16));
        assert_ne!(map.version(frame), version);
        assert!(!map.is_marked(frame));
    }

    #[test]
    fn what_was_hit_lately_is_known_frame_by_frame() {
        let map = CodeMap::new(3);
        let me = map.enrol(VcpuHandle::new());
        let hit = |frame| {
            map.decode(&me, frame, 0..16, || ());
            assert!(map.written(frame, 0, 1));
        };
        assert_eq!(map.hit_since(0), Some(vec![]));
        hit(RamFrame(2));
        hit(RamFrame(1));
        assert_eq!(map.hit_since(0), Some(vec![RamFrame(2), RamFrame(1)]));
        assert_eq!(map.hit_since(1), Some(vec![RamFrame(1)]));
        (0..LOG).for_each(|_| hit(RamFrame(0)));
        assert_eq!(map.hit_since(1), None, "too many");
        assert_eq!(map.hit_since(2), Some(vec![RamFrame(0); LOG]));
        // Somebody who is just noting it.
        map.hits.fetch_add(1, Ordering::SeqCst);
        assert_eq!(map.hit_since(map.hits() - 2), None);
    }

    #[test]
    fn a_write_during_decoding_makes_it_decode_again() {
        let map = CodeMap::new(1);
        let me = map.enrol(VcpuHandle::new());
        let mut runs = 0;
        let (_, version, _) = map.decode(&me, RamFrame(0), 0..16, || {
            runs += 1;
            if runs == 1 {
                map.written(RamFrame(0), 4, 1);
            }
        });
        assert_eq!((runs, map.version(RamFrame(0))), (2, version));
    }

    #[test]
    fn a_fresh_frame_is_settled_once_the_others_have_looked() {
        let map = CodeMap::new(1);
        let (a, handle) = (map.enrol(VcpuHandle::new()), VcpuHandle::new());
        let b = map.enrol(handle.clone());
        map.enter(&a, || ());
        map.enter(&b, || ());
        let ((), _, epoch) = map.decode(&a, RamFrame(0), 0..1, || ());
        assert!(handle.pending().contains(Event::CODE_PAGES));
        assert!(!map.settled(&a, epoch));
        map.enter(&b, || ());
        assert!(map.settled(&a, epoch));
    }
}
