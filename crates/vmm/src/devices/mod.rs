//! The devices of a PC, one file each.
//!
//! A device is its registers: `read` and `write` by offset, nothing else. It sees
//! neither vCPUs nor the machine; it raises an [`InterruptLine`], and where the guest
//! asks for something only the machine can do (power off, reset) its `write` returns a
//! [`Request`]. Time is handed in, never fetched, which is also what makes the devices
//! testable. The guest is hostile: any sequence of accesses is answered.

use std::fmt;
use std::sync::Arc;

pub mod acpi_power;
pub mod apic;
pub mod debug_exit;
#[doc(hidden)]
pub mod fuzz;
pub mod i8042;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod test_device;
pub mod virtio;

/// What a device's write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Power off: ACPI's S5.
    PowerOff,
    /// Reset the machine.
    Reset,
    /// The guest kernel says that it has panicked (pvpanic).
    Panicked,
    /// A test program ends with this value (debug-exit port).
    Exit(u8),
}

/// Who takes the level of interrupt lines: the IO-APIC, or a recorder in tests.
pub trait InterruptSink: Send + Sync {
    /// Line `pin` is now `asserted`.
    fn set_line(&self, pin: u8, asserted: bool);
}

/// One interrupt line, held by the device that drives it.
#[derive(Clone)]
pub struct InterruptLine {
    sink: Arc<dyn InterruptSink>,
    pin: u8,
}

impl fmt::Debug for InterruptLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterruptLine").field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl InterruptLine {
    /// The line that arrives at `pin` of `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn InterruptSink>, pin: u8) -> Self {
        Self { sink, pin }
    }

    /// Asserts the line.
    pub fn raise(&self) {
        self.sink.set_line(self.pin, true);
    }

    /// Deasserts the line.
    pub fn lower(&self) {
        self.sink.set_line(self.pin, false);
    }

    /// Asserts and deasserts: one edge.
    pub fn pulse(&self) {
        self.raise();
        self.lower();
    }
}

/// A sink that records what happened to the lines, for device tests.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct Recorder(pub(crate) std::sync::Mutex<Vec<(u8, bool)>>);

#[cfg(test)]
impl InterruptSink for Recorder {
    fn set_line(&self, pin: u8, asserted: bool) {
        self.0.lock().unwrap().push((pin, asserted));
    }
}
