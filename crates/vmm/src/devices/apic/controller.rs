//! All interrupt controllers of a machine, and the routes between them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::io::IoApic;
use super::local::{Effect, LocalApic};
use super::message::{DeliveryMode, Destination, InterruptMessage, MsiMessage};
use crate::devices::{InterruptLine, InterruptSink};

/// The local APICs, by vCPU number, and the IO-APIC.
#[derive(Debug)]
pub struct InterruptController {
    locals: Box<[LocalApic]>,
    io: Mutex<IoApic>,
    /// Where the search for the lowest priority starts, so that equals take turns.
    turn: AtomicUsize,
}

impl InterruptController {
    /// Joins them.
    #[must_use]
    pub fn new(locals: Vec<LocalApic>, io: IoApic) -> Arc<Self> {
        Arc::new(Self { locals: locals.into(), io: Mutex::new(io), turn: AtomicUsize::new(0) })
    }

    /// The line into `pin` of the IO-APIC.
    #[must_use]
    pub fn line(self: &Arc<Self>, pin: u8) -> InterruptLine {
        InterruptLine::new(Arc::clone(self) as Arc<dyn InterruptSink>, pin)
    }

    /// The local APIC of vCPU number `vcpu`.
    #[must_use]
    pub fn local(&self, vcpu: usize) -> Option<&LocalApic> {
        self.locals.get(vcpu)
    }

    /// All local APICs, by vCPU number.
    #[must_use]
    pub fn locals(&self) -> &[LocalApic] {
        &self.locals
    }

    /// The IO-APIC.
    pub fn io(&self) -> MutexGuard<'_, IoApic> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device's MSI. `false`: nobody took it.
    pub fn deliver_msi(&self, message: MsiMessage) -> bool {
        message.decode().is_some_and(|message| self.deliver(&message, None))
    }

    /// Carries `message` to everybody it names; `from` is the sending vCPU's number, for
    /// shorthands. `false`: nobody took it.
    pub fn deliver(&self, message: &InterruptMessage, from: Option<usize>) -> bool {
        let addressed = |(vcpu, local): &(usize, &LocalApic)| match message.destination {
            Destination::Physical(address) => local.is_physically(address),
            Destination::Logical(address) => local.is_logically(address),
            Destination::Oneself => Some(*vcpu) == from,
            Destination::All => true,
            Destination::Others => Some(*vcpu) != from,
        };
        let targets = self.locals.iter().enumerate().filter(addressed);
        let post = |local: &LocalApic| local.post(message.mode, message.vector, message.trigger);
        if message.mode == DeliveryMode::LowestPriority {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let count = self.locals.len().max(1);
            let distance = |vcpu: usize| vcpu.wrapping_sub(turn).checked_rem(count).unwrap_or(0);
            return targets
                .filter(|(_, local)| local.accepts_vectors())
                .min_by_key(|(vcpu, local)| (local.priority() >> 4, distance(*vcpu)))
                .is_some_and(|(_, local)| post(local));
        }
        targets.fold(false, |taken, (_, local)| post(local) | taken)
    }

    /// Does what a register write on vCPU `from` asked for.
    pub fn perform(&self, from: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Send(message) => {
                self.deliver(&message, Some(from));
            }
            Effect::EndOfLevel(vector) => {
                self.io().end_of_interrupt(vector, |message| self.deliver(message, None));
            }
        }
    }

    /// A load from the IO-APIC's registers.
    pub fn io_read(&self, offset: u64, data: &mut [u8]) {
        self.io().read(offset, data);
    }

    /// A store to the IO-APIC's registers.
    pub fn io_write(&self, offset: u64, data: &[u8]) {
        self.io().write(offset, data, |message| self.deliver(message, None));
    }
}

impl InterruptSink for InterruptController {
    fn set_line(&self, pin: u8, asserted: bool) {
        self.io().set_line(pin, asserted, |message| self.deliver(message, None));
    }
}

#[cfg(test)]
#[path = "controller_tests.rs"]
mod tests;
