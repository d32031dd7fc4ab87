//! Stacks of execution, and how to go from one to another. Who runs when is the kernel's
//! business.

use alloc::boxed::Box;
use core::arch::naked_asm;

use crate::hypercall;

/// Bytes of a stack.
pub const STACK: usize = 32 << 10;

#[repr(align(16))]
struct Stack([u8; STACK]);

/// A stack that execution can be switched to.
pub struct Task {
    /// RSP, while it does not run.
    rsp: usize,
    stack: Option<Box<Stack>>,
}

impl core::fmt::Debug for Task {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Task").field("rsp", &self.rsp).finish_non_exhaustive()
    }
}

impl Task {
    /// The one that runs already.
    pub const fn running() -> Self {
        Self { rsp: 0, stack: None }
    }

    /// One that begins with `body(argument)`, on a stack of its own, with interrupts as they
    /// are when it is switched to.
    pub fn new(body: extern "sysv64" fn(usize) -> !, argument: usize) -> Self {
        // SAFETY: bytes, of which all may be zero.
        let mut stack: Box<Stack> = unsafe { Box::new_zeroed().assume_init() };
        // What `switch` pops: flags of the FPU, six registers, the address to return to.
        let first =
            [0x037f_0000_1f80, 0, 0, 0, argument, body as usize, 0, begin as *const () as usize, 0];
        let at = STACK - size_of_val(&first);
        for (slot, word) in stack.0[at..].chunks_exact_mut(8).zip(first) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        let rsp = stack.0.as_ptr().expose_provenance() + at;
        Self { rsp, stack: Some(stack) }
    }

    /// Where its stack ends: what [`set_kernel_stack`](crate::paging::set_kernel_stack) wants
    /// for a task with a user.
    pub fn stack_top(&self) -> u64 {
        let stack = self.stack.as_ref();
        stack.map_or(0, |stack| (stack.0.as_ptr().expose_provenance() + STACK) as u64)
    }
}

/// The first instructions of a task: its body is in R12's place, the argument in R13's.
#[unsafe(naked)]
extern "sysv64" fn begin() {
    naked_asm!("mov rdi, r13", "xor ebp, ebp", "sub rsp, 8", "call r12", "ud2")
}

/// Goes on with `to`; returns when somebody goes on with `from`.
///
/// A batch of hypercalls is the task's that makes it: who was interrupted in one must not have
/// the next one's address space and stack wait in it, which needs them for its first trap.
///
/// # Safety
/// Interrupts are off; `from` is the one that runs, and `to` one that does not.
pub unsafe fn switch(from: *mut Task, to: *const Task) {
    let batching = hypercall::pause_batch();
    // SAFETY: the caller's; RSP of a task that does not run is where it left off.
    unsafe { exchange(&raw mut (*from).rsp, (*to).rsp) };
    hypercall::resume_batch(batching);
}

#[unsafe(naked)]
unsafe extern "sysv64" fn exchange(from: *mut usize, to: usize) {
    naked_asm!(
        "push rbp",
        "push r12",
        "push r13",
        "push rbx",
        "push r14",
        "push r15",
        "sub rsp, 8",
        "stmxcsr [rsp]",
        "fnstcw [rsp + 4]",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "ldmxcsr [rsp]",
        "fldcw [rsp + 4]",
        "add rsp, 8",
        "pop r15",
        "pop r14",
        "pop rbx",
        "pop r13",
        "pop r12",
        "pop rbp",
        "ret",
    )
}
