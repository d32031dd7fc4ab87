//! KVM's clock: a page per CPU, from which the time-stamp counter gives nanoseconds.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::{Features, msr};
use crate::backend::installed::Installed;
use crate::families::{apic, time};
use crate::{BindError, Binding, Bindings, Plain};

/// Reads what the host may be writing: `version` is odd while it does.
pub(super) fn consistent<T>(version: &AtomicU32, mut read: impl FnMut() -> T) -> T {
    loop {
        let before = version.load(Ordering::Acquire);
        let value = read();
        fence(Ordering::Acquire);
        if before & 1 == 0 && version.load(Ordering::Relaxed) == before {
            return value;
        }
        core::hint::spin_loop();
    }
}

/// `struct pvclock_vcpu_time_info`: how to make nanoseconds of the time-stamp counter.
#[derive(Debug, Default)]
#[repr(C)]
pub struct ClockPage {
    /// Odd while the host is writing.
    pub version: AtomicU32,
    /// Nothing.
    pub pad: AtomicU32,
    /// TSC at `system_time`.
    pub tsc_timestamp: AtomicU64,
    /// Nanoseconds at `tsc_timestamp`.
    pub system_time: AtomicU64,
    /// Nanoseconds a tick, times 2^32, after the shift.
    pub tsc_to_system_mul: AtomicU32,
    /// Low byte: ticks are shifted left by this (a signed number) first. Second: flags.
    pub shift_and_flags: AtomicU32,
}

/// In the flags of a [`ClockPage`]: all CPUs' pages tell the same time.
const STABLE: u32 = 1 << 8;

impl ClockPage {
    /// As before the host writes to it.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            version: AtomicU32::new(0),
            pad: AtomicU32::new(0),
            tsc_timestamp: AtomicU64::new(0),
            system_time: AtomicU64::new(0),
            tsc_to_system_mul: AtomicU32::new(0),
            shift_and_flags: AtomicU32::new(0),
        }
    }

    /// The time when the counter shows what `tsc` reads, in nanoseconds.
    ///
    /// `tsc` is called between two looks at the version, and again if it changed.
    pub fn nanoseconds(&self, mut tsc: impl FnMut() -> u64) -> u64 {
        consistent(&self.version, || {
            let (shift, mul) = self.rate();
            let since = tsc().wrapping_sub(self.tsc_timestamp.load(Ordering::Relaxed));
            let base = self.system_time.load(Ordering::Relaxed);
            base.wrapping_add(scale(since, shift, mul))
        })
    }

    /// The counter's rate in kHz; 0 while the host has not written the page.
    pub fn tsc_khz(&self) -> u64 {
        let (shift, mul) = consistent(&self.version, || self.rate());
        let khz = (1_000_000_u64 << 32).checked_div(u64::from(mul)).unwrap_or(0);
        // The inverse of the multiplication, and of the shift before it.
        shifted(khz, shift.saturating_neg())
    }

    fn rate(&self) -> (i8, u32) {
        let shift = self.shift_and_flags.load(Ordering::Relaxed) as u8 as i8;
        (shift, self.tsc_to_system_mul.load(Ordering::Relaxed))
    }

    fn is_stable(&self) -> bool {
        self.shift_and_flags.load(Ordering::Relaxed) & STABLE != 0
    }
}

fn shifted(value: u64, left: i8) -> u64 {
    let distance = u32::from(left.unsigned_abs());
    let moved = if left < 0 { value.checked_shr(distance) } else { value.checked_shl(distance) };
    moved.unwrap_or(0)
}

fn scale(ticks: u64, shift: i8, mul: u32) -> u64 {
    ((u128::from(shifted(ticks, shift)) * u128::from(mul)) >> 32) as u64
}

/// `struct pvclock_wall_clock`: when the host counted from, in time since 1970. Written
/// when the guest writes its address to [`msr::WALL_CLOCK`].
#[derive(Debug, Default)]
#[repr(C)]
pub struct WallClock {
    /// Odd while the host is writing.
    pub version: AtomicU32,
    /// Seconds.
    pub seconds: AtomicU32,
    /// And nanoseconds.
    pub nanoseconds: AtomicU32,
}

impl WallClock {
    /// The time of day when the system time is `now` (nanoseconds): seconds since 1970.
    pub fn at(&self, now: u64) -> u64 {
        let (seconds, nanoseconds) = consistent(&self.version, || {
            (self.seconds.load(Ordering::Relaxed), self.nanoseconds.load(Ordering::Relaxed))
        });
        let since = u128::from(nanoseconds) + u128::from(now);
        u64::from(seconds) + (since / 1_000_000_000) as u64
    }
}

/// What the clock ops need of the kernel.
#[derive(Debug)]
pub struct Clock {
    /// The page of the CPU this runs on. The kernel calls the clock ops where it stays on
    /// that CPU: page and counter belong together.
    pub page: fn() -> &'static ClockPage,
    /// Where the host shall write its time of boot.
    pub wall: &'static WallClock,
    /// The physical address of one of these.
    pub physical: fn(*const ()) -> u64,
    /// Writes a model-specific register.
    pub write_msr: fn(u32, u64),
    /// Starts the local APIC's timer of another CPU than the first: what
    /// `setup_secondary_clock` does natively.
    pub start_timer: fn(),
}

static CLOCK: Installed<Clock> = Installed::empty();
static HOST: AtomicU32 = AtomicU32::new(0);
/// The latest time that any CPU saw.
static LATEST: AtomicU64 = AtomicU64::new(0);

/// The host's clock cannot be set: Linux's number for "no such device".
pub const ENODEV: i32 = -19;

fn now(clock: &Clock) -> u64 {
    let page = (clock.page)();
    // SAFETY: every x86-64 CPU has it.
    let time = page.nanoseconds(|| unsafe { core::arch::x86_64::_rdtsc() });
    if page.is_stable() {
        return time;
    }
    // Pages of different CPUs may disagree a little; time must not go backwards for that.
    LATEST.fetch_max(time, Ordering::AcqRel).max(time)
}

unsafe extern "sysv64" fn sched_clock() -> u64 {
    CLOCK.get().map_or(0, now)
}

unsafe extern "sysv64" fn get_wallclock() -> u64 {
    CLOCK.get().map_or(0, |clock| {
        let (register, _) = registers();
        (clock.write_msr)(register, (clock.physical)(core::ptr::from_ref(clock.wall).cast()));
        clock.wall.at(now(clock))
    })
}

unsafe extern "sysv64" fn set_wallclock(_seconds: u64) -> i32 {
    ENODEV
}

unsafe extern "sysv64" fn get_tsc_khz() -> u64 {
    CLOCK.get().map_or(0, |clock| (clock.page)().tsc_khz())
}

unsafe extern "sysv64" fn setup_secondary_clock() {
    if let Some(clock) = CLOCK.get() {
        clock.register();
        (clock.start_timer)();
    }
}

/// The registers for wall clock and system time.
fn registers() -> (u32, u32) {
    if Features(HOST.load(Ordering::Acquire)).has(Features::CLOCK2) {
        (msr::WALL_CLOCK, msr::SYSTEM_TIME)
    } else {
        (msr::OLD_WALL_CLOCK, msr::OLD_SYSTEM_TIME)
    }
}

impl Clock {
    /// Tells the host where this CPU's page is. The first CPU does so by itself, after
    /// [`bind_time`]; others by `setup_secondary_clock`.
    pub fn register(&self) {
        let page = core::ptr::from_ref((self.page)());
        (self.write_msr)(registers().1, (self.physical)(page.cast()) | 1);
    }
}

fn has_clock(host: Features) -> bool {
    host.has(Features::CLOCK) || host.has(Features::CLOCK2)
}

/// The clocks, if the host has them.
///
/// # Errors
/// When one is bound already.
pub fn bind_time(
    bindings: &mut Bindings<time::Family>,
    host: Features,
    clock: &'static Clock,
) -> Result<(), BindError> {
    if has_clock(host) {
        let sched: Plain<unsafe extern "sysv64" fn() -> u64> = Plain::new(sched_clock);
        let get: Plain<unsafe extern "sysv64" fn() -> u64> = Plain::new(get_wallclock);
        let set: Plain<unsafe extern "sysv64" fn(u64) -> i32> = Plain::new(set_wallclock);
        let khz: Plain<unsafe extern "sysv64" fn() -> u64> = Plain::new(get_tsc_khz);
        bindings
            .bind(time::op::SchedClock, Binding::call(sched))?
            .bind(time::op::GetWallclock, Binding::call(get))?
            .bind(time::op::SetWallclock, Binding::call(set))?
            .bind(time::op::GetTscKhz, Binding::call(khz))?;
        install(host, clock);
    }
    Ok(())
}

/// The start of other CPUs' clocks, if the host has them.
///
/// # Errors
/// When it is bound already.
pub fn bind_apic(
    bindings: &mut Bindings<apic::Family>,
    host: Features,
    clock: &'static Clock,
) -> Result<(), BindError> {
    if has_clock(host) {
        let setup: Plain<unsafe extern "sysv64" fn()> = Plain::new(setup_secondary_clock);
        bindings.bind(apic::op::SetupSecondaryClock, Binding::call(setup))?;
        install(host, clock);
    }
    Ok(())
}

fn install(host: Features, clock: &'static Clock) {
    HOST.store(host.0, Ordering::Release);
    CLOCK.set(clock);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> ClockPage {
        let page = ClockPage::default();
        page.system_time.store(1000, Ordering::Relaxed);
        page.tsc_timestamp.store(500, Ordering::Relaxed);
        page.tsc_to_system_mul.store(1 << 31, Ordering::Relaxed);
        page
    }

    fn shift(page: &ClockPage, by: i8) {
        page.shift_and_flags.store(u32::from(by as u8), Ordering::Relaxed);
    }

    #[test]
    fn clock_scales_and_waits_for_the_writer() {
        let page = page();
        assert_eq!(page.nanoseconds(|| 700), 1100);
        shift(&page, 2);
        assert_eq!(page.nanoseconds(|| 700), 1400);
        shift(&page, -1);
        assert_eq!(page.nanoseconds(|| 700), 1050);
        // The host writes between the two looks at the version: read again.
        let mut reads = 0;
        let time = page.nanoseconds(|| {
            reads += 1;
            if reads == 1 {
                page.version.store(2, Ordering::Relaxed);
                page.system_time.store(5000, Ordering::Relaxed);
            }
            700
        });
        assert_eq!((time, reads), (5050, 2));
    }

    #[test]
    fn rate_is_the_inverse_of_the_scale() {
        let page = page();
        // Half a nanosecond a tick: 2 GHz.
        assert_eq!(page.tsc_khz(), 2_000_000);
        shift(&page, -1);
        assert_eq!(page.tsc_khz(), 4_000_000);
        shift(&page, 1);
        assert_eq!(page.tsc_khz(), 1_000_000);
        // What no host writes, but a page may hold.
        for by in [i8::MIN, i8::MAX, 64, -64] {
            shift(&page, by);
            assert_eq!(page.tsc_khz(), 0);
        }
        page.tsc_to_system_mul.store(0, Ordering::Relaxed);
        assert_eq!(page.tsc_khz(), 0);
    }

    #[test]
    fn wall_clock_carries_nanoseconds() {
        let wall = WallClock::default();
        wall.seconds.store(u32::MAX, Ordering::Relaxed);
        wall.nanoseconds.store(999_999_999, Ordering::Relaxed);
        assert_eq!(wall.at(0), u64::from(u32::MAX));
        assert_eq!(wall.at(1), u64::from(u32::MAX) + 1);
        assert_eq!(wall.at(u64::MAX), u64::from(u32::MAX) + 18_446_744_074);
    }
}
