//! Xen: a byte in shared memory masks events.
//!
//! `vcpu_info` begins with `evtchn_upcall_pending` and `evtchn_upcall_mask`; the mask is
//! 1 when events are off, the opposite of IF. Order matters: unmask, then look for
//! pending events (the other way round loses one), and a callback is forced exactly when
//! one is pending and unmasked (Linux had that branch the wrong way round from 2.6.30 to
//! 2012). A callback is any hypercall: Xen delivers on the way back.
//!
//! Its other translation is that of frame numbers in page-table entries: [`frames`].
//!
//! `cargo xtask xen-check` runs the interrupt ops and the frame conversions in a small
//! kernel under Debian's Xen, itself under QEMU; the tests here run them against models.

pub mod frames;

use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering};

use super::IrqOps;
use super::kvm::ClockPage;
use crate::pointer::nothing;
use crate::{Binding, CalleeSave, Code, Fixup, RegSet};

/// `struct vcpu_info`: what Xen and one CPU of the guest share, 64 bytes that do not cross
/// a page. (Registering a shorter piece of memory would have Xen write into what follows.)
#[derive(Debug)]
#[repr(C, align(64))]
pub struct VcpuInfo {
    /// 1 while an event waits. Xen's to set.
    pub upcall_pending: AtomicU8,
    /// 1 while events are masked.
    pub upcall_mask: AtomicU8,
    /// Which words of the pending events to look at.
    pub pending_selector: AtomicU64,
    /// CR2 as of the last page fault.
    pub fault_address: AtomicU64,
    /// Nothing.
    pub pad: AtomicU64,
    /// The clock: KVM took it over from here.
    pub time: ClockPage,
}

const _: () = assert!(size_of::<VcpuInfo>() == 64);

impl VcpuInfo {
    /// Masked, and nothing pending: as a CPU starts.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            upcall_pending: AtomicU8::new(0),
            upcall_mask: AtomicU8::new(1),
            pending_selector: AtomicU64::new(0),
            fault_address: AtomicU64::new(0),
            pad: AtomicU64::new(0),
            time: ClockPage::new(),
        }
    }
}

impl Default for VcpuInfo {
    fn default() -> Self {
        Self::new()
    }
}

/// The boot CPU's, registered with Xen at start.
pub static VCPU_INFO: VcpuInfo = VcpuInfo::new();

/// The function that makes a hypercall, behind a thunk.
#[doc(hidden)]
pub static FORCE_CALLBACK: AtomicPtr<()> = AtomicPtr::new(nothing as *mut ());

/// Sets the function that makes a harmless hypercall (`xen_version`). Call it before any of
/// the ops runs.
pub fn on_pending(hypercall: CalleeSave<extern "sysv64" fn()>) {
    FORCE_CALLBACK.store(hypercall.address().cast_mut(), Ordering::Release);
}

/// Emits Xen's four interrupt ops for a `vcpu_info` that is found by an addressing mode.
///
/// The first argument opens a memory operand, the second gives `{info}` its meaning:
/// `xen_irq_ops!("[rip + {info}", sym VCPU_INFO)` for one CPU's, or
/// `xen_irq_ops!("gs:[{info}", const 0x40)` for that of the CPU it runs on.
#[macro_export]
macro_rules! xen_irq_ops {
    ($open:literal, $($info:tt)+) => {
        #[unsafe(naked)]
        unsafe extern "sysv64" fn save_fl() -> usize {
            ::core::arch::naked_asm!(
                "endbr64",
                "xor eax, eax",
                concat!("cmp byte ptr ", $open, " + 1], 0"),
                // Unmasked: 1 in AH, doubled, is bit 9 of EAX.
                "sete ah",
                "add ah, ah",
                "ret",
                info = $($info)+,
            )
        }

        #[unsafe(naked)]
        unsafe extern "sysv64" fn irq_disable() {
            ::core::arch::naked_asm!(
                "endbr64",
                concat!("mov byte ptr ", $open, " + 1], 1"),
                "ret",
                info = $($info)+,
            )
        }

        #[unsafe(naked)]
        unsafe extern "sysv64" fn irq_enable() {
            ::core::arch::naked_asm!(
                "endbr64",
                concat!("mov byte ptr ", $open, " + 1], 0"),
                concat!("cmp byte ptr ", $open, "], 0"),
                "jne 2f",
                "ret",
                "2:",
                "jmp [rip + {force}]",
                info = $($info)+,
                force = sym $crate::backend::xen::FORCE_CALLBACK,
            )
        }

        #[unsafe(naked)]
        unsafe extern "sysv64" fn restore_fl(flags: usize) {
            ::core::arch::naked_asm!(
                "endbr64",
                "test edi, 0x200",
                concat!("sete byte ptr ", $open, " + 1]"),
                // Both bytes at once: pending 1, mask 0.
                concat!("cmp word ptr ", $open, "], 1"),
                "je 2f",
                "ret",
                "2:",
                "jmp [rip + {force}]",
                info = $($info)+,
                force = sym $crate::backend::xen::FORCE_CALLBACK,
            )
        }
    };
}

xen_irq_ops!("[rip + {info}", sym VCPU_INFO);

/// Xen's interrupt flag on the boot CPU. `irq_disable` goes in line.
pub const IRQ: IrqOps = {
    const DISABLE: Code = Code {
        bytes: &[0xc6, 0x05, 0, 0, 0, 0, 1], // mov byte ptr [rip + mask], 1
        clobbers: RegSet::EMPTY,
        fixups: &[Fixup { at: 2, end: 7, target: (&raw const VCPU_INFO.upcall_mask).cast() }],
    };
    // SAFETY: naked; only RAX changes; the hypercall they jump to keeps the same promise,
    // by its type. The template is the function's own instruction.
    unsafe {
        IrqOps {
            save_fl: Binding::call(CalleeSave::promise(save_fl)),
            restore_fl: Binding::call(CalleeSave::promise(restore_fl)),
            irq_disable: Binding::inline(CalleeSave::promise(irq_disable), DISABLE),
            irq_enable: Binding::call(CalleeSave::promise(irq_enable)),
        }
    }
};
