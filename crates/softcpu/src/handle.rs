//! How other threads get a vCPU's attention.
//!
//! A vCPU looks at one atomic word at every block boundary. Whoever wants
//! something of it (the local APIC has an interrupt, the Launcher wants it to
//! stop, another vCPU found code on a page it may still hold writable) sets a bit
//! there and, if the vCPU sleeps in `hlt`, wakes it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::sync::lock;

bitflags::bitflags! {
    /// Reasons to look up from guest code.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Event: u32 {
        /// The local APIC has a vector that may be deliverable.
        const INTERRUPT = 1 << 0;
        /// A non-maskable interrupt is pending.
        const NMI = 1 << 1;
        /// `run` must return [`Exit::Stopped`](crate::vcpu::Exit::Stopped).
        const STOP = 1 << 2;
        /// Another vCPU decoded code from a page for the first time: drop cached
        /// write permissions, so that writes to it are seen.
        const CODE_PAGES = 1 << 3;
        /// Drop every cached translation (KVM's paravirtual TLB flush).
        const FLUSH_TLB = 1 << 4;
        /// The machine wants the vCPU's thread (INIT, SIPI, snapshot): `run` returns
        /// [`Exit::Attention`](crate::vcpu::Exit::Attention).
        const ATTENTION = 1 << 5;
        /// A store has hit code: blocks may have become stale.
        const CODE_CHANGED = 1 << 6;
    }
}

/// The part of a vCPU that other threads may touch. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct VcpuHandle {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    events: AtomicU32,
    /// Guards nothing but the sleep itself: held while deciding to sleep, so that
    /// a raise between the check and the wait is not lost.
    sleeping: Mutex<bool>,
    wake: Condvar,
}

impl VcpuHandle {
    /// A handle with no event pending.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The word that holds the bits set now, for code that looks at it in line.
    pub(crate) fn events_address(&self) -> *const AtomicU32 {
        std::ptr::from_ref(&self.shared.events)
    }

    /// Sets the bits of `event` and wakes the vCPU if it sleeps.
    pub fn raise(&self, event: Event) {
        let before = self.shared.events.fetch_or(event.bits(), Ordering::SeqCst);
        if before & event.bits() != event.bits() {
            let sleeping = lock(&self.shared.sleeping);
            if *sleeping {
                self.shared.wake.notify_all();
            }
        }
    }

    /// The bits set now.
    #[inline]
    #[must_use]
    pub fn pending(&self) -> Event {
        Event::from_bits_truncate(self.shared.events.load(Ordering::Relaxed))
    }

    /// Clears the bits of `event` and says which of them were set.
    pub fn take(&self, event: Event) -> Event {
        let before = self.shared.events.fetch_and(!event.bits(), Ordering::SeqCst);
        Event::from_bits_truncate(before) & event
    }

    /// Sleeps until one of `wanted` is raised or `until` has passed (`None`: no limit).
    /// Returns the wanted bits that are set; they stay set.
    pub fn sleep(&self, wanted: Event, until: Option<Instant>) -> Event {
        let mut sleeping = lock(&self.shared.sleeping);
        loop {
            let now = Event::from_bits_truncate(self.shared.events.load(Ordering::SeqCst)) & wanted;
            if !now.is_empty() {
                return now;
            }
            *sleeping = true;
            sleeping = match until {
                None => self.shared.wake.wait(sleeping).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                        *sleeping = false;
                        return now;
                    };
                    self.shared
                        .wake
                        .wait_timeout(sleeping, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
            *sleeping = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_raise_from_another_thread_ends_the_sleep() {
        let handle = VcpuHandle::new();
        let other = handle.clone();
        let waker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(10));
            other.raise(Event::INTERRUPT);
        });
        assert_eq!(handle.sleep(Event::INTERRUPT | Event::STOP, None), Event::INTERRUPT);
        waker.join().unwrap();
        assert_eq!(handle.take(Event::all()), Event::INTERRUPT);
        assert_eq!(handle.pending(), Event::empty());
    }

    #[test]
    fn a_deadline_ends_the_sleep_too() {
        let handle = VcpuHandle::new();
        handle.raise(Event::NMI);
        let until = Instant::now() + Duration::from_millis(5);
        assert_eq!(handle.sleep(Event::STOP, Some(until)), Event::empty());
        assert!(Instant::now() >= until);
    }
}
