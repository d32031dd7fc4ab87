//! Events: one channel from this CPU to itself, and the upcall that takes what comes.

use core::arch::naked_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::frames::{PAGE, Page, Tables};
use crate::hypercall::{self, IRET, STUB};
use crate::start::StartInfo;
use pvops::backend::xen::VCPU_INFO;

/// Mapped to the page that Xen shares with the domain.
static SHARED: Page = Page(UnsafeCell::new([0; PAGE]));
/// Where in it the pending events are, a bit for each port (Xen, public/xen.h).
const PENDING: usize = 2048;

static PORT: AtomicU32 = AtomicU32::new(0);
/// How often our event came.
static DELIVERED: AtomicU32 = AtomicU32::new(0);

/// Present, writable, accessible to guests' kernels, accessed, dirty.
const DATA: u64 = 0x67;

/// Has events delivered to this kernel. They are masked so far.
pub(crate) fn start(info: &StartInfo, tables: Tables) {
    hypercall::set_callbacks(upcall as *const (), failsafe as *const ());
    // SAFETY: the page is there to be replaced.
    unsafe { hypercall::update_va_mapping(SHARED.address(), info.shared_info | DATA) };
    let address = (&raw const VCPU_INFO).addr();
    let machine = tables.machine_of(address);
    // SAFETY: 64 bytes of atomics.
    unsafe { hypercall::register_vcpu_info(0, machine, (address % PAGE) as u32) };
    assert_eq!(VCPU_INFO.upcall_mask.load(Ordering::SeqCst), 1, "Xen took over the mask");
    PORT.store(hypercall::bind_ipi(), Ordering::SeqCst);
    // Registering marks everything as pending, lest something was lost: take it.
    VCPU_INFO.upcall_mask.store(0, Ordering::SeqCst);
    hypercall::version();
    VCPU_INFO.upcall_mask.store(1, Ordering::SeqCst);
    DELIVERED.store(0, Ordering::SeqCst);
    assert_eq!(VCPU_INFO.upcall_pending.load(Ordering::SeqCst), 0, "the upcall did not run");
}

/// Events on or off, with one pending or none. (With events on none can stay pending.)
pub(crate) fn set(enabled: bool, pending: bool) {
    assert!(!(enabled && pending));
    VCPU_INFO.upcall_mask.store(1, Ordering::SeqCst);
    assert_eq!(VCPU_INFO.upcall_pending.load(Ordering::SeqCst), 0, "an event was left over");
    if pending {
        hypercall::send(PORT.load(Ordering::SeqCst));
        assert_eq!(VCPU_INFO.upcall_pending.load(Ordering::SeqCst), 1, "Xen sent no event");
    }
    assert_eq!(taken(), 0, "an event came while masked");
    VCPU_INFO.upcall_mask.store(u8::from(!enabled), Ordering::SeqCst);
}

/// Sends an event and says how often it came.
pub(crate) fn send() -> u32 {
    hypercall::send(PORT.load(Ordering::SeqCst));
    taken()
}

/// How often our event came since this was last asked.
pub(crate) fn taken() -> u32 {
    DELIVERED.swap(0, Ordering::SeqCst)
}

/// Takes a pending event that was not let in.
pub(crate) fn drain() -> u32 {
    VCPU_INFO.upcall_mask.store(0, Ordering::SeqCst);
    hypercall::version();
    VCPU_INFO.upcall_mask.store(1, Ordering::SeqCst);
    taken()
}

/// Whether events are on.
pub(crate) fn enabled() -> bool {
    VCPU_INFO.upcall_mask.load(Ordering::SeqCst) == 0
}

/// Xen enters here with events masked and pushed RCX, R11 and an interrupt frame; the
/// return by hypercall unmasks them as the frame's RFLAGS say. Changes no register.
#[unsafe(naked)]
extern "sysv64" fn upcall() {
    naked_asm!(
        "push rax",
        "mov byte ptr [rip + {info}], 0",
        "xor eax, eax",
        "xchg [rip + {info} + 8], rax",
        "mov eax, [rip + {port}]",
        "lock btr qword ptr [rip + {shared} + {pending}], rax",
        "jnc 2f",
        "lock inc dword ptr [rip + {delivered}]",
        "2:",
        "pop rax",
        "pop rcx",
        "pop r11",
        // The frame's flags: return by a true interrupt return, which keeps RCX and R11.
        "push 0",
        "jmp hypercall_page + {iret}",
        info = sym VCPU_INFO,
        port = sym PORT,
        shared = sym SHARED,
        pending = const PENDING,
        delivered = sym DELIVERED,
        iret = const IRET * STUB,
    )
}

/// The frame of a return was bad.
#[unsafe(naked)]
extern "sysv64" fn failsafe() {
    naked_asm!("ud2")
}
