//! User mode: how it is entered, and how its system calls come back.

use core::arch::{asm, naked_asm};

use lguest_abi::long::entry::{USER_CS, USER_DS};

use crate::hypercall::{self, Call, Virt};
use crate::trap::{SYSTEM_CALL, enter, stub};
use crate::{irq, pc};

/// RFLAGS of a user that begins: interrupts on.
const FLAGS: u64 = 0x202;

/// `syscall` on lguest: the frame is on the kernel's stack already; the stub adds the rest.
pub(crate) fn on_lguest() {
    hypercall::call(Call::SetSyscall { entry: Some(Virt(stub(SYSTEM_CALL))) });
}

/// `syscall` on a PC: makes the same frame.
#[unsafe(naked)]
unsafe extern "sysv64" fn system_call_on_pc() {
    naked_asm!(
        "mov [rip + {saved}], rsp",
        "mov rsp, [rip + {stack} + 4]",
        "push {data}",
        "push qword ptr [rip + {saved}]",
        "push r11",
        "push {code}",
        "push rcx",
        "push 0",
        "push {number}",
        "jmp {enter}",
        saved = sym USER_RSP,
        stack = sym pc::segments::TASK_STATE,
        data = const USER_DS,
        code = const USER_CS,
        number = const SYSTEM_CALL,
        enter = sym enter,
    )
}

/// Only used with interrupts off.
static USER_RSP: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);

pub(crate) fn on_pc() {
    pc::set_system_call(system_call_on_pc as *const () as u64);
}

/// Leaves the kernel for `rip` in the current address space, with this stack and argument
/// (in RDI). What comes back comes by a trap, on the stack of
/// [`set_kernel_stack`](crate::paging::set_kernel_stack).
pub fn enter_at(rip: u64, rsp: u64, argument: u64) -> ! {
    irq::disable();
    // SAFETY: all registers are given values; the kernel's stack is left for good.
    unsafe {
        asm!(
            "and rsp, -16",
            "push {ss}",
            "push {rsp}",
            "push {flags}",
            "push {cs}",
            "push {rip}",
            "push 0",
            "push 0",
            // Fifteen registers, of which one is not zero, and a fresh FPU.
            "xor eax, eax",
            "mov ecx, 9",
            "2: push 0",
            "dec ecx",
            "jnz 2b",
            "push rdi",
            "mov ecx, 5",
            "3: push 0",
            "dec ecx",
            "jnz 3b",
            "fninit",
            "sub rsp, 512",
            "fxsave64 [rsp]",
            "lea rdx, [rsp + 160]",
            "mov ecx, 44",
            "4: mov qword ptr [rdx], 0",
            "add rdx, 8",
            "dec ecx",
            "jnz 4b",
            "jmp {leave}",
            ss = const USER_DS as u64,
            cs = const USER_CS as u64,
            flags = const FLAGS,
            rsp = in(reg) rsp,
            rip = in(reg) rip,
            in("rdi") argument,
            leave = sym crate::trap::leave,
            options(noreturn)
        )
    }
}
