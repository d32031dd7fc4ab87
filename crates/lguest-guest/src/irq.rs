//! The interrupt flag, by pvops: on lguest a word in memory, on a PC the CPU's.

use pvops::backend::IF;
use pvops::families::irq;

/// Interrupts as they were.
#[derive(Clone, Copy, Debug)]
pub struct Flags(usize);

/// Whether interrupts are on.
#[inline(always)]
pub fn enabled() -> bool {
    save().0 & IF != 0
}

/// How interrupts are, for [`restore`].
#[inline(always)]
pub fn save() -> Flags {
    // SAFETY: bound; it only reads.
    Flags(unsafe { irq::save_fl() })
}

/// Makes interrupts what they were.
#[inline(always)]
pub fn restore(flags: Flags) {
    // SAFETY: bound. Handlers may run; they are the kernel's own.
    unsafe { irq::restore_fl(flags.0) }
}

/// No interrupts from here on.
#[inline(always)]
pub fn disable() {
    // SAFETY: bound.
    unsafe { irq::irq_disable() }
}

/// Interrupts from here on, the ones that wait first.
#[inline(always)]
pub fn enable() {
    // SAFETY: as for `restore`.
    unsafe { irq::irq_enable() }
}

/// Waits for an interrupt, and has it handled; interrupts are on afterwards.
pub fn wait() {
    // SAFETY: bound.
    unsafe { irq::safe_halt() }
}

/// Does something that no interrupt may come into.
pub fn without<R>(work: impl FnOnce() -> R) -> R {
    let flags = save();
    disable();
    let result = work();
    restore(flags);
    result
}

/// A value that is used with interrupts off: the lock of a kernel with one CPU.
#[derive(Debug)]
pub struct Masked<T>(core::cell::UnsafeCell<T>);
// SAFETY: one CPU, and `with` lets nobody in between.
unsafe impl<T: Send> Sync for Masked<T> {}

impl<T> Masked<T> {
    /// Around `value`.
    pub const fn new(value: T) -> Self {
        Self(core::cell::UnsafeCell::new(value))
    }

    /// Uses the value with interrupts off. `work` must not come here again for the same
    /// value, nor switch tasks.
    pub fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: nobody else has it: see above.
        without(|| work(unsafe { &mut *self.0.get() }))
    }
}
