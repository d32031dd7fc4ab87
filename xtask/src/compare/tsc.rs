//! How fast the host's time-stamp counter counts, for guests that would find it out badly.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long it is watched: long enough for the clocks' readings to be off by a millionth.
const WATCHED: Duration = Duration::from_millis(100);

/// In kilohertz, as Linux's `tsc_early_khz` wants it.
pub(super) fn host_khz() -> u64 {
    let begin = (Instant::now(), ticks());
    sleep(WATCHED);
    let passed = (begin.0.elapsed(), ticks().wrapping_sub(begin.1));
    (passed.1 as f64 / passed.0.as_secs_f64() / 1000.0).round() as u64
}

fn ticks() -> u64 {
    // SAFETY: RDTSC is part of every x86-64 CPU, and Linux leaves it enabled in user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}
