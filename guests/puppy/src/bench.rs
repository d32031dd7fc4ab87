//! How long things take: one line each, in nanoseconds.

use lguest_guest::hypercall::{self, Call};
use lguest_guest::{
    InterruptOps, Platform, irq, platform, power, println, set_interrupt_ops, time,
};

use crate::{programs, threads};

/// Measures, and ends.
pub(crate) fn run() -> ! {
    print_all();
    power::off()
}

/// How often each thing is done.
const OFTEN: u64 = 200_000;
const SELDOM: u64 = 20_000;

/// Nanoseconds that one of `count` takes.
fn each(count: u64, work: impl FnOnce()) -> u64 {
    let start = time::now();
    work();
    (time::now() - start) / count
}

fn show(what: &str, nanoseconds: u64) {
    let rate = 1_000_000_000 / nanoseconds.max(1);
    println!("bench: {what}: {nanoseconds} ns, {rate} a second");
}

pub(crate) fn print_all() {
    show("empty loop", each(OFTEN, || (0..OFTEN).for_each(|n| _ = core::hint::black_box(n))));
    for form in [InterruptOps::Called, InterruptOps::Patched] {
        irq::without(|| set_interrupt_ops(form));
        interrupt_ops(form);
    }
    if platform() == Platform::Lguest {
        // One that does next to nothing.
        let call = Call::Ts(false);
        show("hypercall, direct", each(SELDOM, || (0..SELDOM).for_each(|_| hypercall::call(call))));
        let batches = SELDOM / 60;
        let batched = || {
            for _ in 0..batches {
                (0..60).for_each(|_| hypercall::queue(call));
                hypercall::call(Call::FlushAsync);
            }
        };
        show("hypercall, one of 60 in the ring", each(batches * 60, batched));
    }
    context_switch();
    system_call();
}

fn interrupt_ops(form: InterruptOps) {
    let name = |op: &str| alloc::format!("{op}, {form:?}");
    irq::disable();
    let flags = irq::save();
    show(&name("save"), each(OFTEN, || (0..OFTEN).for_each(|_| _ = irq::save())));
    show(&name("restore"), each(OFTEN, || (0..OFTEN).for_each(|_| irq::restore(flags))));
    show(&name("disable"), each(OFTEN, || (0..OFTEN).for_each(|_| irq::disable())));
    irq::enable();
    show(&name("enable"), each(OFTEN, || (0..OFTEN).for_each(|_| irq::enable())));
}

/// Two threads that yield to each other.
fn context_switch() {
    let body = || {
        (0..SELDOM / 2).for_each(|_| threads::yield_now());
        0
    };
    let before = threads::switches();
    let start = time::now();
    let pair = [threads::spawn("ping", None, body), threads::spawn("pong", None, body)];
    let _ = pair.map(threads::join);
    let count = (threads::switches() - before).max(1);
    show("context switch", (time::now() - start) / count);
}

fn system_call() {
    let Some(beg) = programs::find("beg") else { return };
    let calls = || {
        if let Ok(id) = beg.start(SELDOM) {
            threads::join(id);
        }
    };
    show("system call", each(SELDOM, calls));
}
