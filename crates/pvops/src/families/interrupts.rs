//! The interrupt flag.

crate::family! {
    /// Masking interrupts. Flags words are RFLAGS; only bit 9 (IF, 0x200) means anything.
    ///
    /// Sites reserve ten bytes where a backend's store-immediate needs them.
    pub mod irq {
        use crate::backend::native;
        use crate::Binding;
        /// Sets up the interrupt controllers.
        direct unsafe fn init_irq();
        /// The flags, for [`restore_fl`].
        callee_save unsafe fn save_fl() -> usize = native::SAVE_FL;
        /// Sets the interrupt flag to what `flags` says.
        callee_save unsafe fn restore_fl(flags: usize) = native::RESTORE_FL;
        /// Masks interrupts.
        callee_save(room = 10) unsafe fn irq_disable() = native::IRQ_DISABLE;
        /// Unmasks interrupts; pending ones are delivered.
        callee_save unsafe fn irq_enable() = native::IRQ_ENABLE;
        /// Unmasks interrupts and waits for one, with no gap in between.
        plain unsafe fn safe_halt() = native::SAFE_HALT;
        /// Waits for an interrupt.
        plain unsafe fn halt() = native::HALT;
        /// Makes a hypervisor's exception frame look like the CPU's.
        callee_save unsafe fn adjust_exception_frame() = Binding::<crate::CalleeSave<_>>::nop();
    }
}
