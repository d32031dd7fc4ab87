//! Control registers, descriptor tables, counters, and the ways back to user mode.

crate::family! {
    /// The CPU's privileged state.
    pub mod cpu {
        use crate::backend::native;
        use crate::families::types::{TablePointer, Thread, Tss};
        use crate::Binding;
        /// Reads DR0 to DR7.
        plain unsafe fn get_debugreg(number: u32) -> u64 = native::GET_DEBUGREG;
        /// Writes DR0 to DR7.
        plain unsafe fn set_debugreg(number: u32, value: u64) = native::SET_DEBUGREG;
        /// Clears CR0.TS.
        plain unsafe fn clts() = native::CLTS;
        /// Writes the caches back.
        plain unsafe fn wbinvd() = native::WBINVD;
        /// Reads CR0.
        plain unsafe fn read_cr0() -> u64 = native::READ_CR0;
        /// Writes CR0.
        plain unsafe fn write_cr0(value: u64) = native::WRITE_CR0;
        /// Reads CR4.
        plain unsafe fn read_cr4() -> u64 = native::READ_CR4;
        /// Reads CR4 where it exists: always, in 64-bit mode.
        plain unsafe fn read_cr4_safe() -> u64 = native::READ_CR4;
        /// Writes CR4.
        plain unsafe fn write_cr4(value: u64) = native::WRITE_CR4;
        /// Reads the task priority.
        plain unsafe fn read_cr8() -> u64 = native::READ_CR8;
        /// Writes the task priority.
        plain unsafe fn write_cr8(value: u64) = native::WRITE_CR8;
        /// Loads the task register.
        plain unsafe fn load_tr_desc(selector: u16) = native::LOAD_TR_DESC;
        /// Reads the task register.
        plain unsafe fn store_tr() -> u64 = native::STORE_TR;
        /// Loads the GDT register.
        plain unsafe fn load_gdt(table: *const TablePointer) = native::LOAD_GDT;
        /// Loads the IDT register.
        plain unsafe fn load_idt(table: *const TablePointer) = native::LOAD_IDT;
        /// Reads the GDT register.
        plain unsafe fn store_gdt(table: *mut TablePointer) = native::STORE_GDT;
        /// Reads the IDT register.
        plain unsafe fn store_idt(table: *mut TablePointer) = native::STORE_IDT;
        /// Loads an LDT of that many entries.
        plain unsafe fn set_ldt(table: *const u64, entries: u32);
        /// The pages become an LDT.
        plain unsafe fn alloc_ldt(table: *mut u64, entries: u32) = Binding::<crate::Plain<_>>::nop();
        /// The pages are no LDT any more.
        plain unsafe fn free_ldt(table: *mut u64, entries: u32) = Binding::<crate::Plain<_>>::nop();
        /// Loads a thread's TLS descriptors.
        plain unsafe fn load_tls(thread: *const Thread, cpu: u32);
        /// Loads the user's GS selector.
        plain unsafe fn load_gs_index(selector: u32) = native::LOAD_GS_INDEX;
        /// Writes an LDT entry.
        plain unsafe fn write_ldt_entry(table: *mut u64, index: usize, entry: *const u64)
            = native::WRITE_GDT_ENTRY;
        /// Writes a GDT entry of a descriptor type.
        plain unsafe fn write_gdt_entry(table: *mut u64, index: usize, entry: *const u64, kind: u32)
            = native::WRITE_TYPED_GDT_ENTRY;
        /// Writes an IDT entry (16 bytes).
        plain unsafe fn write_idt_entry(table: *mut u64, index: usize, entry: *const u64)
            = native::WRITE_IDT_ENTRY;
        /// Sets the stack for entries from user mode.
        plain unsafe fn load_sp0(tss: *mut Tss, stack: u64) = native::LOAD_SP0;
        /// Sets RFLAGS.IOPL, bits 13 and 12 of the mask.
        plain unsafe fn set_iopl_mask(mask: u32) = native::SET_IOPL_MASK;
        /// Waits for slow devices.
        direct unsafe fn io_delay() = native::IO_DELAY;
        /// CPUID: leaf and subleaf in through `eax` and `ecx`, all four out.
        plain unsafe fn cpuid(eax: *mut u32, ebx: *mut u32, ecx: *mut u32, edx: *mut u32)
            = native::CPUID;
        /// Reads an MSR. Native code reports no error: a fault is the kernel's to fix up.
        plain unsafe fn read_msr(msr: u32, error: *mut i32) -> u64 = native::READ_MSR;
        /// Reads an MSR with AMD's pass key.
        plain unsafe fn read_msr_amd(msr: u32, error: *mut i32) -> u64 = native::READ_MSR_AMD;
        /// Writes an MSR: 0, or an error.
        plain unsafe fn write_msr(msr: u32, low: u32, high: u32) -> i32 = native::WRITE_MSR;
        /// The time-stamp counter.
        plain fn read_tsc() -> u64 = native::READ_TSC;
        /// A performance counter.
        plain unsafe fn read_pmc(counter: u32) -> u64 = native::READ_PMC;
        /// The time-stamp counter and `IA32_TSC_AUX`.
        plain unsafe fn read_tscp(aux: *mut u32) -> u64 = native::READ_TSCP;
        /// Unmasks interrupts and leaves by SYSEXIT.
        jump unsafe fn irq_enable_sysexit() -> ! = native::IRQ_ENABLE_SYSEXIT;
        /// Leaves to 64-bit user code by SYSRET.
        jump unsafe fn usergs_sysret64() -> ! = native::USERGS_SYSRET64;
        /// Leaves to 32-bit user code by SYSRET.
        jump unsafe fn usergs_sysret32() -> ! = native::USERGS_SYSRET32;
        /// Leaves by IRET.
        jump unsafe fn iret() -> ! = native::IRET;
        /// Exchanges the GS bases.
        callee_save unsafe fn swapgs() = native::SWAPGS;
        /// Changes of CPU state may wait from here on,
        plain unsafe fn start_context_switch() = Binding::<crate::Plain<_>>::nop();
        /// and must be done here.
        plain unsafe fn end_context_switch() = Binding::<crate::Plain<_>>::nop();
    }
}
