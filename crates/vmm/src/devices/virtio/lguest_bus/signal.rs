//! From the device to the driver: an interrupt line for each queue, and no more words.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::devices::InterruptLine;
use crate::devices::virtio::DriverSignal;

/// One device's way to its driver.
#[derive(Debug)]
pub(super) struct BusSignal {
    lines: Vec<InterruptLine>,
    stuck: AtomicBool,
}

impl BusSignal {
    pub(super) fn new(lines: Vec<InterruptLine>) -> Self {
        Self { lines, stuck: AtomicBool::new(false) }
    }

    pub(super) fn reset(&self) {
        self.stuck.store(false, Ordering::SeqCst);
    }

    /// Whether the device has given up on its driver.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::SeqCst)
    }
}

impl DriverSignal for BusSignal {
    fn queue_used(&self, queue: u16) {
        if let Some(line) = self.lines.get(usize::from(queue)) {
            line.pulse();
        }
    }

    /// There is no interrupt for it on this bus.
    fn config_changed(&self) {}

    /// Nor a status that would say so.
    fn needs_reset(&self) {
        if !self.stuck.swap(true, Ordering::SeqCst) {
            tracing::warn!("a driver broke the rules: its device waits for a reset");
        }
    }
}
