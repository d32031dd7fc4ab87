//! What the lguest ABI costs a guest: hypercalls one by one and in batches, and the interrupt
//! flag through each form that kernels had for it.
//!
//! `cargo bench -p vmm --bench lguest`. Each line is a loop in a conformance guest, less the
//! same loop with nothing in it; the best of three.

#![allow(missing_docs, reason = "a benchmark")]

use std::time::{Duration, Instant};

use lguest_abi::{Band, Call, Paging, Virt};
use vmm::machine::{Machine, Outcome};

#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/lguest/guest.rs"]
mod guest;

use guest::{Guest, Reg, TOP, high, var};

/// Code for one thing that a guest does.
type Form<'a> = &'a dyn Fn(&mut Guest);

const RUNS: usize = 3;
/// Slots of the ring.
const BATCH: u32 = 64;

fn seconds(band: Band, rounds: u32, body: &dyn Fn(&mut Guest)) -> Duration {
    let once = || {
        let mut guest = Guest::new(band, Paging::TwoLevel);
        // A trap that is reflected would show as a panic.
        guest.repeat(var(100), rounds, body);
        guest.done();
        let (config, console) = guest.config(600.0);
        let machine = Machine::new(config).unwrap();
        let start = Instant::now();
        let outcome = machine.run().unwrap();
        assert_eq!(outcome, Outcome::PoweredOff, "{}", console.text());
        start.elapsed()
    };
    (0..RUNS).map(|_| once()).min().unwrap()
}

/// Nanoseconds for each of `per` things that `body` does.
fn cost(band: Band, rounds: u32, per: u32, body: &dyn Fn(&mut Guest)) -> f64 {
    let with = seconds(band, rounds, body);
    let without = seconds(band, rounds, &|_| {});
    with.saturating_sub(without).as_secs_f64() * 1e9 / f64::from(rounds) / f64::from(per)
}

fn line(what: &str, nanoseconds: f64) {
    println!("| {what} | {nanoseconds:.1} | {:.2} |", 1e3 / nanoseconds);
}

fn pte() -> Call {
    Call::SetPte { top: TOP, at: Virt(0x10_0000), entry: 0 }
}

/// Ten of them, so that the loop itself weighs little.
fn ten(body: impl Fn(&mut Guest)) -> impl Fn(&mut Guest) {
    move |guest| (0..10).for_each(|_| body(guest))
}

fn main() {
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    println!("| what | ns each | million a second |");
    println!("|---|---|---|");
    for (band, trap) in [(Band::V5, "int $0x1f"), (Band::V2, "vmcall")] {
        let sync = cost(band, 200_000, 1, &|guest| guest.call(Call::FlushAsync));
        line(&format!("hypercall that does nothing, {trap}"), sync);
    }
    line("SET_PTE, one by one", cost(Band::V5, 200_000, 1, &|guest| guest.call(pte())));
    let batched = cost(Band::V5, 10_000, BATCH, &|guest| {
        (0..BATCH).for_each(|_| guest.queue(pte()));
        guest.call(Call::FlushAsync);
    });
    line("SET_PTE, 64 in the ring and a call", batched);

    let word = Guest::new(Band::V5, Paging::TwoLevel).irq_enabled();
    let pending = word + 20;
    let flag: [(&str, Form<'_>); 4] = [
        ("save", &move |guest| guest.load(Reg::Eax, word)),
        ("disable", &move |guest| guest.store(word, 0)),
        ("enable, and a look at irq_pending", &move |guest| {
            guest.store(word, 0x200);
            guest.compare(pending, 0);
        }),
        ("restore, and a look at irq_pending", &move |guest| {
            guest.save(word, Reg::Eax);
            guest.compare(pending, 0);
        }),
    ];
    for (what, body) in flag {
        line(&format!("{what}: in line"), cost(Band::V5, 1_000_000, 10, &ten(body)));
    }
    for (what, body) in flag {
        // A function behind a table that keeps what C may change: a call, two registers.
        let thunk = move |guest: &mut Guest| {
            let over = guest.label();
            let function = guest.label();
            guest.jmp(over);
            guest.bind(function);
            guest.raw(&[0x51, 0x52]); // push ecx; push edx
            body(guest);
            guest.raw(&[0x5a, 0x59, 0xc3]); // pop edx; pop ecx; ret
            guest.bind(over);
            guest.mov_label(Reg::Ecx, function);
            guest.save(var(101), Reg::Ecx);
            for _ in 0..10 {
                guest.raw(&[0xff, 0x15]); // call [var 101]
                guest.raw(&var(101).to_le_bytes());
            }
        };
        line(&format!("{what}: through a thunk"), cost(Band::V5, 200_000, 10, &thunk));
    }
    // Where nobody had put a hook: the instruction traps and is emulated.
    line("disable: cli, trapped", cost(Band::V5, 200_000, 1, &|guest| guest.raw(&[0xfa])));
    assert_eq!(high(0), 0xc000_0000);
}
