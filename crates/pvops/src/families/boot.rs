//! Boot, clocks and the local APIC.

crate::family! {
    /// Stages of the boot.
    pub mod init {
        use crate::Binding;
        /// Prepares the platform.
        direct unsafe fn arch_setup() = Binding::<crate::Plain<_>>::nop();
        /// The allocator works now.
        direct unsafe fn post_allocator_init() = Binding::<crate::Plain<_>>::nop();
        /// Says where the kernel runs.
        direct unsafe fn banner();
        /// Builds the map of memory; returns its source's name (a C string).
        direct unsafe fn memory_setup() -> *const u8;
    }
}

crate::family! {
    /// Clocks.
    pub mod time {
        use crate::backend::native;
        /// Chooses and starts the timers.
        direct unsafe fn time_init();
        /// The TSC's rate in kHz.
        direct unsafe fn get_tsc_khz() -> u64;
        /// Seconds since 1970.
        plain unsafe fn get_wallclock() -> u64;
        /// Sets them: 0, or an error.
        plain unsafe fn set_wallclock(seconds: u64) -> i32;
        /// The scheduler's time in nanoseconds.
        plain unsafe fn sched_clock() -> u64;
        /// Nanoseconds that a CPU was ready and a hypervisor ran something else.
        plain unsafe fn steal_clock(cpu: u32) -> u64 = native::STEAL_CLOCK;
    }
}

crate::family! {
    /// The local APIC.
    pub mod apic {
        use crate::Binding;
        /// Starts the first CPU's timer.
        plain unsafe fn setup_boot_clock() = Binding::<crate::Plain<_>>::nop();
        /// Starts another CPU's timer.
        plain unsafe fn setup_secondary_clock() = Binding::<crate::Plain<_>>::nop();
        /// Tells a hypervisor where a CPU starts.
        plain unsafe fn startup_ipi_hook(apic: u32, ip: usize, sp: usize)
            = Binding::<crate::Plain<_>>::nop();
    }
}
