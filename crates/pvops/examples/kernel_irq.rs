//! A tiny kernel's interrupt ops, as it would run under lguest.
//!
//! The kernel's code says `irq_disable()` and does not know what that is. At boot it finds
//! out where it runs, binds the family, and patches its own text. Run it with
//! `cargo run -p pvops --example kernel_irq`: the host is played by a few lines below,
//! and the text is patched as programs do it; a kernel brings a `Text` of its own.

use pvops::backend::{IF, IrqOps, lguest};
use pvops::families::irq;
use pvops::user::{DualMapping, Threads};
use pvops::{Binding, Bindings, Family, Plain, Sites, callee_save};
use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};

/// The kernel's work queue: a critical section like any other.
#[inline(never)]
fn enqueue(queue: &mut Vec<u32>, work: u32) {
    // SAFETY: this kernel runs at the privilege that its backend wants.
    unsafe {
        let flags = irq::save_fl();
        irq::irq_disable();
        queue.push(work);
        // If the host has an interrupt by now, it comes here.
        irq::restore_fl(flags);
    }
}

static TAKEN: AtomicU32 = AtomicU32::new(0);

/// The hypercall SEND_INTERRUPTS, as far as this host goes. An ordinary function: its
/// thunk lets it be called where no register may change.
#[callee_save]
fn send_interrupts() {
    lguest::SHARED.irq_pending.store(0, Ordering::SeqCst);
    TAKEN.fetch_add(1, Ordering::SeqCst);
}

extern "sysv64" fn init_irq() {}

/// Where do we run? A kernel asks CPUID or its boot parameters.
fn probe() -> Option<(&'static str, &'static IrqOps)> {
    Some(("lguest", &lguest::IRQ))
}

fn main() -> Result<(), Box<dyn Error>> {
    // Boot, one CPU: bind first, then patch.
    let (name, ops) = probe().unwrap_or(("native", &IrqOps::NATIVE));
    lguest::on_pending(send_interrupts::CALLEE_SAVE);
    let mut bindings = Bindings::new(name);
    ops.bind(&mut bindings)?;
    bindings.bind(irq::op::InitIrq, Binding::call(Plain::new(init_irq)))?;
    let mut family = irq::Family::claim()?;
    family.bind(&bindings)?;

    let sites = Sites::of_program();
    // SAFETY: no second thread yet.
    let mut text = DualMapping::around(sites, unsafe { Threads::assume_alone() })?;
    let (_patched, report) =
        family.apply(sites, &mut text, |site| println!("{site}")).map_err(|(_, error)| error)?;
    println!("{name}: {report}");

    // Running: an interrupt arrives while the queue is locked, and is taken right after.
    let mut queue = vec![];
    lguest::SHARED.irq_enabled.store(IF as u32, Ordering::SeqCst);
    lguest::SHARED.irq_pending.store(IF as u32, Ordering::SeqCst);
    enqueue(&mut queue, 1);
    println!("queued {queue:?}, interrupts taken: {}", TAKEN.load(Ordering::SeqCst));
    assert_eq!(TAKEN.load(Ordering::SeqCst), 1);
    Ok(())
}
