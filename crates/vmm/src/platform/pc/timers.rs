//! The machine's timer thread: waits for the local APIC timers' deadlines.
//!
//! Every vCPU has one slot with its next deadline. Arming is a store, and a wake-up of
//! the thread only when the new deadline comes before the moment the thread sleeps
//! until; later deadlines cost nothing until then. A vCPU that is about to sleep in
//! `hlt` takes its own slot over ([`Timers::take_over`]) and sleeps just that long, so that
//! an idle guest's tick wakes one thread, not two.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::clock::{TscFrequency, host_tsc};
use crate::devices::apic::controller::InterruptController;
use crate::devices::apic::local::DeadlineSink;

/// No deadline.
const NEVER: u64 = u64::MAX;
/// The thread is awake and will look at all slots before it sleeps.
const AWAKE: u64 = 0;

#[derive(Debug)]
struct Slot {
    deadline: AtomicU64,
    /// The vCPU itself waits for it.
    taken_over: AtomicBool,
}

/// The deadlines of all vCPUs (host TSC).
#[derive(Debug)]
pub struct Timers {
    frequency: TscFrequency,
    slots: Box<[Slot]>,
    /// Until when the thread sleeps.
    sleeps_until: AtomicU64,
    stopped: Mutex<bool>,
    wake: Condvar,
}

impl Timers {
    /// Slots for `vcpus` vCPUs.
    #[must_use]
    pub fn new(vcpus: usize, frequency: TscFrequency) -> Self {
        let slot = |_| Slot { deadline: AtomicU64::new(NEVER), taken_over: AtomicBool::new(false) };
        Self {
            frequency,
            slots: (0..vcpus).map(slot).collect(),
            sleeps_until: AtomicU64::new(AWAKE),
            stopped: Mutex::new(false),
            wake: Condvar::new(),
        }
    }

    /// The thread's body: until [`Timers::stop`], fires what has come due.
    pub fn run(&self, controller: &InterruptController) {
        set_timer_slack();
        loop {
            self.sleeps_until.store(AWAKE, SeqCst);
            self.fire(controller);
            let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
            if *stopped {
                return;
            }
            // Whoever arms from here on sees how long we mean to sleep; whoever armed
            // before is seen by this second look.
            let until = self.earliest();
            self.sleeps_until.store(until, SeqCst);
            if self.earliest() < until {
                continue;
            }
            if until == NEVER {
                drop(self.wake.wait(stopped));
            } else if let Some(left) = until.checked_sub(host_tsc()).filter(|left| *left != 0) {
                drop(self.wake.wait_timeout(stopped, self.frequency.duration(left)));
            }
        }
    }

    fn fire(&self, controller: &InterruptController) {
        let now = host_tsc();
        for (slot, local) in self.slots.iter().zip(controller.locals()) {
            if slot.deadline.load(SeqCst) <= now && !slot.taken_over.load(SeqCst) {
                local.timer_expired(now);
            }
        }
    }

    fn earliest(&self) -> u64 {
        let ours = self.slots.iter().filter(|slot| !slot.taken_over.load(SeqCst));
        ours.map(|slot| slot.deadline.load(SeqCst)).min().unwrap_or(NEVER)
    }

    /// Ends [`Timers::run`].
    pub fn stop(&self) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.wake.notify_all();
    }

    /// The vCPU is going to sleep and waits for its own deadline, which is returned.
    #[must_use]
    pub fn take_over(&self, vcpu: usize) -> Option<u64> {
        let slot = self.slots.get(vcpu)?;
        slot.taken_over.store(true, SeqCst);
        Some(slot.deadline.load(SeqCst)).filter(|deadline| *deadline != NEVER)
    }

    /// The vCPU is awake again: the thread waits for its deadline from now on.
    pub fn give_back(&self, vcpu: usize) {
        if let Some(slot) = self.slots.get(vcpu) {
            slot.taken_over.store(false, SeqCst);
            self.wake_for(slot.deadline.load(SeqCst));
        }
    }

    fn wake_for(&self, deadline: u64) {
        if deadline < self.sleeps_until.load(SeqCst) {
            // The lock makes sure that the thread is not between its second look and its sleep.
            drop(self.stopped.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }
}

impl DeadlineSink for Timers {
    fn arm(&self, vcpu: usize, deadline: Option<u64>) {
        let deadline = deadline.unwrap_or(NEVER);
        if let Some(slot) = self.slots.get(vcpu) {
            slot.deadline.store(deadline, SeqCst);
            if !slot.taken_over.load(SeqCst) {
                self.wake_for(deadline);
            }
        }
    }
}

/// Asks the host to wake this thread on time: by default it may be 50 us late.
pub fn set_timer_slack() {
    if let Err(error) = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)) {
        tracing::debug!(%error, "timers may be late");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Calibration;
    use crate::devices::apic::io::IoApic;
    use crate::devices::apic::local::{LocalApic, LocalApicConfig};
    use softcpu::{Event, VcpuHandle};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    struct Machine {
        timers: Arc<Timers>,
        controller: Arc<InterruptController>,
        frequency: TscFrequency,
    }

    fn machine(vcpus: usize) -> Machine {
        let frequency = Calibration::start().finish();
        let timers = Arc::new(Timers::new(vcpus, frequency));
        let local = |vcpu| {
            let deadlines: Arc<dyn DeadlineSink> = timers.clone();
            let config = LocalApicConfig {
                id: vcpu as u32,
                vcpu,
                phys_bits: 40,
                frequency,
                handle: VcpuHandle::new(),
                deadlines,
            };
            let local = LocalApic::new(config);
            for (register, value) in [(0xf0, 0x1ff_u32), (0x320, 0x4_0040)] {
                let _ = local.mmio_write(register, &value.to_le_bytes());
            }
            local
        };
        let controller =
            InterruptController::new((0..vcpus).map(local).collect(), IoApic::default());
        Machine { timers, controller, frequency }
    }

    fn run(machine: &Machine, test: impl FnOnce()) {
        std::thread::scope(|scope| {
            scope.spawn(|| machine.timers.run(&machine.controller));
            test();
            machine.timers.stop();
        });
    }

    #[test]
    fn deadlines_wake_the_right_vcpu_in_time() {
        let machine = machine(2);
        run(&machine, || {
            let start = Instant::now();
            let in_ms = |ms: u64| host_tsc() + machine.frequency.ticks(ms * 1_000_000);
            let [first, second] = machine.controller.locals() else { panic!("two vCPUs") };
            first.set_tsc_deadline(in_ms(30), 0);
            second.set_tsc_deadline(in_ms(10), 0);
            let limit = Some(start + Duration::from_secs(5));
            assert_eq!(second.handle().sleep(Event::INTERRUPT, limit), Event::INTERRUPT);
            let early = start.elapsed();
            assert!(
                early >= Duration::from_millis(10) && early < Duration::from_millis(25),
                "{early:?}"
            );
            assert_eq!(first.handle().pending(), Event::empty());
            assert_eq!(first.handle().sleep(Event::INTERRUPT, limit), Event::INTERRUPT);
            assert!(start.elapsed() >= Duration::from_millis(30));
            assert_eq!((first.acknowledge(), second.acknowledge()), (Some(0x40), Some(0x40)));
        });
    }

    #[test]
    fn a_slot_taken_over_is_left_alone_and_given_back() {
        let machine = machine(1);
        run(&machine, || {
            let local = machine.controller.local(0).unwrap();
            local.set_tsc_deadline(host_tsc() + machine.frequency.ticks(1_000_000), 0);
            assert!(machine.timers.take_over(0).is_some());
            std::thread::sleep(Duration::from_millis(10));
            assert_eq!(local.handle().pending(), Event::empty());
            machine.timers.give_back(0);
            let limit = Some(Instant::now() + Duration::from_secs(5));
            assert_eq!(local.handle().sleep(Event::INTERRUPT, limit), Event::INTERRUPT);
            assert_eq!(machine.timers.take_over(0), None);
        });
    }

    #[test]
    fn periodic_timers_go_on() {
        let machine = machine(1);
        run(&machine, || {
            let local = machine.controller.local(0).unwrap();
            for (register, value) in [(0x320, 0x2_0040_u32), (0x3e0, 0xb), (0x380, 2_000_000)] {
                let _ = local.mmio_write(register, &value.to_le_bytes());
            }
            let start = Instant::now();
            for _ in 0..10 {
                local.handle().sleep(Event::INTERRUPT, Some(start + Duration::from_secs(5)));
                local.handle().take(Event::INTERRUPT);
                assert_eq!(local.acknowledge(), Some(0x40));
                let _ = local.end_of_interrupt();
            }
            let took = start.elapsed();
            assert!(
                took >= Duration::from_millis(19) && took < Duration::from_millis(60),
                "{took:?}"
            );
        });
    }
}
