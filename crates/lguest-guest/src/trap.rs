//! Everything that enters the kernel: exceptions, interrupts, system calls.
//!
//! Each vector has a stub that pushes its number; all go on in one place, which saves the
//! registers in a [`Context`], calls the vector's handler, and returns to what the context
//! says then. lguest enters the stubs by gates, below the red zone of what it interrupts. A
//! PC enters them through its IDT on a stack of their own, from where the frame is moved to
//! just the same place: so the rest is one code, and Rust's core library, whose code has red
//! zones, may run in a kernel.

use core::arch::{global_asm, naked_asm};
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use lguest_abi::long::traps::NO_GATE;

use crate::hypercall::{self, Call, GateKind, Virt};
use crate::{Platform, pc, platform};

/// The registers of what was interrupted.
#[derive(Clone, Debug)]
#[repr(C, align(16))]
pub struct Context {
    /// x87 and SSE state, as FXSAVE has it.
    fpu: [u8; 512],
    /// RAX and so on: the system call's number, and its result.
    pub rax: u64,
    #[allow(missing_docs)]
    pub rbx: u64,
    #[allow(missing_docs)]
    pub rcx: u64,
    #[allow(missing_docs)]
    pub rdx: u64,
    #[allow(missing_docs)]
    pub rsi: u64,
    #[allow(missing_docs)]
    pub rdi: u64,
    #[allow(missing_docs)]
    pub rbp: u64,
    #[allow(missing_docs)]
    pub r8: u64,
    #[allow(missing_docs)]
    pub r9: u64,
    #[allow(missing_docs)]
    pub r10: u64,
    #[allow(missing_docs)]
    pub r11: u64,
    #[allow(missing_docs)]
    pub r12: u64,
    #[allow(missing_docs)]
    pub r13: u64,
    #[allow(missing_docs)]
    pub r14: u64,
    #[allow(missing_docs)]
    pub r15: u64,
    /// What it entered by; [`SYSTEM_CALL`] is one of them.
    pub vector: u64,
    /// The CPU's error code, or 0.
    pub error: u64,
    /// Where it was, and goes on.
    pub rip: u64,
    /// Its code segment.
    pub cs: u64,
    /// Its flags; bit 9 is its interrupt flag.
    pub rflags: u64,
    /// Its stack.
    pub rsp: u64,
    /// Its stack segment.
    pub ss: u64,
}

impl Context {
    /// Whether it was a user program.
    pub const fn is_user(&self) -> bool {
        self.cs & 3 == 3
    }
}

/// Vectors with names.
pub mod vector {
    /// Division by zero.
    pub const DIVIDE: usize = 0;
    /// `int3`.
    pub const BREAKPOINT: usize = 3;
    /// An instruction that does not exist.
    pub const INVALID_OPCODE: usize = 6;
    /// What privilege forbids.
    pub const GENERAL_PROTECTION: usize = 13;
    /// An address that is not mapped, or not for this.
    pub const PAGE_FAULT: usize = 14;
    /// The timer.
    pub const TIMER: usize = 32;
    /// Other interrupts follow.
    pub const FIRST_DEVICE: usize = 33;
    /// And end before this.
    pub const LAST: usize = 96;
}

/// The vector of `syscall`.
pub const SYSTEM_CALL: usize = vector::LAST;
/// Handlers there are.
const HANDLERS: usize = SYSTEM_CALL + 1;

/// What is called for a vector, with interrupts off.
pub type Handler = fn(&mut Context);

static TABLE: [AtomicPtr<()>; HANDLERS] =
    [const { AtomicPtr::new(core::ptr::null_mut()) }; HANDLERS];

/// Makes `handler` be called for `vector`: an exception's, a device's, or [`SYSTEM_CALL`].
/// An exception without a handler is a panic; an interrupt without one is ignored.
pub fn handle(vector: usize, handler: Handler) {
    if let Some(slot) = TABLE.get(vector) {
        slot.store(handler as *mut (), Ordering::Release);
    }
}

extern "sysv64" fn dispatch(context: &mut Context) {
    let vector = context.vector as usize;
    if vector == vector::TIMER {
        crate::time::ticked();
    }
    let handler =
        TABLE.get(vector).map_or(core::ptr::null_mut(), |slot| slot.load(Ordering::Acquire));
    if !handler.is_null() {
        // SAFETY: only handlers are stored.
        let handler: Handler = unsafe { core::mem::transmute(handler) };
        return handler(context);
    }
    if vector < vector::TIMER {
        let at = crate::paging::fault_address();
        let Context { error, rip, cs, rsp, .. } = *context;
        panic!("trap {vector} ({error:#x}) at {rip:#x}, cs {cs:#x}, rsp {rsp:#x}, address {at:#x}");
    }
}

/// Where the stubs go on: on lguest at `enter`, on a PC at `move_frame`.
static ENTRY: AtomicUsize = AtomicUsize::new(0);
/// Where contexts are left: at the platform's `iretq`.
static LEAVE: AtomicUsize = AtomicUsize::new(0);

/// One stub; they are all of this size.
pub(crate) const STUB: usize = 16;

// Push a zero unless the CPU has pushed an error code, then the number.
global_asm!(
    ".pushsection .text.stubs, \"ax\"",
    ".balign 16",
    "trap_stubs:",
    ".set number, 0",
    ".rept {count}",
    ".balign 16",
    ".if number == 8 || (number >= 10 && number <= 14) || number == 17",
    ".else",
    "push 0",
    ".endif",
    "push number",
    "jmp qword ptr [rip + {entry}]",
    ".set number, number + 1",
    ".endr",
    ".balign 16",
    ".popsection",
    count = const HANDLERS,
    entry = sym ENTRY,
);

unsafe extern "C" {
    static trap_stubs: u8;
}

/// The address of a vector's stub.
pub(crate) fn stub(vector: usize) -> u64 {
    (&raw const trap_stubs).addr() as u64 + (vector * STUB) as u64
}

/// Saves a context, has it handled, and takes it back.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn enter() {
    naked_asm!(
        "push r15",
        "push r14",
        "push r13",
        "push r12",
        "push r11",
        "push r10",
        "push r9",
        "push r8",
        "push rbp",
        "push rdi",
        "push rsi",
        "push rdx",
        "push rcx",
        "push rbx",
        "push rax",
        "sub rsp, 512",
        "fxsave64 [rsp]",
        "cld",
        "mov rdi, rsp",
        "call {dispatch}",
        "jmp {leave}",
        dispatch = sym dispatch,
        leave = sym leave,
    )
}

/// Goes on with the context at RSP.
#[unsafe(naked)]
pub(crate) unsafe extern "sysv64" fn leave() {
    naked_asm!(
        "fxrstor64 [rsp]",
        "add rsp, 512",
        "pop rax",
        "pop rbx",
        "pop rcx",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "pop rbp",
        "pop r8",
        "pop r9",
        "pop r10",
        "pop r11",
        "pop r12",
        "pop r13",
        "pop r14",
        "pop r15",
        "add rsp, 16",
        "jmp qword ptr [rip + {leave}]",
        leave = sym LEAVE,
    )
}

// lguest's way back: the flag first, then the guarded instruction, where the host pushes no
// frame (docs/lguest-abi.md, section 7).
global_asm!(
    ".pushsection .text.leave, \"ax\"",
    "leave_on_lguest:",
    "push word ptr [rsp + 16]",
    "pop word ptr [rip + {flag}]",
    "guarded_iretq:",
    "iretq",
    ".popsection",
    flag = sym pvops::backend::lguest::SHARED,
);

/// On a PC: the stub ran on the interrupt stack. Moves what is there (four registers, number,
/// error code, frame: eleven words) to where lguest would have put it.
#[unsafe(naked)]
unsafe extern "sysv64" fn move_frame() {
    naked_asm!(
        "push rax",
        "push rcx",
        "push rsi",
        "push rdi",
        "cld",
        // A user's goes to the stack of the task state; the kernel's below its red zone.
        "mov rdi, [rip + {stack} + 4]",
        "test byte ptr [rsp + 56], 3",
        "jnz 2f",
        "mov rdi, [rsp + 72]",
        "sub rdi, 128",
        "2: and rdi, -16",
        "sub rdi, 88",
        "mov rax, rdi",
        "mov rsi, rsp",
        "mov ecx, 11",
        "rep movsq",
        "mov rsp, rax",
        "pop rdi",
        "pop rsi",
        "pop rcx",
        "pop rax",
        "jmp {enter}",
        stack = sym pc::segments::TASK_STATE,
        enter = sym enter,
    )
}

#[unsafe(naked)]
unsafe extern "sysv64" fn leave_on_pc() {
    naked_asm!("iretq")
}

unsafe extern "C" {
    #[link_name = "guarded_iretq"]
    static GUARDED: u8;
    #[link_name = "leave_on_lguest"]
    static LEAVE_ON_LGUEST: u8;
}

/// The address of the `iretq` that the host treats with care.
pub(crate) fn guarded_iretq() -> u64 {
    (&raw const GUARDED).addr() as u64
}

/// Loads lguest's gates.
pub(crate) fn on_lguest() {
    ENTRY.store(enter as *const () as usize, Ordering::Relaxed);
    LEAVE.store((&raw const LEAVE_ON_LGUEST).addr(), Ordering::Relaxed);
    hypercall::begin_batch();
    for number in (0..vector::LAST).filter(|n| !NO_GATE.contains(&(*n as u8))) {
        let kind = GateKind { trap: false, user: number == vector::BREAKPOINT };
        let handler = Some(Virt(stub(number)));
        hypercall::later(Call::LoadIdtEntry { vector: number as u8, handler, kind });
    }
    hypercall::end_batch();
}

/// For a PC, whose IDT is loaded elsewhere.
pub(crate) fn on_pc() {
    ENTRY.store(move_frame as *const () as usize, Ordering::Relaxed);
    LEAVE.store(leave_on_pc as *const () as usize, Ordering::Relaxed);
}

/// The kernel's and the user's segments here.
pub(crate) fn is_lguest() -> bool {
    platform() == Platform::Lguest
}
