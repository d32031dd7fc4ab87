//! CPUs that do not run: the host says which, for how long, and flushes their TLBs later.

use core::arch::naked_asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use super::Features;
use super::clock::consistent;
use crate::backend::installed::Installed;
use crate::families::types::{CpuMask, Mm};
use crate::families::{lock, mmu, time};
use crate::{BindError, Binding, Bindings, CalleeSave, Plain};

/// `struct kvm_steal_time`: one for each CPU, its address (with bit 0 set) written to
/// [`msr::STEAL_TIME`](super::msr::STEAL_TIME).
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct StealTime {
    /// Nanoseconds that the CPU was ready and did not run.
    pub steal: AtomicU64,
    /// Odd while the host is writing.
    pub version: AtomicU32,
    /// None are defined.
    pub flags: AtomicU32,
    /// [`PREEMPTED`] while the CPU does not run; [`FLUSH_TLB`] is the guest's to add.
    pub preempted: AtomicU8,
}

/// The CPU does not run.
pub const PREEMPTED: u8 = 1;
/// And shall flush its TLB before it does.
pub const FLUSH_TLB: u8 = 2;

/// `log2` of a [`StealTime`]'s size: what the assembler below shifts by.
const SHIFT: u32 = size_of::<StealTime>().trailing_zeros();
const _: () = assert!(size_of::<StealTime>() == 1 << SHIFT && size_of::<StealTime>() == 64);

impl StealTime {
    /// Nanoseconds stolen.
    pub fn nanoseconds(&self) -> u64 {
        consistent(&self.version, || self.steal.load(Ordering::Relaxed))
    }

    /// If the CPU does not run, has the host flush its TLB before it does and says so.
    /// A CPU that runs must be interrupted.
    pub fn flush_later(&self) -> bool {
        let state = self.preempted.load(Ordering::Acquire);
        // Should it begin to run meanwhile, the host has cleared the byte, and nothing is
        // left behind in it.
        state & PREEMPTED != 0
            && self
                .preempted
                .compare_exchange(state, state | FLUSH_TLB, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }
}

// As two words, because the assembler reads them. The number is stored last.
static CPUS: AtomicPtr<StealTime> = AtomicPtr::new(core::ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn install(cpus: &'static [StealTime]) {
    CPUS.store(cpus.as_ptr().cast_mut(), Ordering::Release);
    COUNT.store(cpus.len(), Ordering::Release);
}

fn of(cpu: u32) -> Option<&'static StealTime> {
    let index = usize::try_from(cpu).ok()?;
    if index >= COUNT.load(Ordering::Acquire) {
        return None;
    }
    // SAFETY: within the slice that `install` was given, which is shared and there for good.
    unsafe { CPUS.load(Ordering::Acquire).add(index).as_ref() }
}

/// 1 if the CPU is known not to run. In assembler: a thunk's eight pushes would be most of
/// what this costs.
#[unsafe(naked)]
unsafe extern "sysv64" fn vcpu_is_preempted(cpu: u32) -> i32 {
    naked_asm!(
        "endbr64",
        "mov eax, edi",
        "cmp rax, [rip + {count}]",
        "jae 2f",
        "shl rax, {shift}",
        "add rax, [rip + {cpus}]",
        "movzx eax, byte ptr [rax + {preempted}]",
        "and eax, {bit}",
        "ret",
        "2:",
        "xor eax, eax",
        "ret",
        count = sym COUNT,
        cpus = sym CPUS,
        shift = const SHIFT,
        preempted = const offset_of!(StealTime, preempted),
        bit = const PREEMPTED,
    )
}

unsafe extern "sysv64" fn steal_clock(cpu: u32) -> u64 {
    of(cpu).map_or(0, StealTime::nanoseconds)
}

/// How the kernel flushes other CPUs' TLBs.
#[derive(Debug)]
pub struct Shootdown {
    /// The set without the CPUs for which the function says that it saw to them, in a set of
    /// the kernel's own (one for each CPU, say).
    ///
    /// # Safety
    /// The set is the one that `flush_tlb_others` was called with.
    pub without: unsafe fn(*const CpuMask, &dyn Fn(u32) -> bool) -> *const CpuMask,
    /// Interrupts the CPUs of a set and waits until they flushed: what
    /// `flush_tlb_others` does natively.
    ///
    /// # Safety
    /// The set is one of `without`'s, the rest is `flush_tlb_others`' own.
    pub interrupt: unsafe fn(*const CpuMask, *mut Mm, usize),
}

static SHOOTDOWN: Installed<Shootdown> = Installed::empty();

unsafe extern "sysv64" fn flush_tlb_others(cpus: *const CpuMask, mm: *mut Mm, address: usize) {
    if let Some(shootdown) = SHOOTDOWN.get() {
        let later = |cpu| of(cpu).is_some_and(StealTime::flush_later);
        // SAFETY: what this was called with, and what came of it.
        unsafe {
            let running = (shootdown.without)(cpus, &later);
            (shootdown.interrupt)(running, mm, address);
        }
    }
}

/// `vcpu_is_preempted`, if the host says.
///
/// # Errors
/// When it is bound already.
pub fn bind_preempted(
    bindings: &mut Bindings<lock::Family>,
    host: Features,
    cpus: &'static [StealTime],
) -> Result<(), BindError> {
    if host.has(Features::STEAL_TIME) {
        // SAFETY: naked, and changes RAX only.
        let asleep: CalleeSave<unsafe extern "sysv64" fn(u32) -> i32> =
            unsafe { CalleeSave::promise(vcpu_is_preempted) };
        bindings.bind(lock::op::VcpuIsPreempted, Binding::call(asleep))?;
        install(cpus);
    }
    Ok(())
}

/// `steal_clock`, if the host has it.
///
/// # Errors
/// When it is bound already.
pub fn bind_steal_clock(
    bindings: &mut Bindings<time::Family>,
    host: Features,
    cpus: &'static [StealTime],
) -> Result<(), BindError> {
    if host.has(Features::STEAL_TIME) {
        let steal: Plain<unsafe extern "sysv64" fn(u32) -> u64> = Plain::new(steal_clock);
        bindings.bind(time::op::StealClock, Binding::call(steal))?;
        install(cpus);
    }
    Ok(())
}

/// `flush_tlb_others` that leaves CPUs asleep, if the host flushes for them.
///
/// # Errors
/// When it is bound already.
pub fn bind_flush(
    bindings: &mut Bindings<mmu::Family>,
    host: Features,
    cpus: &'static [StealTime],
    shootdown: &'static Shootdown,
) -> Result<(), BindError> {
    if host.has(Features::STEAL_TIME.and(Features::TLB_FLUSH)) {
        let flush: Plain<unsafe extern "sysv64" fn(*const CpuMask, *mut Mm, usize)> =
            Plain::new(flush_tlb_others);
        bindings.bind(mmu::op::FlushTlbOthers, Binding::call(flush))?;
        SHOOTDOWN.set(shootdown);
        install(cpus);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_cpu_is_left_alone() {
        let cpu = StealTime::default();
        assert!(!cpu.flush_later());
        assert_eq!(cpu.preempted.load(Ordering::SeqCst), 0);
        cpu.preempted.store(PREEMPTED, Ordering::SeqCst);
        assert!(cpu.flush_later() && cpu.flush_later());
        assert_eq!(cpu.preempted.load(Ordering::SeqCst), PREEMPTED | FLUSH_TLB);
    }
}
