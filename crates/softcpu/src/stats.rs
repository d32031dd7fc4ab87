//! What a vCPU did and how long it took: snapshots for whoever wants to show them.
//!
//! Counters are plain numbers of the vCPU's own, so others see them only when the vCPU's
//! thread hands them to a [`StatsSink`]: where it looks after events and where `run` returns,
//! at most ten times a second. Time is measured around what takes microseconds (decoding,
//! translating, sleeping) always, and around each stay in translated code and each
//! instruction that it has interpreted only when somebody asked for it: that is two reads of
//! the time-stamp counter each.

use std::fmt;
use std::time::{Duration, Instant};

use iced_x86::Code;

use crate::system::tsc::host_tsc;
use crate::translate;
use crate::vcpu::{Counters, Exit, Vcpu};

/// Snapshots are not made more often than this.
const EVERY: Duration = Duration::from_millis(100);

/// What a vCPU did until now.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// How long the vCPU has been there.
    pub elapsed: Duration,
    /// What of it went where.
    pub time: Times,
    /// The run loop, the interpreter and the MMU.
    pub engine: Counters,
    /// The translator; zeroes without one.
    pub translator: translate::Counters,
    /// How often translated code had the interpreter run what, by mnemonic; only with
    /// [`Times::detail`], and in no order.
    pub called_back: Vec<(String, u64)>,
}

/// Where a vCPU's time went. What is not in here it spent interpreting cold code, or in
/// translated code too if there is no [`Times::detail`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Halted, or waiting to be started.
    pub halted: Duration,
    /// Outside of [`Vcpu::run`] for other reasons.
    pub outside: Duration,
    /// Decoding.
    pub decoding: Duration,
    /// Translating.
    pub translating: Duration,
    /// What making translations beside it has taken, on another thread.
    pub beside: Duration,
    /// The longest stretches of it.
    pub longest: Longest,
    /// What is measured on request only.
    pub detail: Option<TimesInCode>,
}

/// How long the guest stood still at most, in one go, for what the engine does now and then: by
/// the clock, so a host that had no time for the vCPU in between has made it longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Longest {
    /// Translating a block, or moving a translation; with room made for it.
    pub translating: Duration,
    /// Of that, making room.
    pub evicting: Duration,
    /// Dropping translations of code that has changed.
    pub dropping: Duration,
    /// Dropping decoded blocks that nobody wants any more.
    pub sweeping: Duration,
}

/// Where the time went that translated code ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimesInCode {
    /// In translated code itself.
    pub translated: Duration,
    /// In the interpreter, for single instructions of translated code.
    pub called_back: Duration,
}

/// Somebody who shows them.
pub trait StatsSink: Send {
    /// Called on the vCPU's thread, at most some ten times a second; must not block for long.
    fn publish(&mut self, stats: &Stats);
}

/// Ticks of the host's time-stamp counter.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ticks {
    /// All of them.
    pub(crate) all: u64,
    /// The most that were added at once.
    longest: u64,
}

impl Ticks {
    /// Adds those since the counter showed `since`.
    pub(crate) fn add_since(&mut self, since: u64) {
        self.add(host_tsc().saturating_sub(since));
    }

    /// Adds so many at once.
    pub(crate) fn add(&mut self, added: u64) {
        self.all = self.all.saturating_add(added);
        self.longest = self.longest.max(added);
    }
}

/// The clockwork of one vCPU.
pub(crate) struct Meter {
    started: (Instant, u64),
    /// Since when the vCPU is not running, if so, and whether because it has nothing to do.
    paused: Option<(u64, bool)>,
    halted: Ticks,
    outside: Ticks,
    pub(crate) decoding: Ticks,
    pub(crate) translating: Ticks,
    pub(crate) beside: Ticks,
    pub(crate) evicting: Ticks,
    pub(crate) dropping: Ticks,
    pub(crate) sweeping: Ticks,
    pub(crate) detail: Option<Box<Detail>>,
    sink: Option<Box<dyn StatsSink>>,
    published: Instant,
}

/// What is measured on request.
pub(crate) struct Detail {
    /// In translated code and what it calls.
    inside: Ticks,
    called_back: Ticks,
    /// Calls back by instruction code.
    by_code: Box<[u64]>,
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meter").field("started", &self.started).finish_non_exhaustive()
    }
}

impl Meter {
    /// A vCPU comes to be. It waits to be started.
    pub(crate) fn start() -> Self {
        let (now, ticks) = (Instant::now(), host_tsc());
        Self {
            started: (now, ticks),
            paused: Some((ticks, true)),
            halted: Ticks::default(),
            outside: Ticks::default(),
            decoding: Ticks::default(),
            translating: Ticks::default(),
            beside: Ticks::default(),
            evicting: Ticks::default(),
            dropping: Ticks::default(),
            sweeping: Ticks::default(),
            detail: None,
            sink: None,
            published: now,
        }
    }

    /// Guest code is run from now on.
    pub(crate) fn resume(&mut self) {
        (self.halted, self.outside) = self.not_running();
        self.paused = None;
    }

    /// How long the vCPU did not run, for want of work and for other reasons.
    fn not_running(&self) -> (Ticks, Ticks) {
        let (mut halted, mut outside) = (self.halted, self.outside);
        if let Some((since, idle)) = self.paused {
            if idle { &mut halted } else { &mut outside }.add_since(since);
        }
        (halted, outside)
    }

    /// Guest code is not run any more, because of `exit`.
    pub(crate) fn pause(&mut self, exit: Exit) {
        self.paused = Some((host_tsc(), exit == Exit::Halt));
    }

    /// Translated code was entered at `since`, and left now.
    pub(crate) fn in_translated(&mut self, since: u64) {
        if let Some(detail) = &mut self.detail {
            detail.inside.add_since(since);
        }
    }

    /// Translated code had an instruction with iced-x86's number `code` interpreted.
    pub(crate) fn called_back(&mut self, since: u64, code: u16) {
        let Some(detail) = &mut self.detail else { return };
        detail.called_back.add_since(since);
        if let Some(count) = detail.by_code.get_mut(usize::from(code)) {
            *count = count.wrapping_add(1);
        }
    }

    fn read(&self) -> (Duration, Times) {
        let (halted, outside) = self.not_running();
        let (then, start) = self.started;
        let (elapsed, ticks) = (then.elapsed(), host_tsc().saturating_sub(start));
        let ticks_are = |count: u64| {
            let nanos = u128::from(count).saturating_mul(elapsed.as_nanos());
            let nanos = nanos.checked_div(u128::from(ticks)).unwrap_or(0);
            Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
        };
        let duration = |part: Ticks| ticks_are(part.all);
        let detail = self.detail.as_ref().map(|detail| {
            let called_back = duration(detail.called_back);
            let translated = duration(detail.inside).saturating_sub(called_back);
            TimesInCode { translated, called_back }
        });
        let times = Times {
            halted: duration(halted),
            outside: duration(outside),
            decoding: duration(self.decoding),
            translating: duration(self.translating),
            beside: duration(self.beside),
            longest: Longest {
                translating: ticks_are(self.translating.longest),
                evicting: ticks_are(self.evicting.longest),
                dropping: ticks_are(self.dropping.longest),
                sweeping: ticks_are(self.sweeping.longest),
            },
            detail,
        };
        (elapsed, times)
    }
}

/// Counts by instruction code, added up by mnemonic.
fn by_mnemonic(by_code: &[u64]) -> Vec<(String, u64)> {
    let mut counts = std::collections::HashMap::new();
    for (code, count) in by_code.iter().enumerate().filter(|(_, count)| **count != 0) {
        let Ok(code) = Code::try_from(code) else { continue };
        let sum: &mut u64 = counts.entry(code.mnemonic()).or_default();
        *sum = sum.wrapping_add(*count);
    }
    let name = |mnemonic| format!("{mnemonic:?}").to_lowercase();
    counts.into_iter().map(|(mnemonic, count)| (name(mnemonic), count)).collect()
}

impl Vcpu {
    /// Has what the vCPU does published to `sink` from now on. With `detail`, time in
    /// translated code and in the interpreter is told apart, which takes some.
    pub fn set_stats(&mut self, sink: Box<dyn StatsSink>, detail: bool) {
        self.meter.sink = Some(sink);
        self.meter.detail = detail.then(|| {
            let by_code = Code::values().map(|_| 0).collect();
            Box::new(Detail { inside: Ticks::default(), called_back: Ticks::default(), by_code })
        });
    }

    /// What the vCPU did until now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let (elapsed, time) = self.meter.read();
        let detail = self.meter.detail.as_ref();
        Stats {
            elapsed,
            time,
            engine: self.counters(),
            translator: self.translator_counters().unwrap_or_default(),
            called_back: detail.map_or(Vec::new(), |detail| by_mnemonic(&detail.by_code)),
        }
    }

    /// Publishes what the vCPU did, whenever it did last.
    pub fn publish_stats(&mut self) {
        // Taken, because the sink is part of what is looked at.
        if let Some(mut sink) = self.meter.sink.take() {
            sink.publish(&self.stats());
            self.meter.sink = Some(sink);
            self.meter.published = Instant::now();
        }
    }

    /// Publishes what the vCPU did, unless it has just done so.
    pub(crate) fn publish_stats_if_due(&mut self) {
        if self.meter.sink.is_some() && self.meter.published.elapsed() >= EVERY {
            self.publish_stats();
        }
    }
}
