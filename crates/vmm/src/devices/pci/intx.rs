//! INTx: the interrupt lines that devices share.
//!
//! A line is level-triggered and wired together: it is asserted while anybody on it
//! asserts. The IO-APIC sees one level per line, so somebody must add them up.

use std::sync::{Arc, Mutex, PoisonError};

use super::{SLOTS, Slot};
use crate::devices::InterruptLine;

/// The lines, in the order of their interrupts.
#[derive(Debug)]
pub struct IntxLines {
    first: Arc<Wire>,
    others: Vec<Arc<Wire>>,
}

#[derive(Debug)]
struct Wire {
    line: InterruptLine,
    number: u8,
    /// A bit for each slot that asserts.
    asserting: Mutex<u32>,
}

/// One device's connection to its line.
#[derive(Clone, Debug)]
pub struct IntxPin {
    wire: Arc<Wire>,
    slot: Slot,
}

impl IntxLines {
    /// From the first line, those that follow, and their numbers.
    pub fn new(
        first: (u8, InterruptLine),
        others: impl IntoIterator<Item = (u8, InterruptLine)>,
    ) -> Self {
        let wire = |(number, line)| Arc::new(Wire { line, number, asserting: Mutex::new(0) });
        Self { first: wire(first), others: others.into_iter().map(wire).collect() }
    }

    /// INTA of the device in `slot`: slots take lines in turn. The ACPI tables say the
    /// same ([`line_of`]).
    #[must_use]
    pub fn pin(&self, slot: Slot) -> IntxPin {
        let line = line_of(slot, self.others.len().saturating_add(1));
        let other = line.checked_sub(1).and_then(|other| self.others.get(other));
        IntxPin { wire: Arc::clone(other.unwrap_or(&self.first)), slot }
    }
}

/// Which of `count` lines INTA of `slot` arrives at.
#[must_use]
pub fn line_of(slot: Slot, count: usize) -> usize {
    usize::from(slot.0 % SLOTS).checked_rem(count).unwrap_or(0)
}

impl IntxPin {
    /// The interrupt it arrives at.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.wire.number
    }

    /// Asserts or releases.
    pub fn set(&self, asserted: bool) {
        let bit = 1_u32 << (self.slot.0 % SLOTS);
        // The lock is held over the line's change, so that changes arrive in their order.
        let mut asserting = self.wire.asserting.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *asserting;
        *asserting = if asserted { before | bit } else { before & !bit };
        match (before != 0, *asserting != 0) {
            (false, true) => self.wire.line.raise(),
            (true, false) => self.wire.line.lower(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Recorder;

    #[test]
    fn a_shared_line_is_low_when_nobody_asserts() {
        let recorder = Arc::new(Recorder::default());
        let line = |pin| (pin, InterruptLine::new(recorder.clone(), pin));
        let lines = IntxLines::new(line(16), [line(17)]);
        let pins = [1, 2, 3].map(|slot| lines.pin(Slot(slot)));
        assert_eq!(pins.each_ref().map(IntxPin::number), [17, 16, 17]);
        for (pin, asserted) in [(0, true), (2, true), (0, true), (0, false), (2, false), (2, false)]
        {
            pins[pin].set(asserted);
        }
        assert_eq!(*recorder.0.lock().unwrap(), [(17, true), (17, false)]);
    }
}
