//! KVM: interrupts are native; clock, delays and locks are not.
//!
//! Under hardware virtualization `cli` and `sti` cost what they always did, so KVM's
//! guests leave the `irq` family alone. They skip I/O delays, read the time from a page
//! the host keeps up to date, and tell the host when they unlock what a sleeping CPU
//! waits for.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

use crate::families::types::Lock;
use crate::families::{cpu, lock, time};
use crate::pointer::nothing;
use crate::{BindError, Binding, Bindings, CalleeSave, Plain, callee_save};

/// CPUID leaf with KVM's signature.
pub const SIGNATURE_LEAF: u32 = 0x4000_0000;
/// CPUID leaf with its features, in EAX.
pub const FEATURES_LEAF: u32 = 0x4000_0001;

/// Whether the registers of [`SIGNATURE_LEAF`] are KVM's.
#[must_use]
pub const fn is_kvm(ebx: u32, ecx: u32, edx: u32) -> bool {
    // "KVMK" "VMKV" "M\0\0\0"
    ebx == 0x4b4d_564b && ecx == 0x564b_4d56 && edx == 0x4d
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

impl ClockPage {
    /// The time when the counter shows what `tsc` reads, in nanoseconds.
    ///
    /// `tsc` is called between two looks at the version, and again if it changed.
    pub fn nanoseconds(&self, mut tsc: impl FnMut() -> u64) -> u64 {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let shift = self.shift_and_flags.load(Ordering::Relaxed) as u8 as i8;
            let mul = self.tsc_to_system_mul.load(Ordering::Relaxed);
            let since = tsc().wrapping_sub(self.tsc_timestamp.load(Ordering::Relaxed));
            let base = self.system_time.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            if version & 1 == 0 && self.version.load(Ordering::Relaxed) == version {
                return base.wrapping_add(scale(since, shift, mul));
            }
            core::hint::spin_loop();
        }
    }
}

fn scale(ticks: u64, shift: i8, mul: u32) -> u64 {
    let distance = u32::from(shift.unsigned_abs());
    let shifted = if shift < 0 {
        ticks.checked_shr(distance).unwrap_or(0)
    } else {
        ticks.checked_shl(distance).unwrap_or(0)
    };
    ((u128::from(shifted) * u128::from(mul)) >> 32) as u64
}

static CLOCK: AtomicPtr<ClockPage> = AtomicPtr::new(core::ptr::null_mut());
static KICK: AtomicPtr<()> = AtomicPtr::new(nothing as *mut ());

unsafe extern "sysv64" fn sched_clock() -> u64 {
    let page = CLOCK.load(Ordering::Acquire);
    // SAFETY: null, or the page that `bind_clock`'s caller promised for good.
    let page = unsafe { page.as_ref() };
    page.map_or(0, |page| {
        // SAFETY: every x86-64 CPU has it.
        page.nanoseconds(|| unsafe { core::arch::x86_64::_rdtsc() })
    })
}

/// The lock's byte while somebody sleeps for it.
pub const SLEEPER: u8 = 3;

/// Unlocks a lock with a sleeper, and wakes that one.
#[callee_save]
unsafe fn unlock_slow(lock: *const Lock) {
    // SAFETY: the caller of the op passes a lock.
    let byte = &unsafe { &*lock }.0;
    byte.store(0, Ordering::Release);
    // SAFETY: only functions of this type are ever stored there.
    let kick = unsafe {
        core::mem::transmute::<*mut (), extern "sysv64" fn(*const Lock)>(
            KICK.load(Ordering::Acquire),
        )
    };
    kick(lock);
}

/// Unlocks. One push instead of a thunk's eight, because that is what is needed.
#[unsafe(naked)]
unsafe extern "sysv64" fn spin_unlock(lock: *const Lock) {
    naked_asm!(
        "endbr64",
        "push rdx",
        "xor edx, edx",
        "mov eax, 1",
        "lock cmpxchg [rdi], dl",
        "pop rdx",
        "jne 2f",
        "ret",
        "2:",
        "jmp {slow}",
        slow = sym unlock_slow::thunk,
    )
}

/// No I/O delay: there is no slow bus.
///
/// # Errors
/// When it is bound already.
pub fn bind_cpu(bindings: &mut Bindings<cpu::Family>) -> Result<(), BindError> {
    bindings.bind(cpu::op::IoDelay, Binding::<Plain<_>>::nop())?;
    Ok(())
}

/// The scheduler's clock, from a page that the host writes.
///
/// # Errors
/// When it is bound already.
pub fn bind_clock(
    bindings: &mut Bindings<time::Family>,
    page: &'static ClockPage,
) -> Result<(), BindError> {
    let clock: Plain<unsafe extern "sysv64" fn() -> u64> = Plain::new(sched_clock);
    bindings.bind(time::op::SchedClock, Binding::call(clock))?;
    CLOCK.store(core::ptr::from_ref(page).cast_mut(), Ordering::Release);
    Ok(())
}

/// Unlocking, with a `kick` for whoever sleeps on the lock (its byte is [`SLEEPER`]).
///
/// # Errors
/// When it is bound already.
pub fn bind_lock(
    bindings: &mut Bindings<lock::Family>,
    kick: extern "sysv64" fn(*const Lock),
) -> Result<(), BindError> {
    // SAFETY: naked, and keeps all but RAX, directly or through its thunk.
    let unlock: CalleeSave<unsafe extern "sysv64" fn(*const Lock)> =
        unsafe { CalleeSave::promise(spin_unlock) };
    bindings.bind(lock::op::SpinUnlock, Binding::call(unlock))?;
    KICK.store(kick as *mut (), Ordering::Release);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe;
    use core::sync::atomic::AtomicUsize;

    #[test]
    fn clock_scales_and_waits_for_the_writer() {
        let page = ClockPage::default();
        page.system_time.store(1000, Ordering::Relaxed);
        page.tsc_timestamp.store(500, Ordering::Relaxed);
        page.tsc_to_system_mul.store(1 << 31, Ordering::Relaxed);
        assert_eq!(page.nanoseconds(|| 700), 1100);
        page.shift_and_flags.store(2, Ordering::Relaxed);
        assert_eq!(page.nanoseconds(|| 700), 1400);
        page.shift_and_flags.store(u32::from((-1i8) as u8), Ordering::Relaxed);
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
    fn unlock_kicks_only_sleepers_and_keeps_its_promise() {
        static KICKED: AtomicUsize = AtomicUsize::new(0);
        extern "sysv64" fn kick(_lock: *const Lock) {
            KICKED.fetch_add(1, Ordering::SeqCst);
        }
        let mut bindings = Bindings::new("kvm");
        bind_lock(&mut bindings, kick).expect("once");
        for (byte, kicks) in [(1, 0), (SLEEPER, 1)] {
            let lock = Lock::default();
            lock.0.store(byte, Ordering::SeqCst);
            // SAFETY: a lock of our own.
            unsafe {
                let address = (&raw const lock).addr();
                probe::keeps_promise(spin_unlock as *const (), &[address]).expect("keeps it");
            }
            assert_eq!(lock.0.load(Ordering::SeqCst), 0);
            assert_eq!(KICKED.load(Ordering::SeqCst), kicks);
        }
    }
}
