//! Hypercalls: through the page of stubs that Xen fills in, arguments in registers
//! (Xen, public/arch-x86/xen-x86_64.h).

use core::arch::{asm, global_asm};
use core::fmt;

global_asm!(
    ".pushsection .text.hypercall_page, \"ax\", @progbits",
    ".balign 4096",
    ".globl hypercall_page",
    "hypercall_page:",
    ".skip 4096, 0xcc",
    ".popsection",
);

/// Bytes for each stub.
pub(crate) const STUB: usize = 32;

/// Numbers of hypercalls (Xen, public/xen.h).
#[derive(Clone, Copy)]
#[repr(usize)]
enum Call {
    SetCallbacks = 4,
    MemoryOp = 12,
    UpdateVaMapping = 14,
    XenVersion = 17,
    ConsoleIo = 18,
    VcpuOp = 24,
    SetSegmentBase = 25,
    SchedOp = 29,
    EventChannelOp = 32,
}

/// The stub that returns from an upcall; it is jumped to.
pub(crate) const IRET: usize = 23;

/// # Safety
/// As the hypercall: Xen reads and writes what the arguments point to, and changes what
/// they tell it to.
unsafe fn call(number: Call, args: [usize; 3]) -> isize {
    let result;
    // SAFETY: the stub keeps all but RAX; arguments count as lost. The rest is the caller's.
    unsafe {
        asm!(
            "lea {stub}, [rip + hypercall_page]",
            "add {stub}, {offset}",
            "call {stub}",
            stub = out(reg) _,
            offset = in(reg) number as usize * STUB,
            inlateout("rdi") args[0] => _,
            inlateout("rsi") args[1] => _,
            inlateout("rdx") args[2] => _,
            lateout("rax") result,
            lateout("rcx") _, lateout("r8") _, lateout("r9") _, lateout("r10") _, lateout("r11") _,
        );
    }
    result
}

/// What went wrong, as Xen says it: a negative number of Linux's.
fn check(what: &str, result: isize) {
    assert!(result >= 0, "{what}: error {}", -result);
}

/// Xen's version: major number in the upper half. The most harmless of hypercalls; Xen
/// delivers pending events on the way back from it.
pub(crate) fn version() -> usize {
    // SAFETY: asks only.
    unsafe { call(Call::XenVersion, [0, 0, 0]) as usize }
}

/// Where Xen enters the kernel: for events, and when returning from one fails.
pub(crate) fn set_callbacks(event: *const (), failsafe: *const ()) {
    // SAFETY: entry points of this kernel; system calls there are none.
    let result =
        unsafe { call(Call::SetCallbacks, [event.addr(), failsafe.addr(), failsafe.addr()]) };
    check("set_callbacks", result);
}

/// Changes the last-level entry that maps a page of this kernel, and this CPU's TLB.
///
/// # Safety
/// Nothing may rely on the mapping as it was.
pub(crate) unsafe fn update_va_mapping(address: usize, entry: u64) {
    /// Flush this entry, on this CPU.
    const INVLPG: usize = 2;
    // SAFETY: the caller's; that the frame may be mapped so Xen checks.
    let result = unsafe { call(Call::UpdateVaMapping, [address, entry as usize, INVLPG]) };
    check("update_va_mapping", result);
}

/// Number of machine frames that Xen's table has room for.
pub(crate) fn machine_frames() -> u64 {
    const MAPPING: usize = 12;
    let mut mapping = [0u64; 3]; // first address, last address, last frame
    // SAFETY: Xen writes three words.
    let result = unsafe { call(Call::MemoryOp, [MAPPING, mapping.as_mut_ptr().addr(), 0]) };
    check("memory_op machphys_mapping", result);
    mapping[2] + 1
}

/// Has Xen keep a CPU's shared state in this kernel's memory.
///
/// # Safety
/// 64 bytes there, which are Xen's as well from now on.
pub(crate) unsafe fn register_vcpu_info(cpu: usize, machine_frame: u64, offset: u32) {
    const REGISTER: usize = 10;
    #[repr(C)]
    struct Place(u64, u32, u32);
    let place = Place(machine_frame, offset, 0);
    // SAFETY: the caller's.
    let result = unsafe { call(Call::VcpuOp, [REGISTER, cpu, (&raw const place).addr()]) };
    check("vcpu_op register_vcpu_info", result);
}

/// Sets the kernel's GS base.
pub(crate) fn set_gs_base(address: usize) {
    const GS_KERNEL: usize = 2;
    // SAFETY: nothing else in this kernel goes through GS.
    let result = unsafe { call(Call::SetSegmentBase, [GS_KERNEL, address, 0]) };
    check("set_segment_base", result);
}

/// A new event channel from this CPU to itself.
pub(crate) fn bind_ipi() -> u32 {
    const BIND_IPI: usize = 7;
    let mut bind = [0u32; 2]; // CPU, port
    // SAFETY: Xen reads one word and writes the other.
    let result = unsafe { call(Call::EventChannelOp, [BIND_IPI, bind.as_mut_ptr().addr(), 0]) };
    check("event_channel_op bind_ipi", result);
    bind[1]
}

/// Sends an event.
pub(crate) fn send(port: u32) {
    const SEND: usize = 4;
    // SAFETY: Xen reads one word.
    let result = unsafe { call(Call::EventChannelOp, [SEND, (&raw const port).addr(), 0]) };
    check("event_channel_op send", result);
}

/// Why a domain ends (Xen, public/sched.h).
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Shutdown {
    /// It wants to start again.
    Reboot = 1,
    /// It cannot go on.
    Crash = 3,
}

/// Ends this domain, and with the first domain the machine.
pub(crate) fn shutdown(reason: Shutdown) -> ! {
    const SHUTDOWN: usize = 2;
    let reason = reason as u32;
    loop {
        // SAFETY: Xen reads one word, and does not return.
        unsafe { call(Call::SchedOp, [SHUTDOWN, (&raw const reason).addr(), 0]) };
    }
}

/// Xen's console, which is its serial port.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const WRITE: usize = 0;
        // SAFETY: Xen reads the text.
        unsafe { call(Call::ConsoleIo, [WRITE, text.len(), text.as_ptr().addr()]) };
        Ok(())
    }
}

/// A line on the console.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {{
        use core::fmt::Write;
        let _ = writeln!($crate::hypercall::Console, $($text)*);
    }};
}
