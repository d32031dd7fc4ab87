//! A running machine, as other threads reach it.

use std::sync::Arc;

use super::ending::Ending;
use super::input::Input;
use super::inspect::Inspector;

/// A handle on a machine: cheap to clone, usable from any thread, before, during and
/// after its run.
#[derive(Clone, Debug)]
pub struct Controller {
    pub(super) ending: Arc<Ending>,
    pub(super) inspector: Arc<Inspector>,
    pub(super) input: Input,
}

impl Controller {
    /// Ends the run with [`Outcome::Stopped`](super::Outcome::Stopped), unless it has
    /// ended already.
    pub fn stop(&self) {
        self.ending.stop();
    }

    /// Types `bytes` into the guest's console: the serial port, or on the lguest platform
    /// the console that the machine made. Waits while the guest does not
    /// read; returns how many were taken, which is all unless the machine ended.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.input.send(bytes)
    }

    /// What each vCPU is doing: registers and counters, as text. Waits for a second at
    /// most; for a machine that runs.
    #[must_use]
    pub fn dump(&self) -> String {
        self.inspector.ask()
    }
}
