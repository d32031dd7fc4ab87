//! Page tables and TLBs.

crate::family! {
    /// Address translation. The entry conversions (`pte_val`, `make_pte`, ...) are where
    /// a hypervisor with frame numbers of its own translates them.
    pub mod mmu {
        use crate::backend::native;
        use crate::families::types::{CpuMask, Mm, Pgd, Pmd, Pte, Pud};
        use crate::{Binding, Plain};
        /// Before the boot page tables are built.
        direct unsafe fn pagetable_setup_start(base: *mut Pgd) = Binding::<Plain<_>>::nop();
        /// After they are.
        direct unsafe fn pagetable_setup_done(base: *mut Pgd) = Binding::<Plain<_>>::nop();
        /// The address of the last page fault.
        callee_save unsafe fn read_cr2() -> u64 = native::READ_CR2;
        /// Sets it.
        plain unsafe fn write_cr2(value: u64) = native::WRITE_CR2;
        /// The top page table.
        plain unsafe fn read_cr3() -> u64 = native::READ_CR3;
        /// Sets it.
        plain unsafe fn write_cr3(value: u64) = native::WRITE_CR3;
        /// An address space takes the place of another.
        plain unsafe fn activate_mm(old: *mut Mm, new: *mut Mm) = Binding::<Plain<_>>::nop();
        /// An address space was copied.
        plain unsafe fn dup_mmap(old: *mut Mm, new: *mut Mm) = Binding::<Plain<_>>::nop();
        /// An address space ends.
        plain unsafe fn exit_mmap(mm: *mut Mm) = Binding::<Plain<_>>::nop();
        /// Drops this CPU's entries that are not global.
        plain unsafe fn flush_tlb_user() = native::FLUSH_TLB_USER;
        /// Drops all of this CPU's entries.
        plain unsafe fn flush_tlb_kernel() = native::FLUSH_TLB_KERNEL;
        /// Drops this CPU's entry for an address.
        plain unsafe fn flush_tlb_single(address: usize) = native::FLUSH_TLB_SINGLE;
        /// Drops other CPUs' entries.
        plain unsafe fn flush_tlb_others(cpus: *const CpuMask, mm: *mut Mm, address: usize);
        /// A top table comes to be: 0, or an error.
        plain unsafe fn pgd_alloc(mm: *mut Mm) -> i32 = native::PGD_ALLOC;
        /// And ends.
        plain unsafe fn pgd_free(mm: *mut Mm, pgd: *mut Pgd) = Binding::<Plain<_>>::nop();
        /// A page becomes a last-level table.
        plain unsafe fn alloc_pte(mm: *mut Mm, frame: usize) = Binding::<Plain<_>>::nop();
        /// A page becomes a second-level table.
        plain unsafe fn alloc_pmd(mm: *mut Mm, frame: usize) = Binding::<Plain<_>>::nop();
        /// A page becomes a second-level table with entries of another.
        plain unsafe fn alloc_pmd_clone(frame: usize, from: usize, start: usize, count: usize)
            = Binding::<Plain<_>>::nop();
        /// A page becomes a third-level table.
        plain unsafe fn alloc_pud(mm: *mut Mm, frame: usize) = Binding::<Plain<_>>::nop();
        /// A page is no last-level table any more.
        plain unsafe fn release_pte(frame: usize) = Binding::<Plain<_>>::nop();
        /// A page is no second-level table any more.
        plain unsafe fn release_pmd(frame: usize) = Binding::<Plain<_>>::nop();
        /// A page is no third-level table any more.
        plain unsafe fn release_pud(frame: usize) = Binding::<Plain<_>>::nop();
        /// Writes an entry.
        plain unsafe fn set_pte(entry: *mut Pte, value: Pte) = native::SET_PTE;
        /// Writes the entry that maps an address.
        plain unsafe fn set_pte_at(mm: *mut Mm, address: usize, entry: *mut Pte, value: Pte)
            = native::SET_PTE_AT;
        /// Writes an entry.
        plain unsafe fn set_pmd(entry: *mut Pmd, value: Pmd) = native::SET_PMD;
        /// Writes an entry.
        plain unsafe fn set_pud(entry: *mut Pud, value: Pud) = native::SET_PUD;
        /// Writes an entry.
        plain unsafe fn set_pgd(entry: *mut Pgd, value: Pgd) = native::SET_PGD;
        /// Writes an entry in one step.
        plain unsafe fn set_pte_atomic(entry: *mut Pte, value: Pte) = native::SET_PTE;
        /// Empties an entry.
        plain unsafe fn pte_clear(mm: *mut Mm, address: usize, entry: *mut Pte)
            = native::PTE_CLEAR;
        /// Empties an entry.
        plain unsafe fn pmd_clear(entry: *mut Pmd) = native::PMD_CLEAR;
        /// An entry was changed without an op.
        plain unsafe fn pte_update(mm: *mut Mm, address: usize, entry: *mut Pte)
            = Binding::<Plain<_>>::nop();
        /// An entry was changed; telling the hypervisor may wait for the next flush.
        plain unsafe fn pte_update_defer(mm: *mut Mm, address: usize, entry: *mut Pte)
            = Binding::<Plain<_>>::nop();
        /// Takes an entry out to change it.
        plain unsafe fn ptep_modify_prot_start(mm: *mut Mm, address: usize, entry: *mut Pte) -> Pte
            = native::PTEP_MODIFY_PROT_START;
        /// Puts it back.
        plain unsafe fn ptep_modify_prot_commit(mm: *mut Mm, address: usize, entry: *mut Pte, value: Pte)
            = native::SET_PTE_AT;
        /// The kernel's view of an entry.
        callee_save fn pte_val(entry: Pte) -> u64 = native::PTE_VAL;
        /// The CPU's view of a value.
        callee_save fn make_pte(value: u64) -> Pte = native::MAKE_PTE;
        /// The kernel's view of an entry.
        callee_save fn pmd_val(entry: Pmd) -> u64 = native::PMD_VAL;
        /// The CPU's view of a value.
        callee_save fn make_pmd(value: u64) -> Pmd = native::MAKE_PMD;
        /// The kernel's view of an entry.
        callee_save fn pud_val(entry: Pud) -> u64 = native::PUD_VAL;
        /// The CPU's view of a value.
        callee_save fn make_pud(value: u64) -> Pud = native::MAKE_PUD;
        /// The kernel's view of an entry.
        callee_save fn pgd_val(entry: Pgd) -> u64 = native::PGD_VAL;
        /// The CPU's view of a value.
        callee_save fn make_pgd(value: u64) -> Pgd = native::MAKE_PGD;
        /// Page-table writes may wait from here on,
        plain unsafe fn lazy_enter() = Binding::<Plain<_>>::nop();
        /// and must be done here.
        plain unsafe fn lazy_leave() = Binding::<Plain<_>>::nop();
        /// Points a fixed mapping at a frame.
        direct unsafe fn set_fixmap(index: u32, address: u64, protection: u64);
    }
}
