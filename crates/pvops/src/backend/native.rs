//! Bare hardware: what each op was before it became one.
//!
//! Single instructions are given twice: as a naked function, which unpatched sites call,
//! and as the bytes that replace the call. A test compares the two.

use core::arch::{asm, naked_asm};
use core::hint::spin_loop;
use core::sync::atomic::Ordering;

use crate::binding::{Binding, Code};
use crate::convention::{Gpr, RegSet};
use crate::families::types::{Lock, Pgd, Pmd, Pte, Pud, TablePointer, Tss};
use crate::pointer::{CalleeSave, JumpTarget, Plain};

/// One naked function with its template, for the test that compares them.
#[derive(Debug)]
#[cfg_attr(not(test), allow(dead_code))]
struct Twin {
    name: &'static str,
    function: *const (),
    template: &'static [u8],
}

macro_rules! pointer {
    (CalleeSave, $f:expr) => {
        CalleeSave::promise($f)
    };
    (Plain, $f:expr) => {
        Plain::new($f)
    };
    (JumpTarget, $f:expr) => {
        JumpTarget::new($f)
    };
}

/// `CONST = Convention function(arguments) -> result: instructions; bytes; registers;`
macro_rules! instructions {
    ($($(#[$doc:meta])* $binding:ident = $wrapper:ident $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?:
        $($text:literal)+; [$($byte:literal)+]; {$($reg:ident)*};)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// The instruction's own: ring 0, and what it does to the machine is meant.
            #[unsafe(naked)]
            pub unsafe extern "sysv64" fn $name($($arg: $ty),*) $(-> $ret)? {
                naked_asm!("endbr64", $($text,)+ "ret")
            }

            $(#[$doc])*
            pub const $binding: Binding<$wrapper<unsafe extern "sysv64" fn($($ty),*) $(-> $ret)?>> = {
                let code = Code {
                    bytes: &[$($byte),+],
                    clobbers: RegSet::of(&[$(Gpr::$reg),*]),
                    fixups: &[],
                };
                // SAFETY: the same instructions as the function's, which the test checks; naked,
                // and changing the return register only (or never coming back).
                unsafe { Binding::inline(pointer!($wrapper, $name), code) }
            };
        )*
        #[cfg_attr(not(test), allow(dead_code))]
        const TWINS: &[Twin] = &[$(Twin {
            name: stringify!($name),
            function: $name as *const (),
            template: &[$($byte),+],
        }),*];
    };
}

instructions! {
    /// `pushf; pop`
    SAVE_FL = CalleeSave save_fl() -> usize: "pushfq" "pop rax"; [0x9c 0x58]; {Rax};
    /// `push; popf`
    RESTORE_FL = CalleeSave restore_fl(flags: usize): "push rdi" "popfq"; [0x57 0x9d]; {};
    /// `cli`
    IRQ_DISABLE = CalleeSave irq_disable(): "cli"; [0xfa]; {};
    /// `sti`
    IRQ_ENABLE = CalleeSave irq_enable(): "sti"; [0xfb]; {};
    /// `sti; hlt`
    SAFE_HALT = Plain safe_halt(): "sti" "hlt"; [0xfb 0xf4]; {};
    /// `hlt`
    HALT = Plain halt(): "hlt"; [0xf4]; {};
    /// `clts`
    CLTS = Plain clts(): "clts"; [0x0f 0x06]; {};
    /// `wbinvd`
    WBINVD = Plain wbinvd(): "wbinvd"; [0x0f 0x09]; {};
    /// `mov rax, cr0`
    READ_CR0 = Plain read_cr0() -> u64: "mov rax, cr0"; [0x0f 0x20 0xc0]; {Rax};
    /// `mov cr0, rdi`
    WRITE_CR0 = Plain write_cr0(value: u64): "mov cr0, rdi"; [0x0f 0x22 0xc7]; {};
    /// `mov rax, cr4`
    READ_CR4 = Plain read_cr4() -> u64: "mov rax, cr4"; [0x0f 0x20 0xe0]; {Rax};
    /// `mov cr4, rdi`
    WRITE_CR4 = Plain write_cr4(value: u64): "mov cr4, rdi"; [0x0f 0x22 0xe7]; {};
    /// `mov rax, cr8`
    READ_CR8 = Plain read_cr8() -> u64: "mov rax, cr8"; [0x44 0x0f 0x20 0xc0]; {Rax};
    /// `mov cr8, rdi`
    WRITE_CR8 = Plain write_cr8(value: u64): "mov cr8, rdi"; [0x44 0x0f 0x22 0xc7]; {};
    /// `mov rax, cr2`
    READ_CR2 = CalleeSave read_cr2() -> u64: "mov rax, cr2"; [0x0f 0x20 0xd0]; {Rax};
    /// `mov cr2, rdi`
    WRITE_CR2 = Plain write_cr2(value: u64): "mov cr2, rdi"; [0x0f 0x22 0xd7]; {};
    /// `mov rax, cr3`
    READ_CR3 = Plain read_cr3() -> u64: "mov rax, cr3"; [0x0f 0x20 0xd8]; {Rax};
    /// `mov cr3, rdi`
    WRITE_CR3 = Plain write_cr3(value: u64): "mov cr3, rdi"; [0x0f 0x22 0xdf]; {};
    /// CR3 onto itself.
    FLUSH_TLB_USER = Plain flush_tlb_user(): "mov rax, cr3" "mov cr3, rax";
        [0x0f 0x20 0xd8 0x0f 0x22 0xd8]; {Rax};
    /// `invlpg [rdi]`
    FLUSH_TLB_SINGLE = Plain flush_tlb_single(address: usize): "invlpg [rdi]"; [0x0f 0x01 0x3f]; {};
    /// CR4.PGE off and on: global entries go too.
    FLUSH_TLB_KERNEL = Plain flush_tlb_kernel():
        "mov rax, cr4" "mov rcx, rax" "and cl, 0x7f" "mov cr4, rcx" "mov cr4, rax";
        [0x0f 0x20 0xe0 0x48 0x89 0xc1 0x80 0xe1 0x7f 0x0f 0x22 0xe1 0x0f 0x22 0xe0]; {Rax Rcx};
    /// `ltr di`
    LOAD_TR_DESC = Plain load_tr_desc(selector: u16): "ltr di"; [0x0f 0x00 0xdf]; {};
    /// `str eax`
    STORE_TR = Plain store_tr() -> u64: "str eax"; [0x0f 0x00 0xc8]; {Rax};
    /// `lgdt [rdi]`
    LOAD_GDT = Plain load_gdt(table: *const TablePointer): "lgdt [rdi]"; [0x0f 0x01 0x17]; {};
    /// `lidt [rdi]`
    LOAD_IDT = Plain load_idt(table: *const TablePointer): "lidt [rdi]"; [0x0f 0x01 0x1f]; {};
    /// `sgdt [rdi]`
    STORE_GDT = Plain store_gdt(table: *mut TablePointer): "sgdt [rdi]"; [0x0f 0x01 0x07]; {};
    /// `sidt [rdi]`
    STORE_IDT = Plain store_idt(table: *mut TablePointer): "sidt [rdi]"; [0x0f 0x01 0x0f]; {};
    /// `mov [tss.rsp0], rsi`
    LOAD_SP0 = Plain load_sp0(tss: *mut Tss, stack: u64): "mov [rdi + 4], rsi"; [0x48 0x89 0x77 0x04]; {};
    /// `out 0x80, al`: a microsecond, on real hardware.
    IO_DELAY = Plain io_delay(): "out 0x80, al"; [0xe6 0x80]; {};
    /// `swapgs`
    SWAPGS = CalleeSave swapgs(): "swapgs"; [0x0f 0x01 0xf8]; {};
    /// `rdpmc`
    READ_PMC = Plain read_pmc(counter: u32) -> u64: "mov ecx, edi" "rdpmc" "shl rdx, 32" "or rax, rdx";
        [0x89 0xf9 0x0f 0x33 0x48 0xc1 0xe2 0x20 0x48 0x09 0xd0]; {Rax Rcx Rdx};
    /// A store.
    SET_PTE = Plain set_pte(entry: *mut Pte, value: Pte): "mov [rdi], rsi"; [0x48 0x89 0x37]; {};
    /// A store.
    SET_PMD = Plain set_pmd(entry: *mut Pmd, value: Pmd): "mov [rdi], rsi"; [0x48 0x89 0x37]; {};
    /// A store.
    SET_PUD = Plain set_pud(entry: *mut Pud, value: Pud): "mov [rdi], rsi"; [0x48 0x89 0x37]; {};
    /// A store.
    SET_PGD = Plain set_pgd(entry: *mut Pgd, value: Pgd): "mov [rdi], rsi"; [0x48 0x89 0x37]; {};
    /// A store.
    SET_PTE_AT = Plain set_pte_at(mm: *mut crate::families::types::Mm, address: usize, entry: *mut Pte, value: Pte):
        "mov [rdx], rcx"; [0x48 0x89 0x0a]; {};
    /// A store of zero.
    PTE_CLEAR = Plain pte_clear(mm: *mut crate::families::types::Mm, address: usize, entry: *mut Pte):
        "xor eax, eax" "mov [rdx], rax"; [0x31 0xc0 0x48 0x89 0x02]; {Rax};
    /// A store of zero.
    PMD_CLEAR = Plain pmd_clear(entry: *mut Pmd): "xor eax, eax" "mov [rdi], rax"; [0x31 0xc0 0x48 0x89 0x07]; {Rax};
    /// An exchange with zero.
    PTEP_MODIFY_PROT_START = Plain ptep_modify_prot_start(mm: *mut crate::families::types::Mm, address: usize, entry: *mut Pte) -> Pte:
        "xor eax, eax" "xchg [rdx], rax"; [0x31 0xc0 0x48 0x87 0x02]; {Rax};
    /// Nothing can go wrong.
    PGD_ALLOC = Plain pgd_alloc(mm: *mut crate::families::types::Mm) -> i32: "xor eax, eax"; [0x31 0xc0]; {Rax};
    /// A store of zero into the lock's byte.
    SPIN_UNLOCK = CalleeSave spin_unlock(lock: *const Lock): "mov byte ptr [rdi], 0"; [0xc6 0x07 0x00]; {};
    /// A real CPU is never preempted.
    VCPU_IS_PREEMPTED = CalleeSave vcpu_is_preempted(cpu: u32) -> i32: "xor eax, eax"; [0x31 0xc0]; {Rax};
    /// From a real CPU nobody steals.
    STEAL_CLOCK = Plain steal_clock(cpu: u32) -> u64: "xor eax, eax"; [0x31 0xc0]; {Rax};
    /// `iretq`
    IRET = JumpTarget iret() -> !: "iretq"; [0x48 0xcf]; {};
    /// `swapgs; sysretq`
    USERGS_SYSRET64 = JumpTarget usergs_sysret64() -> !: "swapgs" "sysretq"; [0x0f 0x01 0xf8 0x48 0x0f 0x07]; {};
    /// `swapgs; sysretl`
    USERGS_SYSRET32 = JumpTarget usergs_sysret32() -> !: "swapgs" "sysret"; [0x0f 0x01 0xf8 0x0f 0x07]; {};
    /// `swapgs; sti; sysexit`
    IRQ_ENABLE_SYSEXIT = JumpTarget irq_enable_sysexit() -> !: "swapgs" "sti" "sysexit"; [0x0f 0x01 0xf8 0xfb 0x0f 0x35]; {};
}

macro_rules! identities {
    ($($name:ident: $from:ty => $to:ty;)*) => {$(
        /// Entries and values are the same words.
        pub const $name: Binding<CalleeSave<extern "sysv64" fn($from) -> $to>> = {
            let same = crate::pointer::same as extern "sysv64" fn(usize) -> usize;
            // SAFETY: both types are one word without forbidden values, so the function
            // that returns its word serves both ways; it changes RAX only.
            let pointer = unsafe {
                CalleeSave::promise(core::mem::transmute::<
                    extern "sysv64" fn(usize) -> usize,
                    extern "sysv64" fn($from) -> $to,
                >(same))
            };
            let code = Code { bytes: &[0x48, 0x89, 0xf8], clobbers: RegSet::of(&[Gpr::Rax]), fixups: &[] };
            // SAFETY: mov rax, rdi: the function's own instruction.
            unsafe { Binding::inline(pointer, code) }
        };
    )*};
}

identities! {
    PTE_VAL: Pte => u64;
    MAKE_PTE: u64 => Pte;
    PMD_VAL: Pmd => u64;
    MAKE_PMD: u64 => Pmd;
    PUD_VAL: Pud => u64;
    MAKE_PUD: u64 => Pud;
    PGD_VAL: Pgd => u64;
    MAKE_PGD: u64 => Pgd;
}

/// Functions too long for any site: called.
macro_rules! called {
    ($($(#[$doc:meta])* $binding:ident = $name:ident: $ty:ty;)*) => {$(
        $(#[$doc])*
        pub const $binding: Binding<Plain<$ty>> = Binding::call(Plain::new($name));
    )*};
}

called! {
    /// Reads a debug register.
    GET_DEBUGREG = get_debugreg: unsafe extern "sysv64" fn(u32) -> u64;
    /// Writes a debug register.
    SET_DEBUGREG = set_debugreg: unsafe extern "sysv64" fn(u32, u64);
    /// Loads GS behind the kernel's back.
    LOAD_GS_INDEX = load_gs_index: unsafe extern "sysv64" fn(u32);
    /// Copies eight bytes.
    WRITE_GDT_ENTRY = write_gdt_entry: unsafe extern "sysv64" fn(*mut u64, usize, *const u64);
    /// Copies eight bytes, or sixteen for a TSS or LDT.
    WRITE_TYPED_GDT_ENTRY = write_typed_gdt_entry: unsafe extern "sysv64" fn(*mut u64, usize, *const u64, u32);
    /// Copies sixteen bytes.
    WRITE_IDT_ENTRY = write_idt_entry: unsafe extern "sysv64" fn(*mut u64, usize, *const u64);
    /// Through RFLAGS.
    SET_IOPL_MASK = set_iopl_mask: unsafe extern "sysv64" fn(u32);
    /// The instruction.
    CPUID = cpuid: unsafe extern "sysv64" fn(*mut u32, *mut u32, *mut u32, *mut u32);
    /// `rdmsr`
    READ_MSR = read_msr: unsafe extern "sysv64" fn(u32, *mut i32) -> u64;
    /// `rdmsr` with EDI as the key.
    READ_MSR_AMD = read_msr_amd: unsafe extern "sysv64" fn(u32, *mut i32) -> u64;
    /// `wrmsr`
    WRITE_MSR = write_msr: unsafe extern "sysv64" fn(u32, u32, u32) -> i32;
    /// `rdtsc`
    READ_TSC = read_tsc: extern "sysv64" fn() -> u64;
    /// `rdtscp`
    READ_TSCP = read_tscp: unsafe extern "sysv64" fn(*mut u32) -> u64;
    /// A load.
    SPIN_IS_LOCKED = spin_is_locked: unsafe extern "sysv64" fn(*const Lock) -> i32;
    /// A byte does not know who waits.
    SPIN_IS_CONTENDED = spin_is_contended: unsafe extern "sysv64" fn(*const Lock) -> i32;
    /// Exchange until it was free.
    SPIN_LOCK = spin_lock: unsafe extern "sysv64" fn(*const Lock);
    /// As `spin_lock`.
    SPIN_LOCK_FLAGS = spin_lock_flags: unsafe extern "sysv64" fn(*const Lock, usize);
    /// One exchange.
    SPIN_TRYLOCK = spin_trylock: unsafe extern "sysv64" fn(*const Lock) -> i32;
}

macro_rules! debug_registers {
    ($read:ident, $write:ident: $($number:literal $dr:literal)*) => {
        unsafe extern "sysv64" fn $read(number: u32) -> u64 {
            let value: u64;
            match number {
                // SAFETY: the caller is in ring 0 and wants this register.
                $($number => unsafe { asm!(concat!("mov {}, ", $dr), out(reg) value) },)*
                _ => value = 0,
            }
            value
        }

        unsafe extern "sysv64" fn $write(number: u32, value: u64) {
            match number {
                // SAFETY: as above.
                $($number => unsafe { asm!(concat!("mov ", $dr, ", {}"), in(reg) value) },)*
                _ => {}
            }
        }
    };
}
debug_registers!(get_debugreg, set_debugreg:
    0 "dr0" 1 "dr1" 2 "dr2" 3 "dr3" 6 "dr6" 7 "dr7");

#[unsafe(naked)]
unsafe extern "sysv64" fn load_gs_index(selector: u32) {
    // The load changes the base that is current: it must be the user's for that moment.
    naked_asm!("endbr64", "swapgs", "mov gs, edi", "mfence", "swapgs", "ret")
}

unsafe extern "sysv64" fn write_gdt_entry(table: *mut u64, index: usize, entry: *const u64) {
    // SAFETY: the caller's table has that entry.
    unsafe { table.add(index).write_volatile(entry.read()) }
}

unsafe extern "sysv64" fn write_typed_gdt_entry(
    table: *mut u64,
    index: usize,
    entry: *const u64,
    kind: u32,
) {
    /// System descriptors of 64-bit mode take two slots (SDM vol. 3, 3.5.2).
    const LDT: u32 = 2;
    const TSS: u32 = 9;
    // SAFETY: the caller's table has that entry, and the next if the type needs it.
    unsafe {
        if matches!(kind, LDT | TSS) {
            table.add(index + 1).write_volatile(entry.add(1).read());
        }
        table.add(index).write_volatile(entry.read());
    }
}

unsafe extern "sysv64" fn write_idt_entry(table: *mut u64, index: usize, entry: *const u64) {
    // SAFETY: the caller's table has that entry of two words.
    unsafe {
        table.add(2 * index + 1).write_volatile(entry.add(1).read());
        table.add(2 * index).write_volatile(entry.read());
    }
}

#[unsafe(naked)]
unsafe extern "sysv64" fn set_iopl_mask(mask: u32) {
    naked_asm!(
        "endbr64",
        "pushfq",
        "pop rax",
        "and eax, 0xffffcfff",
        "or eax, edi",
        "push rax",
        "popfq",
        "ret"
    )
}

unsafe extern "sysv64" fn cpuid(eax: *mut u32, ebx: *mut u32, ecx: *mut u32, edx: *mut u32) {
    // SAFETY: the caller passes four words.
    unsafe {
        let found = core::arch::x86_64::__cpuid_count(eax.read(), ecx.read());
        eax.write(found.eax);
        ebx.write(found.ebx);
        ecx.write(found.ecx);
        edx.write(found.edx);
    }
}

unsafe extern "sysv64" fn read_msr(msr: u32, error: *mut i32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller is in ring 0, wants this register and passes a word.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high);
        error.write(0);
    }
    u64::from(high) << 32 | u64::from(low)
}

unsafe extern "sysv64" fn read_msr_amd(msr: u32, error: *mut i32) -> u64 {
    /// What the K8 wants in EDI to let software at its hidden MSRs.
    const KEY: u32 = 0x9c5a_203a;
    let (low, high): (u32, u32);
    // SAFETY: as above.
    unsafe {
        asm!("rdmsr", in("ecx") msr, in("edi") KEY, out("eax") low, out("edx") high);
        error.write(0);
    }
    u64::from(high) << 32 | u64::from(low)
}

unsafe extern "sysv64" fn write_msr(msr: u32, low: u32, high: u32) -> i32 {
    // SAFETY: the caller is in ring 0 and means it.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high) };
    0
}

extern "sysv64" fn read_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

unsafe extern "sysv64" fn read_tscp(aux: *mut u32) -> u64 {
    // SAFETY: the caller knows the CPU has it, and passes a word.
    unsafe { core::arch::x86_64::__rdtscp(aux) }
}

unsafe extern "sysv64" fn spin_is_locked(lock: *const Lock) -> i32 {
    // SAFETY: the caller passes a lock.
    i32::from(unsafe { &*lock }.0.load(Ordering::Relaxed) != 0)
}

unsafe extern "sysv64" fn spin_is_contended(_lock: *const Lock) -> i32 {
    0
}

unsafe extern "sysv64" fn spin_lock(lock: *const Lock) {
    // SAFETY: the caller passes a lock.
    let byte = &unsafe { &*lock }.0;
    while byte.swap(1, Ordering::Acquire) != 0 {
        while byte.load(Ordering::Relaxed) != 0 {
            spin_loop();
        }
    }
}

unsafe extern "sysv64" fn spin_lock_flags(lock: *const Lock, _flags: usize) {
    // SAFETY: passed on.
    unsafe { spin_lock(lock) }
}

unsafe extern "sysv64" fn spin_trylock(lock: *const Lock) -> i32 {
    // SAFETY: the caller passes a lock.
    i32::from(unsafe { &*lock }.0.swap(1, Ordering::Acquire) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_the_functions_own_bytes() {
        const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
        for Twin { name, function, template } in TWINS {
            let expected = [&ENDBR64[..], template, &[0xc3]].concat();
            // SAFETY: text of this program, at least that long: `ret` is its last byte.
            let text =
                unsafe { core::slice::from_raw_parts(function.cast::<u8>(), expected.len()) };
            assert_eq!(text, expected, "{name}");
        }
    }

    #[test]
    fn locks_lock() {
        let lock = Lock::default();
        // SAFETY: a lock of our own, taken and given back in turn.
        unsafe {
            spin_lock(&lock);
            assert_eq!((spin_trylock(&lock), spin_is_locked(&lock)), (0, 1));
            spin_unlock(&lock);
            assert_eq!((spin_is_locked(&lock), spin_trylock(&lock)), (0, 1));
        }
    }
}
