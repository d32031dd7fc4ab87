//! What the handlers of one active device share.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::DriverSignal;
use super::backends::Backend;
use super::fault::Fault;
use super::filter::Filter;
use super::mac::MacAddress;

/// A backend outlives activations: a stream stays in step over resets.
pub(super) type SharedBackend = Arc<Mutex<Box<dyn Backend>>>;

/// Locks what one handler at a time uses. A panic elsewhere has been reported already.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the configuration space shows and handlers change.
#[derive(Debug)]
pub(super) struct Face {
    up: AtomicBool,
    mac: AtomicU64,
}

impl Face {
    pub(super) fn new(up: bool, mac: MacAddress) -> Self {
        let this = Self { up: up.into(), mac: AtomicU64::new(0) };
        this.set_mac(mac);
        this
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    /// `true`: that is news.
    pub(super) fn set_up(&self, up: bool) -> bool {
        self.up.swap(up, Ordering::SeqCst) != up
    }

    pub(super) fn mac(&self) -> MacAddress {
        let [a, b, c, d, e, f, ..] = self.mac.load(Ordering::SeqCst).to_le_bytes();
        MacAddress([a, b, c, d, e, f])
    }

    pub(super) fn set_mac(&self, mac: MacAddress) {
        let [a, b, c, d, e, f] = mac.0;
        self.mac.store(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]), Ordering::SeqCst);
    }
}

/// One activation.
#[derive(Debug)]
pub(super) struct Shared {
    /// What was agreed on.
    pub features: u64,
    pub signal: Arc<dyn DriverSignal>,
    pub face: Arc<Face>,
    pub filter: Mutex<Filter>,
    /// How many queue pairs the driver uses.
    pub active_pairs: AtomicU16,
    broken: AtomicBool,
}

impl Shared {
    pub(super) fn new(features: u64, signal: Arc<dyn DriverSignal>, face: Arc<Face>) -> Self {
        let filter = Mutex::new(Filter::new(face.mac()));
        let (active_pairs, broken) = (AtomicU16::new(1), AtomicBool::new(false));
        Self { features, signal, face, filter, active_pairs, broken }
    }

    /// Whether nothing is to be done before a reset.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Stops all handlers and tells the driver why it must reset the device.
    pub(super) fn break_down(&self, fault: &Fault) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            tracing::warn!("net: the driver breaks the rules, the device needs a reset: {fault}");
            self.signal.needs_reset();
        }
    }

    pub(super) fn set_up(&self, up: bool) {
        if self.face.set_up(up) {
            tracing::info!("net: the link is {}", if up { "up" } else { "down" });
            self.signal.config_changed();
        }
    }
}
