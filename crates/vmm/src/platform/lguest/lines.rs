//! Interrupt lines: 64 of them (old guests see the first 32), latched until delivered, with no controller between.
//!
//! Devices and the clock raise them from any thread. The vCPU is told by an event; what it
//! makes of the pending set is the business of `interrupts`.

use std::sync::atomic::{AtomicU64, Ordering};

use lguest_abi::long::traps::IRQS;
use softcpu::{Event, VcpuHandle};

use crate::devices::InterruptSink;

/// The pending interrupts of a guest.
#[derive(Debug)]
pub struct InterruptLines {
    pending: AtomicU64,
    vcpu: VcpuHandle,
}

impl InterruptLines {
    /// Nothing pending, and this vCPU to be told.
    #[must_use]
    pub fn new(vcpu: VcpuHandle) -> Self {
        Self { pending: AtomicU64::new(0), vcpu }
    }

    /// An edge on line `irq`. There are 64; others lead nowhere.
    pub fn raise(&self, irq: u8) {
        if irq < IRQS {
            self.pending.fetch_or(1_u64.wrapping_shl(irq.into()), Ordering::SeqCst);
            self.look_again();
        }
    }

    /// The vCPU is to look at what is pending.
    pub(super) fn look_again(&self) {
        self.vcpu.raise(Event::INTERRUPT);
    }

    /// What is pending, a bit a line.
    pub(super) fn pending(&self) -> u64 {
        self.pending.load(Ordering::SeqCst)
    }

    /// Line `irq` is about to be delivered.
    pub(super) fn acknowledge(&self, irq: u8) {
        self.pending.fetch_and(!1_u64.wrapping_shl(irq.into()), Ordering::SeqCst);
    }
}

impl InterruptSink for InterruptLines {
    fn set_line(&self, pin: u8, asserted: bool) {
        if asserted {
            self.raise(pin);
        }
    }
}
