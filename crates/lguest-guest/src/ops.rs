//! The paravirtual operations: bound once the kernel knows where it runs, then patched.
//!
//! On a PC nothing is bound but what has no native form, and every site becomes the
//! instruction it stands for. On lguest the interrupt flag is pvops' own backend, and page
//! tables and stacks are calls of ours.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use pvops::backend::lguest;
use pvops::families::types::{CpuMask, Mm, Pgd, Pmd, Pte, Pud, Thread, Tss};
use pvops::families::{cpu, irq, mmu};
use pvops::{Binding, Bindings, CalleeSave, Family, Patched, Plain, Sites, Unpatched, callee_save};

use crate::hypercall::{self, Call, FlushScope, Phys, Virt};
use crate::text::KernelText;

/// How the interrupt ops are reached: for measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptOps {
    /// By calls through their table, as compiled.
    Called,
    /// Patched: instructions in line, or direct calls.
    Patched,
}

/// Binds ops to ordinary functions.
macro_rules! bind {
    ($bindings:ident: $($op:path => $function:path as $pointer:ty,)*) => {
        $($bindings.bind($op, Binding::call(Plain::new($function as $pointer))).expect("once");)*
    };
}

unsafe extern "sysv64" fn nothing() {}
unsafe extern "sysv64" fn flush_others(_: *const CpuMask, _: *mut Mm, _: usize) {}
unsafe extern "sysv64" fn no_fixmap(_: u32, _: u64, _: u64) {}
unsafe extern "sysv64" fn no_ldt(_: *const u64, _: u32) {}
unsafe extern "sysv64" fn no_tls(_: *const Thread, _: u32) {}

unsafe extern "sysv64" fn sleep() {
    hypercall::call(Call::Halt);
}

unsafe extern "sysv64" fn clear_ts() {
    hypercall::later(Call::Ts(false));
}

unsafe extern "sysv64" fn load_stack(_: *mut Tss, stack: u64) {
    hypercall::later(Call::SetStack { rsp: Virt(stack) });
}

#[callee_save]
unsafe fn read_cr2() -> u64 {
    // SAFETY: a field of the shared page.
    unsafe { core::ptr::addr_of!((*hypercall::shared()).cr2).read_volatile() }
}

/// CR3, which only the host can read.
static TOP: AtomicU64 = AtomicU64::new(0);

unsafe extern "sysv64" fn read_cr3() -> u64 {
    TOP.load(Ordering::Relaxed)
}

unsafe extern "sysv64" fn write_cr3(top: u64) {
    TOP.store(top, Ordering::Relaxed);
    hypercall::later(Call::NewPgtable { top: Phys(top) });
}

unsafe extern "sysv64" fn flush_user() {
    hypercall::later(Call::FlushTlb(FlushScope::User));
}

unsafe extern "sysv64" fn flush_all() {
    hypercall::later(Call::FlushTlb(FlushScope::All));
}

unsafe extern "sysv64" fn flush_page(address: usize) {
    hypercall::later(Call::FlushPage { at: Virt(address as u64) });
}

/// Stores an entry, and tells the host unless nothing was there before.
unsafe extern "sysv64" fn set_pte_at(mm: *mut Mm, address: usize, entry: *mut Pte, value: Pte) {
    // SAFETY: the caller's: an entry of its tables.
    let old = unsafe { entry.read_volatile() };
    // SAFETY: as above.
    unsafe { entry.write_volatile(value) };
    if old.0 & 1 != 0 {
        let top = Phys(mm.addr() as u64);
        hypercall::later(Call::SetPte { top, at: Virt(address as u64), entry: value.0 });
    }
}

unsafe extern "sysv64" fn pte_clear(mm: *mut Mm, address: usize, entry: *mut Pte) {
    // SAFETY: the caller's.
    unsafe { set_pte_at(mm, address, entry, Pte(0)) }
}

/// Of levels above it is not known where: everything is forgotten, if something was there.
unsafe extern "sysv64" fn set_table<T: Copy>(entry: *mut T, value: T) {
    // SAFETY: the caller's: an entry of its tables, which is a word.
    let old = unsafe { entry.cast::<u64>().read_volatile() };
    // SAFETY: as above.
    unsafe { entry.write_volatile(value) };
    if old & 1 != 0 {
        hypercall::later(Call::FlushTlb(FlushScope::All));
    }
}

unsafe extern "sysv64" fn begin_batch() {
    hypercall::begin_batch();
}

unsafe extern "sysv64" fn end_batch() {
    hypercall::end_batch();
}

type F0 = unsafe extern "sysv64" fn();
type F2<A, B> = unsafe extern "sysv64" fn(A, B);
type F3<A, B, C> = unsafe extern "sysv64" fn(A, B, C);

/// A platform's bindings.
struct Ops {
    irq: Bindings<irq::Family>,
    cpu: Bindings<cpu::Family>,
    mmu: Bindings<mmu::Family>,
}

impl Ops {
    /// What has no default, bound to what suits one CPU.
    fn new(platform: &'static str) -> Self {
        let (mut irq, mut cpu, mut mmu) =
            (Bindings::new(platform), Bindings::new(platform), Bindings::new(platform));
        bind!(irq: irq::op::InitIrq => nothing as F0,);
        bind!(cpu:
            cpu::op::SetLdt => no_ldt as F2<_, _>,
            cpu::op::LoadTls => no_tls as F2<_, _>,
        );
        bind!(mmu:
            mmu::op::FlushTlbOthers => flush_others as F3<_, _, _>,
            mmu::op::SetFixmap => no_fixmap as F3<_, _, _>,
        );
        Self { irq, cpu, mmu }
    }

    /// Makes them what is called, and then what the sites are.
    fn install(&self) {
        let sites = Sites::of_program();
        let mut text = KernelText::default();
        let mut family = irq::Family::claim().expect("nobody has it");
        family.bind(&self.irq).expect("complete");
        // SAFETY: the first and only one to be here.
        unsafe { *IRQ.0.get() = Some(IrqFamily::Called(family)) };
        set_interrupt_ops(InterruptOps::Patched);
        let mut family = cpu::Family::claim().expect("nobody has it");
        family.bind(&self.cpu).expect("complete");
        let cpu = family.apply(sites, &mut text, |_| ()).map_err(|(_, error)| error);
        let mut family = mmu::Family::claim().expect("nobody has it");
        family.bind(&self.mmu).expect("complete");
        let mmu = family.apply(sites, &mut text, |_| ()).map_err(|(_, error)| error);
        // They are never bound to anything else.
        let _ = (cpu.expect("patched"), mmu.expect("patched"));
    }
}

/// Binds the ops of lguest.
pub(crate) fn bind_lguest() {
    // SAFETY: naked; the host keeps all registers, and it restores the one that it uses.
    lguest::on_pending(unsafe { CalleeSave::promise(hypercall::send_interrupts) });
    let mut ops = Ops::new("lguest");
    let Ops { irq, cpu, mmu } = &mut ops;
    lguest::IRQ.bind(irq).expect("once");
    bind!(irq: irq::op::SafeHalt => sleep as F0, irq::op::Halt => sleep as F0,);
    bind!(cpu: cpu::op::Clts => clear_ts as F0, cpu::op::LoadSp0 => load_stack as F2<_, _>,);
    mmu.bind(mmu::op::ReadCr2, Binding::call(read_cr2::CALLEE_SAVE)).expect("once");
    bind!(mmu:
        mmu::op::ReadCr3 => read_cr3 as unsafe extern "sysv64" fn() -> u64,
        mmu::op::WriteCr3 => write_cr3 as unsafe extern "sysv64" fn(u64),
        mmu::op::FlushTlbUser => flush_user as F0,
        mmu::op::FlushTlbKernel => flush_all as F0,
        mmu::op::FlushTlbSingle => flush_page as unsafe extern "sysv64" fn(usize),
        mmu::op::SetPteAt => set_pte_at as unsafe extern "sysv64" fn(_, _, _, _),
        mmu::op::PteClear => pte_clear as F3<_, _, _>,
        mmu::op::SetPmd => set_table::<Pmd> as F2<_, _>,
        mmu::op::SetPud => set_table::<Pud> as F2<_, _>,
        mmu::op::SetPgd => set_table::<Pgd> as F2<_, _>,
        mmu::op::LazyEnter => begin_batch as F0,
        mmu::op::LazyLeave => end_batch as F0,
    );
    ops.install();
}

/// Binds what a PC lacks.
pub(crate) fn bind_pc() {
    Ops::new("pc").install();
}

#[allow(clippy::large_enum_variant, reason = "there is one, in a static")]
enum IrqFamily {
    Called(Unpatched<irq::Family>),
    Patched(Patched<irq::Family>),
}

struct IrqCell(UnsafeCell<Option<IrqFamily>>);
// SAFETY: one CPU, which comes here with nobody else interested: at the start, or to measure.
unsafe impl Sync for IrqCell {}
static IRQ: IrqCell = IrqCell(UnsafeCell::new(None));

/// Makes the interrupt ops be reached in that way. They are patched from the start; to undo
/// it is for measurements, and for one task at a time.
pub fn set_interrupt_ops(form: InterruptOps) {
    let (sites, mut text) = (Sites::of_program(), KernelText::default());
    // SAFETY: see `IrqCell`.
    let cell = unsafe { &mut *IRQ.0.get() };
    *cell = match (cell.take(), form) {
        (Some(IrqFamily::Called(family)), InterruptOps::Patched) => {
            let patched = family.apply(sites, &mut text, |_| ()).map_err(|(_, error)| error);
            Some(IrqFamily::Patched(patched.expect("patched").0))
        }
        (Some(IrqFamily::Patched(family)), InterruptOps::Called) => {
            let undone = family.undo(sites, &mut text).map_err(|(_, error)| error);
            Some(IrqFamily::Called(undone.expect("undone")))
        }
        (as_it_is, _) => as_it_is,
    };
}
