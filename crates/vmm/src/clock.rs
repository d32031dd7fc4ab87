//! The machine's clock: the host's time-stamp counter and its frequency.
//!
//! Everything the guest measures time with (its TSC, kvmclock, the local APIC timer)
//! counts in the host's TSC, so that a deadline the guest computes from one is kept by
//! the others. The frequency is read from CPUID where the host says it exactly, and
//! measured against `CLOCK_MONOTONIC` otherwise, while the kernel is being loaded: no
//! guest ever has to find it out by looping.

#![cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        reason = "products of 64 bits in 128, by frequencies that are not zero"
    )
)]

use std::time::{Duration, Instant};

/// How long the TSC is watched at least when its frequency must be measured. The two
/// ends are known to about 0.1 us, which makes an error of some parts per million.
const MEASURE_AT_LEAST: Duration = Duration::from_millis(20);

/// How often a pair of clock readings is tried again to catch an undisturbed one.
const SAMPLE_TRIES: u32 = 8;

/// A CPUID frequency further from the measured one than this, in thousandths, is not believed.
const CPUID_TOLERANCE: u64 = 5;

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// The host's time-stamp counter, now.
#[inline]
#[must_use]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC is part of every x86-64 CPU, and Linux leaves it enabled in user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// How fast the TSC counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscFrequency {
    hz: u64,
}

impl TscFrequency {
    /// A frequency in hertz; anything below 1 MHz is taken as 1 MHz, so that no
    /// conversion can divide by zero or overflow.
    #[must_use]
    pub const fn from_hz(hz: u64) -> Self {
        Self { hz: if hz < 1_000_000 { 1_000_000 } else { hz } }
    }

    /// In hertz.
    #[must_use]
    pub const fn hz(self) -> u64 {
        self.hz
    }

    /// In kilohertz, as CPUID and kvmclock's users want it.
    #[must_use]
    pub fn khz(self) -> u32 {
        u32::try_from(self.hz / 1000).unwrap_or(u32::MAX)
    }

    /// How many ticks `nanos` nanoseconds are.
    #[must_use]
    pub fn ticks(self, nanos: u64) -> u64 {
        let ticks =
            u128::from(nanos).saturating_mul(u128::from(self.hz)) / u128::from(NANOS_PER_SECOND);
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// How many nanoseconds `ticks` ticks are.
    #[must_use]
    pub fn nanos(self, ticks: u64) -> u64 {
        let nanos =
            u128::from(ticks).saturating_mul(u128::from(NANOS_PER_SECOND)) / u128::from(self.hz);
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// How long `ticks` ticks are.
    #[must_use]
    pub fn duration(self, ticks: u64) -> Duration {
        Duration::from_nanos(self.nanos(ticks))
    }

    /// The factor and shift by which kvmclock's users turn ticks into nanoseconds:
    /// `ns = ((ticks << shift) * factor) >> 32`, where a negative shift goes right.
    #[must_use]
    pub fn pvclock_scale(self) -> (u32, i8) {
        // The factor uses all its 32 bits when the shifted frequency lies in (1 GHz, 2 GHz].
        let mut shift: i8 = 0;
        let mut scaled = u128::from(self.hz);
        while scaled > u128::from(NANOS_PER_SECOND) * 2 {
            scaled /= 2;
            shift = shift.saturating_sub(1);
        }
        while scaled <= u128::from(NANOS_PER_SECOND) {
            scaled *= 2;
            shift = shift.saturating_add(1);
        }
        let wide = u128::from(NANOS_PER_SECOND) << 64
            >> (32_i16.saturating_add(i16::from(shift)).clamp(0, 64) as u32);
        let factor = wide / u128::from(self.hz);
        (u32::try_from(factor).unwrap_or(u32::MAX), shift)
    }
}

/// One reading of both clocks, as close together as they come.
#[derive(Clone, Copy, Debug)]
struct Sample {
    tsc: u64,
    at: Instant,
}

impl Sample {
    fn take() -> Self {
        let mut best = (u64::MAX, Self { tsc: host_tsc(), at: Instant::now() });
        for _ in 0..SAMPLE_TRIES {
            let before = host_tsc();
            let at = Instant::now();
            let after = host_tsc();
            let width = after.wrapping_sub(before);
            if width < best.0 {
                best = (width, Self { tsc: before.wrapping_add(width / 2), at });
            }
        }
        best.1
    }
}

/// The measurement of the TSC's frequency, under way since the machine was created.
#[derive(Debug)]
pub struct Calibration {
    start: Sample,
}

impl Calibration {
    /// Takes the first sample.
    #[must_use]
    pub fn start() -> Self {
        Self { start: Sample::take() }
    }

    /// Takes the second sample and settles the frequency. Waits only if the host's
    /// CPUID does not give it and the first sample is too recent.
    #[must_use]
    pub fn finish(self) -> TscFrequency {
        let stated = cpuid_frequency();
        let wanted = if stated.is_some() { MEASURE_AT_LEAST / 10 } else { MEASURE_AT_LEAST };
        if let Some(left) = wanted.checked_sub(self.start.at.elapsed()) {
            std::thread::sleep(left);
        }
        let end = Sample::take();
        let nanos =
            u64::try_from(end.at.duration_since(self.start.at).as_nanos()).unwrap_or(u64::MAX);
        let measured = per_second(end.tsc.wrapping_sub(self.start.tsc), nanos);
        match stated {
            Some(hz) if hz.abs_diff(measured) <= measured / 1000 * CPUID_TOLERANCE => {
                TscFrequency::from_hz(hz)
            }
            _ => TscFrequency::from_hz(measured),
        }
    }
}

fn per_second(ticks: u64, nanos: u64) -> u64 {
    let hz = u128::from(ticks) * u128::from(NANOS_PER_SECOND) / u128::from(nanos.max(1));
    u64::try_from(hz).unwrap_or(u64::MAX)
}

/// The TSC frequency where CPUID states it exactly: by the crystal's frequency and its
/// ratio (leaf 0x15, SDM vol. 3, 20.7.3), or by a hypervisor's timing leaf. Leaf 0x16
/// gives whole megahertz of another clock, which is not exact enough to be used here.
fn cpuid_frequency() -> Option<u64> {
    use core::arch::x86_64::__cpuid;
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    if __cpuid(0).eax >= 0x15 {
        let crystal = __cpuid(0x15);
        if crystal.eax != 0 && crystal.ebx != 0 && crystal.ecx != 0 {
            return Some(u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax));
        }
    }
    if __cpuid(1).ecx & HYPERVISOR_PRESENT != 0 && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let khz = __cpuid(0x4000_0010).eax;
        return (khz != 0).then(|| u64::from(khz) * 1000);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_measured_frequency_tells_the_time() {
        let frequency = Calibration::start().finish();
        let (tsc, at) = (host_tsc(), Instant::now());
        std::thread::sleep(Duration::from_millis(30));
        let ticks = host_tsc() - tsc;
        let real = at.elapsed();
        let told = frequency.duration(ticks);
        let error = real.abs_diff(told);
        assert!(error < Duration::from_millis(1), "{frequency:?}: {told:?} instead of {real:?}");
    }

    proptest! {
        #[test]
        fn pvclock_scale_agrees_with_exact_arithmetic(hz in 1_000_000_u64..20_000_000_000, ticks in 0_u64..1 << 44) {
            let frequency = TscFrequency::from_hz(hz);
            let (factor, shift) = frequency.pvclock_scale();
            let shifted = if shift >= 0 { u128::from(ticks) << shift } else { u128::from(ticks) >> -shift };
            let guest = (shifted * u128::from(factor)) >> 32;
            let exact = u128::from(ticks) * 1_000_000_000 / u128::from(hz);
            // One part in 2^31 from the factor, and what the right shift drops.
            let slack = exact / (1 << 30) + 64;
            prop_assert!(guest.abs_diff(exact) <= slack, "{guest} for {exact}");
        }

        #[test]
        fn ticks_and_nanos_are_inverse(hz in 1_000_000_u64..10_000_000_000, nanos in 0_u64..1 << 50) {
            let frequency = TscFrequency::from_hz(hz);
            let back = frequency.nanos(frequency.ticks(nanos));
            prop_assert!(nanos - back <= 1 + 1_000_000_000 / hz, "{back} for {nanos}");
        }
    }
}
