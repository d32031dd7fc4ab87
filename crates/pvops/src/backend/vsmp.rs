//! vSMP: the interrupt flag is IF and AC together.
//!
//! ScaleMP's hypervisor spreads one kernel over several machines. It reads AC as the
//! complement of IF, so that it sees masking without trapping `cli` and `sti`; interrupts
//! are on only when IF is set and AC clear. (Not for today: SMAP gives AC in ring 0
//! another meaning.)

use core::arch::naked_asm;

use super::IrqOps;
use crate::{Binding, CalleeSave};

#[unsafe(naked)]
unsafe extern "sysv64" fn save_fl() -> usize {
    naked_asm!(
        "endbr64",
        "pushfq",
        "pop rax",
        "test eax, 0x40000",
        "je 2f",
        "and rax, -0x201",
        "2:",
        "ret",
    )
}

#[unsafe(naked)]
unsafe extern "sysv64" fn restore_fl(flags: usize) {
    naked_asm!(
        "endbr64",
        "mov rax, rdi",
        "and rax, -0x40001",
        "test eax, 0x200",
        "jne 2f",
        "or eax, 0x40000",
        "2:",
        "push rax",
        "popfq",
        "ret",
    )
}

#[unsafe(naked)]
unsafe extern "sysv64" fn irq_disable() {
    naked_asm!(
        "endbr64",
        "pushfq",
        "pop rax",
        "and rax, -0x201",
        "or eax, 0x40000",
        "push rax",
        "popfq",
        "ret",
    )
}

#[unsafe(naked)]
unsafe extern "sysv64" fn irq_enable() {
    naked_asm!(
        "endbr64",
        "pushfq",
        "pop rax",
        "and rax, -0x40001",
        "or eax, 0x200",
        "push rax",
        "popfq",
        "ret",
    )
}

/// vSMP's interrupt flag: too long for any site, called directly.
pub const IRQ: IrqOps = {
    // SAFETY: naked; only RAX and flags change.
    unsafe {
        IrqOps {
            save_fl: Binding::call(CalleeSave::promise(save_fl)),
            restore_fl: Binding::call(CalleeSave::promise(restore_fl)),
            irq_disable: Binding::call(CalleeSave::promise(irq_disable)),
            irq_enable: Binding::call(CalleeSave::promise(irq_enable)),
        }
    }
};

/// The capability and control words of vSMP's device (PCI 0:1f.0, BAR 0): whether the
/// hypervisor wants the flag kept this way, and what to write back to the control word.
#[must_use]
pub const fn negotiate(capabilities: u32, control: u32) -> Option<u32> {
    const IRQ_BIT: u32 = 1 << 4;
    if capabilities & control & IRQ_BIT == 0 {
        return None;
    }
    Some(control & !IRQ_BIT)
}

#[cfg(test)]
mod tests {
    #[test]
    fn negotiated_only_when_both_agree() {
        use super::negotiate;
        assert_eq!(negotiate(0x10, 0x3f), Some(0x2f));
        assert_eq!(negotiate(0x10, 0x0f), None);
        assert_eq!(negotiate(0, 0x10), None);
    }
}
