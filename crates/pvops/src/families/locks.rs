//! Spin locks, which a hypervisor wants to know of when a holder may be asleep.

crate::family! {
    /// Spin locks. The native ones are a byte, exchanged.
    pub mod lock {
        use crate::backend::native;
        use crate::families::types::Lock;
        /// Whether somebody holds it.
        plain unsafe fn spin_is_locked(lock: *const Lock) -> i32 = native::SPIN_IS_LOCKED;
        /// Whether somebody waits for it.
        plain unsafe fn spin_is_contended(lock: *const Lock) -> i32 = native::SPIN_IS_CONTENDED;
        /// Takes it.
        plain unsafe fn spin_lock(lock: *const Lock) = native::SPIN_LOCK;
        /// Takes it; interrupts may be let in while waiting if `flags` had them on.
        plain unsafe fn spin_lock_flags(lock: *const Lock, flags: usize)
            = native::SPIN_LOCK_FLAGS;
        /// Takes it if nobody has it.
        plain unsafe fn spin_trylock(lock: *const Lock) -> i32 = native::SPIN_TRYLOCK;
        /// Gives it back.
        callee_save unsafe fn spin_unlock(lock: *const Lock) = native::SPIN_UNLOCK;
        /// Whether a virtual CPU is known not to run.
        callee_save unsafe fn vcpu_is_preempted(cpu: u32) -> i32 = native::VCPU_IS_PREEMPTED;
    }
}
