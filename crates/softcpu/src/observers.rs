//! vCPUs that must know of a change before anybody may rely on it.
//!
//! Changes are counted. A vCPU says up to which one it has heard of them, from where nothing of the
//! guest's runs, and whoever waits looks whether all have said so. One that runs no guest code has
//! nothing to hear of, and catches up before it does. Two things are changed so: which pages may be
//! stored to unseen ([`crate::memory::code_map`]) and which code memory is in use
//! ([`crate::translate`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use crate::handle::{Event, VcpuHandle};

/// What a vCPU has heard of.
#[derive(Debug)]
pub struct Observer {
    /// Which of those that watch the same it is, from zero on.
    number: u32,
    /// The last change it knows of; `u64::MAX` while it runs no guest code.
    seen: AtomicU64,
    handle: VcpuHandle,
}

impl Observer {
    /// Which of those that watch the same it is, from zero on.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// It knows of all changes up to `change`.
    pub(crate) fn saw(&self, change: u64) {
        self.seen.store(change, Ordering::SeqCst);
    }

    fn has_seen(&self, change: u64) -> bool {
        self.seen.load(Ordering::SeqCst) >= change
    }

    /// It runs no guest code until it says what it [saw](Observer::saw).
    pub(crate) fn rests(&self) {
        self.saw(u64::MAX);
    }
}

/// All who watch the same.
#[derive(Debug, Default)]
pub(crate) struct Observers(RwLock<Vec<Arc<Observer>>>);

impl Observers {
    /// Enrols a vCPU, which runs no guest code yet.
    pub(crate) fn enrol(&self, handle: VcpuHandle) -> Arc<Observer> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let (number, seen) = (all.len() as u32, AtomicU64::new(u64::MAX));
        let observer = Arc::new(Observer { number, seen, handle });
        all.push(Arc::clone(&observer));
        observer
    }

    fn all(&self) -> RwLockReadGuard<'_, Vec<Arc<Observer>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there are several.
    pub(crate) fn are_several(&self) -> bool {
        self.all().len() > 1
    }

    /// Whether all know of `change`.
    pub(crate) fn have_seen(&self, change: u64) -> bool {
        self.all().iter().all(|observer| observer.has_seen(change))
    }

    /// The same of all others than `me`.
    pub(crate) fn others_have_seen(&self, me: &Observer, change: u64) -> bool {
        let all = self.all();
        all.iter().all(|other| std::ptr::eq(&raw const **other, me) || other.has_seen(change))
    }

    /// Raises `event` for those who are `concerned`.
    fn tell_those(&self, event: Event, concerned: impl Fn(&Observer) -> bool) {
        for observer in self.all().iter().filter(|observer| concerned(observer)) {
            observer.handle.raise(event);
        }
    }

    /// Raises `event` for all.
    pub(crate) fn tell(&self, event: Event) {
        self.tell_those(event, |_| true);
    }

    /// The same for all others than `me`.
    pub(crate) fn tell_others(&self, me: &Observer, event: Event) {
        self.tell_those(event, |other| !std::ptr::eq(other, me));
    }

    /// The same for those of them who do not know of `change`.
    pub(crate) fn tell_late(&self, me: &Observer, change: u64, event: Event) {
        self.tell_those(event, |other| !std::ptr::eq(other, me) && !other.has_seen(change));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_have_seen_a_change_once_the_last_that_runs_has() {
        let observers = Observers::default();
        let handles = [VcpuHandle::new(), VcpuHandle::new()];
        let first = observers.enrol(handles[0].clone());
        assert!(!observers.are_several());
        let second = observers.enrol(handles[1].clone());
        assert_eq!((first.number(), second.number(), observers.are_several()), (0, 1, true));
        assert!(observers.have_seen(7), "nobody runs");
        first.saw(6);
        second.saw(7);
        assert!(!observers.have_seen(7) && observers.others_have_seen(&first, 7));
        assert!(!observers.others_have_seen(&second, 7));
        first.rests();
        assert!(observers.have_seen(7) && !observers.have_seen(8));
        observers.tell_late(&second, 8, Event::STOP);
        observers.tell_late(&first, 7, Event::STOP);
        observers.tell_others(&first, Event::CODE_PAGES);
        assert_eq!(handles[0].pending(), Event::empty());
        observers.tell_late(&first, 8, Event::STOP);
        observers.tell(Event::NMI);
        let told = handles.map(|handle| handle.pending());
        assert_eq!(told, [Event::NMI, Event::NMI | Event::CODE_PAGES | Event::STOP]);
    }
}
