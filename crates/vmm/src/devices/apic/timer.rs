//! The local APIC's timer: one-shot, periodic and TSC-deadline (SDM vol. 3, 11.5.4).
//!
//! Arithmetic only: it is told the time (host TSC) and says when it will fire; the
//! machine's timer thread does the waiting.

use crate::clock::TscFrequency;

/// The frequency the undivided timer counts at: that of KVM's virtual APIC bus, which
/// the CPUID timing leaf states.
pub const APIC_BUS_HZ: u64 = 1_000_000_000;
/// Nanoseconds per undivided tick.
const TICK_NANOS: u64 = 1_000_000_000 / APIC_BUS_HZ;

/// A periodic timer fires at most this often, nanoseconds: a guest that asks for more
/// would only keep the host's timer thread busy.
const SHORTEST_PERIOD: u64 = 100_000;

/// What the two mode bits of the timer's vector-table entry select.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    /// Counts down once.
    OneShot,
    /// Starts again at zero.
    Periodic,
    /// Fires when the TSC passes `IA32_TSC_DEADLINE`.
    TscDeadline,
}

impl TimerMode {
    /// From the vector-table entry; the reserved encoding counts down once.
    #[must_use]
    pub const fn of(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::OneShot,
        }
    }
}

/// The timer of one vCPU. All `now`s and deadlines are host TSC values.
#[derive(Clone, Copy, Debug)]
pub struct ApicTimer {
    frequency: TscFrequency,
    mode: TimerMode,
    initial: u32,
    divide: u32,
    /// When it fires next.
    deadline: Option<u64>,
    /// `IA32_TSC_DEADLINE`, in guest TSC.
    tsc_deadline: u64,
}

impl ApicTimer {
    /// A stopped timer.
    #[must_use]
    pub const fn new(frequency: TscFrequency) -> Self {
        Self {
            frequency,
            mode: TimerMode::OneShot,
            initial: 0,
            divide: 0,
            deadline: None,
            tsc_deadline: 0,
        }
    }

    /// When it fires next.
    #[must_use]
    pub const fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// The vector-table entry was written. Going into or out of TSC-deadline mode disarms.
    pub fn set_mode(&mut self, mode: TimerMode) {
        let deadline_mode = |mode| mode == TimerMode::TscDeadline;
        if deadline_mode(self.mode) != deadline_mode(mode) {
            self.deadline = None;
            self.tsc_deadline = 0;
            self.initial = 0;
        }
        self.mode = mode;
    }

    /// Host TSC ticks that `count` timer ticks take.
    fn ticks(&self, count: u32) -> u64 {
        let nanos = u64::from(count).saturating_mul(TICK_NANOS).saturating_mul(self.divisor());
        self.frequency.ticks(nanos)
    }

    const fn divisor(&self) -> u64 {
        // Bits 3, 1 and 0 make a number: 0 to 6 divide by 2 to 128, 7 divides by one.
        match (self.divide >> 1) & 4 | self.divide & 3 {
            7 => 1,
            n => 2 << n,
        }
    }

    /// The initial-count register.
    #[must_use]
    pub const fn initial_count(&self) -> u32 {
        self.initial
    }

    /// A write of the initial-count register (re)starts the timer; zero stops it.
    pub fn set_initial_count(&mut self, count: u32, now: u64) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = count;
        self.deadline = (count != 0).then(|| now.saturating_add(self.ticks(count)));
    }

    /// The current-count register.
    #[must_use]
    pub fn current_count(&self, now: u64) -> u32 {
        let Some(deadline) = self.deadline.filter(|_| self.mode != TimerMode::TscDeadline) else {
            return 0;
        };
        let nanos = self.frequency.nanos(deadline.saturating_sub(now));
        let count = nanos.checked_div(TICK_NANOS.saturating_mul(self.divisor())).unwrap_or(0);
        u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
    }

    /// The divide-configuration register.
    #[must_use]
    pub const fn divide_configuration(&self) -> u32 {
        self.divide
    }

    /// A write of the divide-configuration register: what is left to count is counted
    /// at the new speed.
    pub fn set_divide_configuration(&mut self, value: u32, now: u64) {
        let left = self.current_count(now);
        self.divide = value & 0xb;
        if self.deadline.is_some() && self.mode != TimerMode::TscDeadline {
            self.deadline = Some(now.saturating_add(self.ticks(left)));
        }
    }

    /// `IA32_TSC_DEADLINE`: zero outside its mode and once it has fired.
    #[must_use]
    pub const fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// A write of `IA32_TSC_DEADLINE`; `offset` is guest TSC minus host TSC. Zero disarms.
    pub fn set_tsc_deadline(&mut self, guest: u64, offset: u64) {
        if self.mode != TimerMode::TscDeadline {
            return;
        }
        self.tsc_deadline = guest;
        self.deadline = (guest != 0).then(|| host_deadline(guest, offset));
    }

    /// The guest's TSC was moved: a TSC deadline stays where it is in guest time.
    pub fn tsc_moved(&mut self, offset: u64) {
        self.set_tsc_deadline(self.tsc_deadline, offset);
    }

    /// If the deadline has passed: disarms or starts the next period, and says `true`.
    pub fn expire(&mut self, now: u64) -> bool {
        let Some(deadline) = self.deadline.filter(|deadline| *deadline <= now) else {
            return false;
        };
        self.tsc_deadline = 0;
        self.deadline = (self.mode == TimerMode::Periodic && self.initial != 0).then(|| {
            // Periods that were missed altogether (a stopped machine) are not made up for.
            let period = self.ticks(self.initial).max(self.frequency.ticks(SHORTEST_PERIOD));
            let next = deadline.saturating_add(period);
            if next <= now { now.saturating_add(period) } else { next }
        });
        true
    }
}

/// When the host's TSC shows what the guest calls `guest`. A sum that wraps means a
/// deadline in the far future or past; it is told by which way the offset goes.
fn host_deadline(guest: u64, offset: u64) -> u64 {
    if (offset as i64) < 0 {
        guest.saturating_add(offset.wrapping_neg())
    } else {
        guest.saturating_sub(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2 GHz: one APIC tick is two TSC ticks.
    fn timer() -> ApicTimer {
        let mut timer = ApicTimer::new(TscFrequency::from_hz(2_000_000_000));
        timer.set_divide_configuration(0xb, 0);
        timer
    }

    #[test]
    fn one_shot_counts_down_once() {
        let mut timer = timer();
        timer.set_initial_count(1000, 100);
        assert_eq!(timer.deadline(), Some(2100));
        assert_eq!(timer.current_count(1100), 500);
        assert!(!timer.expire(2099));
        assert!(timer.expire(2100));
        assert!(!timer.expire(9999));
        assert_eq!(timer.current_count(2101), 0);
        timer.set_initial_count(5, 0);
        timer.set_initial_count(0, 0);
        assert_eq!(timer.deadline(), None);
    }

    #[test]
    fn periods_do_not_drift_and_missed_ones_are_dropped() {
        let mut timer = timer();
        timer.set_mode(TimerMode::Periodic);
        timer.set_initial_count(1_000_000, 0);
        assert!(timer.expire(2_000_300));
        assert_eq!(timer.deadline(), Some(4_000_000));
        assert!(timer.expire(50_000_000));
        assert_eq!(timer.deadline(), Some(52_000_000));
    }

    #[test]
    fn a_tiny_period_is_stretched() {
        let mut timer = timer();
        timer.set_mode(TimerMode::Periodic);
        timer.set_initial_count(1, 0);
        assert!(timer.expire(2));
        assert_eq!(timer.deadline(), Some(2 + 200_000));
    }

    #[test]
    fn the_divisor_is_encoded_oddly() {
        let mut timer = timer();
        for (bits, divisor) in
            [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
        {
            timer.set_divide_configuration(bits, 0);
            assert_eq!(timer.divisor(), divisor);
        }
        timer.set_divide_configuration(0xb, 0);
        timer.set_initial_count(1000, 0);
        timer.set_divide_configuration(0, 1000);
        assert_eq!(timer.deadline(), Some(1000 + 500 * 2 * 2));
    }

    #[test]
    fn tsc_deadlines_follow_the_guests_tsc() {
        let mut timer = timer();
        timer.set_tsc_deadline(500, 0);
        assert_eq!((timer.tsc_deadline(), timer.deadline()), (0, None), "ignored in other modes");
        timer.set_mode(TimerMode::TscDeadline);
        timer.set_tsc_deadline(500, 100);
        assert_eq!(timer.deadline(), Some(400));
        timer.tsc_moved(100_u64.wrapping_neg());
        assert_eq!(timer.deadline(), Some(600));
        assert_eq!(timer.current_count(0), 0);
        assert!(timer.expire(600));
        assert_eq!(timer.tsc_deadline(), 0);
        timer.set_tsc_deadline(u64::MAX, 100_u64.wrapping_neg());
        assert_eq!(timer.deadline(), Some(u64::MAX));
        timer.set_mode(TimerMode::OneShot);
        assert_eq!(timer.deadline(), None);
    }
}
