//! From the device to the driver: interrupts, and what is said of them in registers.
//!
//! Used by devices' threads and by vCPUs at once, and never waits for either.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::devices::apic::message::MsiMessage;
use crate::devices::pci::intx::IntxPin;
use crate::devices::pci::msix::{MsiSink, Msix};
use crate::devices::virtio::DriverSignal;

/// No vector: this reason does not interrupt (virtio 1.2, 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Interrupt status: a queue was used, or the configuration changed (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

#[derive(Debug)]
struct State {
    msix: Msix,
    intx_off: bool,
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

/// One function's way to its driver.
#[derive(Debug)]
pub(super) struct PciSignal {
    state: Mutex<State>,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    pin: IntxPin,
    /// Nobody, where there are only lines: MSI-X is never enabled then.
    messages: Option<Arc<dyn MsiSink>>,
}

impl PciSignal {
    pub(super) fn new(
        msix: Msix,
        queues: usize,
        pin: IntxPin,
        messages: Option<Arc<dyn MsiSink>>,
    ) -> Arc<Self> {
        let state = State {
            msix,
            intx_off: false,
            isr: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
        };
        Arc::new(Self {
            state: Mutex::new(state),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            pin,
            messages,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: MsiMessage) {
        if let Some(messages) = &self.messages {
            messages.send(message);
        }
    }

    /// The device has a reason for an interrupt: by `vector`, or by the line.
    fn raise(&self, reason: u8, vector: impl FnOnce(&State) -> u16) {
        let mut state = self.lock();
        if state.msix.enabled() {
            let vector = vector(&state);
            let message = state.msix.raise(vector);
            drop(state);
            if let Some(message) = message {
                self.send(message);
            }
        } else {
            state.isr |= reason;
            self.drive_line(&state);
        }
    }

    /// The line is asserted while the status says why. The state is locked meanwhile, so
    /// that the line and the status never disagree.
    fn drive_line(&self, state: &State) {
        self.pin.set(state.isr != 0 && !state.intx_off && !state.msix.enabled());
    }

    /// The guest reads the interrupt status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        let mut state = self.lock();
        let isr = std::mem::take(&mut state.isr);
        self.drive_line(&state);
        isr
    }

    /// Whether the device has a reason for its line.
    pub(super) fn line_asserted(&self) -> bool {
        self.lock().isr != 0
    }

    /// The guest wrote to configuration space: MSI-X's message control and the command
    /// register are as given.
    pub(super) fn configure(&self, msix_control: u16, intx_off: bool) {
        let mut state = self.lock();
        state.intx_off = intx_off;
        let waiting = state.msix.set_control(msix_control);
        self.drive_line(&state);
        drop(state);
        waiting.into_iter().for_each(|message| self.send(message));
    }

    pub(super) fn table_read(&self, offset: u64, data: &mut [u8]) {
        self.lock().msix.table_read(offset, data);
    }

    pub(super) fn table_write(&self, offset: u64, data: &[u8]) {
        let waiting = self.lock().msix.table_write(offset, data);
        waiting.into_iter().for_each(|message| self.send(message));
    }

    pub(super) fn pending_read(&self, offset: u64, data: &mut [u8]) {
        self.lock().msix.pending_read(offset, data);
    }

    /// The vector for changes of the configuration.
    pub(super) fn config_vector(&self) -> u16 {
        self.lock().config_vector
    }

    /// Sets it; a vector that does not exist becomes none, which the driver reads back.
    pub(super) fn set_config_vector(&self, vector: u16) {
        let mut state = self.lock();
        state.config_vector = if state.msix.has(vector) { vector } else { NO_VECTOR };
    }

    /// The vector of queue number `queue`.
    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.lock().queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR)
    }

    /// Sets it, likewise.
    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        let mut state = self.lock();
        let vector = if state.msix.has(vector) { vector } else { NO_VECTOR };
        if let Some(place) = state.queue_vectors.get_mut(usize::from(queue)) {
            *place = vector;
        }
    }

    /// Changes whenever the configuration space does (virtio 1.2, 4.1.4.3.1).
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether DEVICE_NEEDS_RESET is set.
    pub(super) fn is_stuck(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The device has been reset: no vectors, no reasons. MSI-X belongs to the function
    /// and stays.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.isr = 0;
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
        self.drive_line(&state);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

impl DriverSignal for PciSignal {
    fn queue_used(&self, queue: u16) {
        self.raise(ISR_QUEUE, |state| {
            state.queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR)
        });
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(ISR_CONFIG, |state| state.config_vector);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.config_changed();
    }
}
