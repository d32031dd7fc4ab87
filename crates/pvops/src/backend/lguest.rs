//! lguest: the interrupt flag is a word shared with the host.
//!
//! `irq_enabled` and `irq_pending` are 0 or 0x200, as IF is in RFLAGS. The guest switches
//! interrupts by storing; when it lets them in again it must look whether any came
//! meanwhile, and tell the host. (The old guest code compared the pending word with
//! itself, so to speak, and never noticed.) Store and look are one locked exchange apart:
//! the host may set the pending word from another CPU at any moment.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::IrqOps;
use crate::pointer::nothing;
use crate::{Binding, CalleeSave, Code, Fixup, Gpr, RegSet};

/// The two words of `struct lguest_data` that matter here. Aligned as the long-mode ABI
/// wants the pair; the older layouts have them anywhere.
#[derive(Debug)]
#[repr(C, align(8))]
pub struct Shared {
    /// 0x200 while the guest takes interrupts, else 0.
    pub irq_enabled: AtomicU32,
    /// 0x200 while the host has one waiting, else 0. The host's to write.
    pub irq_pending: AtomicU32,
}

/// Shared with the host: its address is what the guest tells it at initialization.
pub static SHARED: Shared =
    Shared { irq_enabled: AtomicU32::new(0), irq_pending: AtomicU32::new(0) };

/// How the guest asks for its pending interrupts: a hypercall, behind a thunk.
static SEND_INTERRUPTS: AtomicPtr<()> = AtomicPtr::new(nothing as *mut ());

/// Sets the function that makes the hypercall `SEND_INTERRUPTS`. Call it before any of the
/// ops runs.
pub fn on_pending(hypercall: CalleeSave<extern "sysv64" fn()>) {
    SEND_INTERRUPTS.store(hypercall.address().cast_mut(), Ordering::Release);
}

#[unsafe(naked)]
unsafe extern "sysv64" fn save_fl() -> usize {
    naked_asm!("endbr64", "mov eax, [rip + {shared}]", "ret", shared = sym SHARED)
}

#[unsafe(naked)]
unsafe extern "sysv64" fn irq_disable() {
    naked_asm!("endbr64", "mov dword ptr [rip + {shared}], 0", "ret", shared = sym SHARED)
}

#[unsafe(naked)]
unsafe extern "sysv64" fn irq_enable() {
    naked_asm!(
        "endbr64",
        "mov eax, 0x200",
        "xchg [rip + {shared}], eax",
        "cmp dword ptr [rip + {shared} + 4], 0",
        "jne 2f",
        "ret",
        // As if called: the stack is as the caller left it.
        "2:",
        "jmp [rip + {send}]",
        shared = sym SHARED,
        send = sym SEND_INTERRUPTS,
    )
}

#[unsafe(naked)]
unsafe extern "sysv64" fn restore_fl(flags: usize) {
    naked_asm!(
        "endbr64",
        "mov eax, edi",
        "and eax, 0x200",
        "xchg [rip + {shared}], eax",
        // Both words use the same bit: pending and now enabled?
        "mov eax, edi",
        "and eax, 0x200",
        "test [rip + {shared} + 4], eax",
        "jne 2f",
        "ret",
        "2:",
        "jmp [rip + {send}]",
        shared = sym SHARED,
        send = sym SEND_INTERRUPTS,
    )
}

const FLAG: *const () = (&raw const SHARED).cast();

/// lguest's interrupt flag. `save_fl` and `irq_disable` go in line.
pub const IRQ: IrqOps = {
    const SAVE: Code = Code {
        bytes: &[0x8b, 0x05, 0, 0, 0, 0], // mov eax, [rip + flag]
        clobbers: RegSet::of(&[Gpr::Rax]),
        fixups: &[Fixup { at: 2, end: 6, target: FLAG }],
    };
    const DISABLE: Code = Code {
        bytes: &[0xc7, 0x05, 0, 0, 0, 0, 0, 0, 0, 0], // mov dword ptr [rip + flag], 0
        clobbers: RegSet::EMPTY,
        fixups: &[Fixup { at: 2, end: 10, target: FLAG }],
    };
    // SAFETY: naked; only RAX changes; the hypercall they jump to keeps the same promise,
    // by its type. The templates are the functions' own instructions.
    unsafe {
        IrqOps {
            save_fl: Binding::inline(CalleeSave::promise(save_fl), SAVE),
            restore_fl: Binding::call(CalleeSave::promise(restore_fl)),
            irq_disable: Binding::inline(CalleeSave::promise(irq_disable), DISABLE),
            irq_enable: Binding::call(CalleeSave::promise(irq_enable)),
        }
    }
};
