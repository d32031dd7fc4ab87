//! lguest and Xen in 64-bit code, against models of their hypervisors that enforce the
//! contract, through real call sites: indirect, then patched.

use pvops::backend::{IF, IrqOps, lguest, xen};
use pvops::families::irq;
use pvops::user::{DualMapping, Threads};
use pvops::{Binding, Bindings, CallKind, Family, Plain, Sites, callee_save, convention, probe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

static CALLS: AtomicUsize = AtomicUsize::new(0);

/// The hypervisor's side of "you may deliver now". Compiled code, which trashes what the
/// convention lets it; the thunk keeps that from the callers.
#[callee_save]
fn hypercall() {
    CALLS.fetch_add(1, Ordering::SeqCst);
}

extern "sysv64" fn init_irq() {}

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

trait Model {
    fn set(&self, enabled: bool, pending: bool);
    fn enabled(&self) -> bool;
}

struct Lguest;

impl Model for Lguest {
    fn set(&self, enabled: bool, pending: bool) {
        lguest::SHARED.irq_enabled.store(u32::from(enabled) * 0x200, Ordering::SeqCst);
        lguest::SHARED.irq_pending.store(u32::from(pending) * 0x200, Ordering::SeqCst);
    }
    fn enabled(&self) -> bool {
        lguest::SHARED.irq_enabled.load(Ordering::SeqCst) == 0x200
    }
}

struct Xen;

impl Model for Xen {
    fn set(&self, enabled: bool, pending: bool) {
        xen::VCPU_INFO.upcall_mask.store(u8::from(!enabled), Ordering::SeqCst);
        xen::VCPU_INFO.upcall_pending.store(u8::from(pending), Ordering::SeqCst);
    }
    fn enabled(&self) -> bool {
        xen::VCPU_INFO.upcall_mask.load(Ordering::SeqCst) == 0
    }
}

/// Meaning, through the crate's own sites.
fn semantics(model: &dyn Model, what: &str) {
    let calls = || CALLS.swap(0, Ordering::SeqCst);
    for enabled in [false, true] {
        for pending in [false, true] {
            let what = format!("{what} enabled {enabled} pending {pending}");
            calls();
            // SAFETY: these backends store to their own memory.
            unsafe {
                model.set(enabled, pending);
                assert_eq!(irq::save_fl() & IF != 0, enabled, "{what}");
                assert_eq!((model.enabled(), calls()), (enabled, 0), "{what}");
                irq::irq_disable();
                assert_eq!((model.enabled(), calls()), (false, 0), "{what}");
                irq::irq_enable();
                assert_eq!((model.enabled(), calls()), (true, usize::from(pending)), "{what}");
                irq::restore_fl(!IF);
                assert_eq!((model.enabled(), calls()), (false, 0), "{what}");
                irq::restore_fl(IF);
                assert_eq!((model.enabled(), calls()), (true, usize::from(pending)), "{what}");
                // Nested: the inner pair changes nothing.
                model.set(enabled, false);
                let outer = irq::save_fl();
                irq::irq_disable();
                let inner = irq::save_fl();
                irq::irq_disable();
                irq::restore_fl(inner);
                assert!(!model.enabled(), "{what}");
                irq::restore_fl(outer);
                assert_eq!(model.enabled(), enabled, "{what}");
            }
        }
    }
}

/// Registers, through each pointer.
fn promises(model: &dyn Model, ops: &IrqOps) {
    let targets = [
        ops.save_fl.erase(),
        ops.restore_fl.erase(),
        ops.irq_disable.erase(),
        ops.irq_enable.erase(),
    ];
    for bound in targets {
        for pending in [false, true] {
            for argument in [0, IF] {
                model.set(false, pending);
                // SAFETY: functions that may be called, here, with any word.
                unsafe { probe::keeps_promise(bound.target, &[argument]) }.expect("kept");
            }
        }
    }
}

fn run(name: &'static str, model: &dyn Model, ops: &IrqOps, inline: &[&str]) {
    let sites = Sites::of_program();
    let mut text = DualMapping::around(sites, Threads::stop(41)).expect("a window");
    let mut family = irq::Family::claim().expect("nobody has it");
    let mut bindings = Bindings::new(name);
    ops.bind(&mut bindings).expect("once");
    let missing = family.bind(&bindings).expect_err("init_irq has no default");
    assert_eq!(
        missing.to_string(),
        format!("backend {name} does not bind irq.init_irq, which has no default")
    );
    bindings.bind(irq::op::InitIrq, Binding::call(Plain::new(init_irq))).expect("once");
    let twice = ops.bind(&mut bindings).expect_err("bound already");
    assert_eq!(twice.to_string(), format!("backend {name} binds irq.save_fl twice"));
    family.bind(&bindings).expect("complete");

    promises(model, ops);
    semantics(model, &format!("{name} indirect"));
    let mut inlined = vec![];
    let (patched, report) = family
        .apply(sites, &mut text, |o| {
            if o.form == pvops::Form::Inline && !inlined.contains(&o.op) {
                inlined.push(o.op);
            }
        })
        .expect("patched");
    println!("{name}: {report}");
    assert_eq!(report.indirect, 0);
    inlined.sort_unstable();
    // Safe halt and its like stay native and in line; of these four:
    inlined.retain(|op| op.contains("fl") || op.starts_with("irq"));
    assert_eq!(inlined, inline);
    semantics(model, &format!("{name} patched"));
    let family = patched.undo(sites, &mut text).expect("undone");
    semantics(model, &format!("{name} undone"));
    family.release();
}

#[test]
fn lguest_delivers_what_is_pending() {
    let _turn = turn();
    lguest::on_pending(hypercall::CALLEE_SAVE);
    run("lguest", &Lguest, &lguest::IRQ, &["irq_disable", "save_fl"]);
}

#[test]
fn xen_delivers_what_is_pending() {
    let _turn = turn();
    xen::on_pending(hypercall::CALLEE_SAVE);
    run("xen", &Xen, &xen::IRQ, &["irq_disable"]);
}

/// A compiled function is no callee-save function: what thunks are for. Its thunk is one.
#[test]
fn thunk_keeps_what_its_callee_does_not() {
    #[unsafe(naked)]
    extern "sysv64" fn trasher(a: usize) -> usize {
        core::arch::naked_asm!(
            "xor ecx, ecx",
            "xor edx, edx",
            "xor esi, esi",
            "xor edi, edi",
            "xor r8d, r8d",
            "xor r9d, r9d",
            "xor r10d, r10d",
            "xor r11d, r11d",
            // The stack's alignment where the callee finds its return address.
            "mov rax, rsp",
            "and eax, 15",
            "ret",
        )
    }
    #[callee_save]
    fn wrapped(a: usize) -> usize {
        // SAFETY: trashes what the convention lets it, as the compiler knows.
        unsafe {
            let result;
            core::arch::asm!(
                "call {f}", f = sym trasher, in("rdi") a, lateout("rax") result,
                clobber_abi("sysv64"),
            );
            result
        }
    }
    // SAFETY: both may be called.
    let (bare, kept) = unsafe {
        (
            probe::observe(trasher as *const (), &[5]),
            probe::observe(wrapped::CALLEE_SAVE.address(), &[5]),
        )
    };
    assert_eq!(bare.changed, convention::NATIVE.clobbers(CallKind::Plain));
    assert_eq!(kept.changed, convention::NATIVE.clobbers(CallKind::CalleeSave));
    assert_eq!((bare.result, kept.result), (8, 8), "aligned before the call");
}
