//! From the device to the driver: an interrupt for each queue and one for the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::devices::InterruptLine;
use crate::devices::virtio::DriverSignal;

/// One device's way to its driver.
#[derive(Debug)]
pub(super) struct LongSignal {
    queues: Vec<InterruptLine>,
    config: InterruptLine,
    stuck: AtomicBool,
    /// The guest has not been shown the configuration or status as it is.
    stale: AtomicBool,
}

impl LongSignal {
    pub(super) fn new(config: InterruptLine, queues: Vec<InterruptLine>) -> Arc<Self> {
        Arc::new(Self {
            queues,
            config,
            stuck: AtomicBool::new(false),
            stale: AtomicBool::new(false),
        })
    }

    pub(super) fn reset(&self) {
        self.stuck.store(false, SeqCst);
    }

    /// Whether the device has given up on its driver.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(SeqCst)
    }

    /// Whether there is something to show, which is then thought shown.
    pub(super) fn take_stale(&self) -> bool {
        self.stale.load(SeqCst) && self.stale.swap(false, SeqCst)
    }
}

impl DriverSignal for LongSignal {
    fn queue_used(&self, queue: u16) {
        if let Some(line) = self.queues.get(usize::from(queue)) {
            line.pulse();
        }
    }

    fn config_changed(&self) {
        self.stale.store(true, SeqCst);
        self.config.pulse();
    }

    fn needs_reset(&self) {
        if !self.stuck.swap(true, SeqCst) {
            tracing::warn!("a driver broke the rules: its device waits for a reset");
            self.config_changed();
        }
    }
}
