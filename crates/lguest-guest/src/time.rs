//! Clocks and the timer.

use core::arch::x86_64::{__cpuid, _rdtsc};
use core::mem::offset_of;
use core::ptr::addr_of;
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use lguest_abi::long::shared_data::{Clock, SharedData};

use crate::hypercall::{self, Call};
use crate::{pc, trap};

/// On a PC: ticks of the TSC per millisecond, and the TSC at the start.
static KHZ: AtomicU64 = AtomicU64::new(0);
static START: AtomicU64 = AtomicU64::new(0);
/// The timer's ticks so far.
static TICKS: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds between ticks; 0: there are none.
static PERIOD: AtomicU64 = AtomicU64::new(0);

pub(crate) fn on_lguest() {}

/// The leaf in which hypervisors tell the TSC's frequency.
const TIMING_LEAF: u32 = 0x4000_0010;
/// And the one in which CPUs do: the ratio to a crystal.
const CRYSTAL_LEAF: u32 = 0x15;

pub(crate) fn on_pc() {
    let mut khz = u64::from(__cpuid(TIMING_LEAF).eax);
    if __cpuid(0x4000_0000).eax < TIMING_LEAF || khz == 0 {
        let leaf = __cpuid(CRYSTAL_LEAF);
        let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax).max(1);
        khz = if hz == 0 { 1_000_000 } else { hz / 1000 };
    }
    KHZ.store(khz, Ordering::Relaxed);
    START.store(ticks(), Ordering::Relaxed);
}

/// The TSC.
pub fn ticks() -> u64 {
    // SAFETY: it is there in every long mode.
    unsafe { _rdtsc() }
}

fn scaled(delta: u64, factor: u32, shift: i8) -> u64 {
    let delta = if shift >= 0 { delta << shift } else { delta >> -shift };
    ((u128::from(delta) * u128::from(factor)) >> 32) as u64
}

/// Nanoseconds since the start.
pub fn now() -> u64 {
    if !trap::is_lguest() {
        let khz = KHZ.load(Ordering::Relaxed).max(1);
        let since = ticks().wrapping_sub(START.load(Ordering::Relaxed));
        return (u128::from(since) * 1_000_000 / u128::from(khz)) as u64;
    }
    // SAFETY: within the shared page, which lives as long as the kernel.
    let clock = unsafe { addr_of!((*hypercall::shared()).clock) };
    loop {
        // SAFETY: as above; the host may be writing, so volatile, and again if it was.
        let Clock { version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, .. } =
            unsafe { clock.read_volatile() };
        compiler_fence(Ordering::SeqCst);
        // SAFETY: as above.
        let after = unsafe { addr_of!((*clock).version).read_volatile() };
        if version == after && version & 1 == 0 {
            let delta = ticks().wrapping_sub(tsc_timestamp);
            return system_time + scaled(delta, tsc_to_system_mul, tsc_shift);
        }
    }
}

/// Has an interrupt come on [`vector::TIMER`](trap::vector::TIMER) every so many nanoseconds;
/// 0: no more.
pub fn every(nanoseconds: u64) {
    PERIOD.store(nanoseconds, Ordering::Relaxed);
    arm(nanoseconds);
}

fn arm(nanoseconds: u64) {
    if trap::is_lguest() {
        hypercall::call(Call::SetClockevent { nanoseconds });
    } else {
        pc::apic::arm(nanoseconds, KHZ.load(Ordering::Relaxed));
    }
}

/// The timer's interrupt.
pub(crate) fn ticked() {
    TICKS.fetch_add(1, Ordering::Relaxed);
    if !trap::is_lguest() {
        pc::apic::acknowledge();
    }
    let period = PERIOD.load(Ordering::Relaxed);
    if period != 0 {
        arm(period);
    }
}

/// How often the timer has ticked.
pub fn tick_count() -> u64 {
    TICKS.load(Ordering::Relaxed)
}

const _: () = assert!(offset_of!(SharedData, clock) == 128);
