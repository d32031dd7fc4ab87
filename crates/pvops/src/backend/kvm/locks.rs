//! Spin locks whose waiters sleep: where a holder may be off its CPU, spinning is waste.
//!
//! The lock's byte is 1 while it is held and nobody sleeps, [`SLEEPER`] while somebody may.
//! Who waits too long exchanges it for the latter and halts; who unlocks a byte with a
//! sleeper wakes one, and that one takes the lock as [`SLEEPER`] again, because it cannot
//! know whether it was the last. No op may turn a [`SLEEPER`] into 1: the native ones
//! would, so all that take the lock are replaced together.

use core::arch::naked_asm;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicU8, Ordering};

use super::Features;
use crate::backend::installed::Installed;
use crate::families::lock;
use crate::families::types::Lock;
use crate::{BindError, Binding, Bindings, CalleeSave, Plain, callee_save};

/// The lock's byte while somebody sleeps for it.
pub const SLEEPER: u8 = 3;

/// Looks at a held lock before going to sleep for it.
const PATIENCE: u32 = 1 << 8;

/// How CPUs sleep for a lock and are woken.
#[derive(Debug)]
pub struct Sleep {
    /// Halts until the next [`kick`](Self::kick) or interrupt, unless the byte is not
    /// [`SLEEPER`] any more. A kick between the look and the halt must not be lost: KVM's
    /// halt returns at once then.
    pub wait: fn(&Lock),
    /// Wakes one that sleeps for the lock (hypercall `KICK_CPU`). Called by whoever
    /// unlocks, after the byte was cleared.
    pub kick: fn(&Lock),
}

static SLEEP: Installed<Sleep> = Installed::empty();

fn try_take(byte: &AtomicU8) -> bool {
    byte.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
}

unsafe extern "sysv64" fn spin_lock(lock: *const Lock) {
    // SAFETY: the caller passes a lock.
    let lock = unsafe { &*lock };
    for _ in 0..PATIENCE {
        if lock.0.load(Ordering::Relaxed) == 0 && try_take(&lock.0) {
            return;
        }
        spin_loop();
    }
    while lock.0.swap(SLEEPER, Ordering::Acquire) != 0 {
        match SLEEP.get() {
            Some(sleep) => (sleep.wait)(lock),
            None => spin_loop(),
        }
    }
}

unsafe extern "sysv64" fn spin_lock_flags(lock: *const Lock, _flags: usize) {
    // SAFETY: passed on.
    unsafe { spin_lock(lock) }
}

unsafe extern "sysv64" fn spin_trylock(lock: *const Lock) -> i32 {
    // SAFETY: the caller passes a lock.
    i32::from(try_take(&unsafe { &*lock }.0))
}

unsafe extern "sysv64" fn spin_is_contended(lock: *const Lock) -> i32 {
    // SAFETY: the caller passes a lock.
    i32::from(unsafe { &*lock }.0.load(Ordering::Relaxed) == SLEEPER)
}

/// Unlocks a lock with a sleeper, and wakes that one.
#[callee_save]
unsafe fn unlock_slow(lock: *const Lock) {
    // SAFETY: the caller of the op passes a lock.
    let lock = unsafe { &*lock };
    lock.0.store(0, Ordering::Release);
    if let Some(sleep) = SLEEP.get() {
        (sleep.kick)(lock);
    }
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

/// Locks whose waiters sleep, if the host wakes them.
///
/// # Errors
/// When one of the ops is bound already.
pub fn bind_locks(
    bindings: &mut Bindings<lock::Family>,
    host: Features,
    sleep: &'static Sleep,
) -> Result<(), BindError> {
    type Of<R> = Plain<unsafe extern "sysv64" fn(*const Lock) -> R>;
    if !host.has(Features::UNHALT) {
        return Ok(());
    }
    // SAFETY: naked, and keeps all but RAX, directly or through its thunk.
    let unlock: CalleeSave<unsafe extern "sysv64" fn(*const Lock)> =
        unsafe { CalleeSave::promise(spin_unlock) };
    let flags: Plain<unsafe extern "sysv64" fn(*const Lock, usize)> = Plain::new(spin_lock_flags);
    let (take, attempt, contended): (Of<()>, Of<i32>, Of<i32>) =
        (Plain::new(spin_lock), Plain::new(spin_trylock), Plain::new(spin_is_contended));
    bindings
        .bind(lock::op::SpinLock, Binding::call(take))?
        .bind(lock::op::SpinLockFlags, Binding::call(flags))?
        .bind(lock::op::SpinTrylock, Binding::call(attempt))?
        .bind(lock::op::SpinIsContended, Binding::call(contended))?
        .bind(lock::op::SpinUnlock, Binding::call(unlock))?;
    SLEEP.set(sleep);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe;
    use core::sync::atomic::AtomicUsize;

    #[test]
    fn unlock_kicks_only_sleepers_and_keeps_its_promise() {
        static KICKED: AtomicUsize = AtomicUsize::new(0);
        static SLEEP: Sleep = Sleep {
            wait: |_| (),
            kick: |_| {
                KICKED.fetch_add(1, Ordering::SeqCst);
            },
        };
        let mut bindings = Bindings::new("kvm");
        bind_locks(&mut bindings, Features::UNHALT, &SLEEP).expect("once");
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
