//! Interrupt lines: 64 of them (old guests see the first 32), with no controller between.
//!
//! Most are latched until delivered. PCI's are not: several devices may share one, so it is
//! pending as long as it is asserted. Devices and the clock raise them from any thread. The vCPU is told by an event; what it
//! makes of the pending set is the business of `interrupts`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lguest_abi::long::traps::IRQS;
use softcpu::{Event, VcpuHandle};

use crate::devices::InterruptSink;

/// The pending interrupts of a guest.
#[derive(Debug)]
pub struct InterruptLines {
    latched: AtomicU64,
    asserted: AtomicU64,
    vcpu: VcpuHandle,
}

impl InterruptLines {
    /// Nothing pending, and this vCPU to be told.
    #[must_use]
    pub fn new(vcpu: VcpuHandle) -> Self {
        Self { latched: AtomicU64::new(0), asserted: AtomicU64::new(0), vcpu }
    }

    /// An edge on line `irq`. There are 64; others lead nowhere.
    pub fn raise(&self, irq: u8) {
        if irq < IRQS {
            self.latched.fetch_or(bit(irq), Ordering::SeqCst);
            self.look_again();
        }
    }

    /// The vCPU is to look at what is pending.
    pub(super) fn look_again(&self) {
        self.vcpu.raise(Event::INTERRUPT);
    }

    /// What is pending, a bit a line.
    pub(super) fn pending(&self) -> u64 {
        self.latched.load(Ordering::SeqCst) | self.asserted.load(Ordering::SeqCst)
    }

    /// Line `irq` is about to be delivered. An asserted one stays pending.
    pub(super) fn acknowledge(&self, irq: u8) {
        self.latched.fetch_and(!bit(irq), Ordering::SeqCst);
    }
}

/// The bit of line `irq`, one of the 64.
const fn bit(irq: u8) -> u64 {
    1_u64.wrapping_shl(irq as u32)
}

/// Sees an edge, and latches it.
impl InterruptSink for InterruptLines {
    fn set_line(&self, pin: u8, asserted: bool) {
        if asserted {
            self.raise(pin);
        }
    }
}

/// The same lines, for devices that assert them until they are served.
#[derive(Clone, Debug)]
pub struct LevelLines(pub Arc<InterruptLines>);

impl InterruptSink for LevelLines {
    fn set_line(&self, pin: u8, asserted: bool) {
        let lines = &self.0;
        if pin >= IRQS {
            return;
        }
        if asserted {
            lines.asserted.fetch_or(bit(pin), Ordering::SeqCst);
            lines.look_again();
        } else {
            lines.asserted.fetch_and(!bit(pin), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_stays_and_an_edge_goes() {
        let lines = Arc::new(InterruptLines::new(VcpuHandle::new()));
        let level = LevelLines(Arc::clone(&lines));
        lines.set_line(1, true);
        level.set_line(2, true);
        lines.set_line(1, false);
        level.set_line(200, true);
        assert_eq!(lines.pending(), 0b110);
        lines.acknowledge(1);
        lines.acknowledge(2);
        assert_eq!(lines.pending(), 0b100);
        level.set_line(2, false);
        assert_eq!(lines.pending(), 0);
    }
}
