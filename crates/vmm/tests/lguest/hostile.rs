//! Guests that break the rules: each dies of one clear reason, and the machine ends in order.

use std::time::Duration;

use lguest_abi::call::{CallWords, FlushScope};
use lguest_abi::segments::GateKind;
use lguest_abi::{Band, Call, Paging, Phys, Virt};
use vmm::machine::{Machine, Outcome};

use super::guest::*;

#[track_caller]
fn dies_of(guest: &Guest, words: &str) {
    let reason = guest.dies();
    assert!(reason.contains(words) && !reason.contains('\n'), "{reason}");
}

#[test]
fn calls_that_make_no_sense_are_fatal_and_named() {
    for (band, paging) in all() {
        let after = |call: Call| {
            let mut guest = Guest::new(band, paging);
            guest.call(call);
            guest
        };
        let mut early = Guest::bare(band, paging);
        early.call(Call::Halt);
        dies_of(&early, "hypercall 0xa before LGUEST_INIT");
        let mut nowhere = Guest::bare(band, paging);
        nowhere.call(Call::Init { data: Phys(u32::MAX - 3) });
        dies_of(&nowhere, "names no lguest_data");
        dies_of(&after(Call::Init { data: Phys(DATA) }), "LGUEST_INIT twice");
        dies_of(&after(Call::LoadIdtEntry { vector: 256, low: 0, high: 0 }), "vector 0x100");
        dies_of(&after(Call::LoadIdtEntry { vector: 3, low: 0, high: 0x8500 }), "type 0x5");
        dies_of(&after(Call::SetStack { ss: 0x68, esp: Virt(0), pages: 1 }), "stack segment 0x68");
        dies_of(&after(Call::SetStack { ss: 0x69, esp: Virt(0), pages: 3 }), "3 pages");
        let reason = lguest_abi::call::ShutdownReason::PowerOff;
        let end = Phys(u32::MAX - 64);
        dies_of(&after(Call::Shutdown { text: end, reason }), "memory ends");
        dies_of(&after(Call::LoadTls { table: Phys(u32::MAX), cpu: 0 }), "memory ends");
        dies_of(&after(Call::NewPgtable { top: Phys(0xffff_f000) }), "memory ends");
        if band >= Band::V2 {
            let entry = Call::LoadGdtEntry { index: 32, low: 0, high: 0 };
            dies_of(&after(entry), "no descriptor 32");
        } else {
            dies_of(&after(Call::LoadGdt { table: Phys(0), count: 33 }), "33 descriptors");
            // A table without the segments it stands on.
            dies_of(&after(Call::LoadGdt { table: Phys(VARS), count: 32 }), "under CS");
        }
        if band >= Band::V5 {
            dies_of(&after(Call::SetPgd { top: TOP, index: 2000 }), "top-level entry 2000");
        }
    }
}

#[test]
fn traps_that_nobody_handles_are_fatal_and_named() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.raw(&[0x0f, 0x0b]);
        dies_of(&guest, "unhandled trap 6");
        let mut guest = Guest::new(band, paging);
        guest.load(Reg::Eax, 0xf000_0004);
        dies_of(&guest, "unhandled trap 14 (0xf0000004)");
    }
}

#[test]
fn stacks_that_are_not_there_are_fatal() {
    for (band, paging) in all() {
        // From ring 1, on its own stack.
        let mut guest = Guest::new(band, paging);
        guest.handler(6, GateKind::Interrupt, 0, |guest| guest.raw(&[0xcf]));
        guest.mov(Reg::Esp, 0xf000_0000);
        guest.raw(&[0x0f, 0x0b]);
        dies_of(&guest, "not mapped for writing");
        // From ring 3, on that of SET_STACK.
        for esp in [0, 2, 0xf000_0000, u32::MAX] {
            let mut guest = Guest::new(band, paging);
            guest.user_segments();
            guest.call(Call::SetStack { ss: 0x69, esp: Virt(esp), pages: 1 });
            guest.handler(6, GateKind::Interrupt, 0, |guest| guest.raw(&[0xcf]));
            guest.user(&[0x0f, 0x0b]);
            guest.enter_user();
            dies_of(&guest, "not mapped for writing");
        }
        // A stack segment that is none, and none at all.
        let mut guest = Guest::new(band, paging);
        guest.user_segments();
        guest.call(Call::SetStack { ss: 0x61, esp: Virt(high(TRAP_STACK)), pages: 1 });
        guest.handler(6, GateKind::Interrupt, 0, |guest| guest.raw(&[0xcf]));
        guest.user(&[0x0f, 0x0b]);
        guest.enter_user();
        dies_of(&guest, "stack segment 0x61");
    }
}

/// SET_STACK is told of both pages, and the one below is not there or may not be written.
#[test]
fn a_stack_must_be_there_when_it_is_named() {
    for (band, paging) in all() {
        let stack = |esp, pages| Call::SetStack { ss: 0x69, esp: Virt(esp), pages };
        let mut guest = Guest::new(band, paging);
        guest.call(stack(0xf000_0000, 1));
        dies_of(&guest, "kernel stack at 0xefffffff is not mapped");
        let mut guest = Guest::new(band, paging);
        guest.queue(stack(0xf000_0000, 2));
        guest.call(Call::FlushAsync);
        dies_of(&guest, "kernel stack at 0xefffffff is not mapped");
        // None is named.
        let mut guest = Guest::new(band, paging);
        guest.call(stack(0xf000_0000, 0));
        guest.check();
        if band < Band::V5 {
            continue;
        }
        for entry in [0, (TRAP_STACK - 0x2000) | 5, 0x4000_0007] {
            let mut guest = Guest::new(band, paging);
            guest.store(entry_of(paging, TRAP_STACK - 0x2000), entry);
            guest.call(Call::FlushTlb(FlushScope::All));
            guest.call(stack(high(TRAP_STACK), 1));
            guest.call(stack(high(TRAP_STACK), 2));
            guest.done();
            dies_of(&guest, "kernel stack at 0xc071efff is not mapped");
        }
    }
}

#[test]
fn memory_that_is_not_there_is_fatal() {
    for (band, paging) in all().into_iter().filter(|(band, _)| *band >= Band::V5) {
        // In linear mode, and through a table.
        let mut guest = Guest::bare(band, paging);
        guest.call(Call::Init { data: Phys(DATA) });
        guest.store(0x4000_0000, 1);
        guest.raw(&[0xeb, 0xfe]);
        dies_of(&guest, "physical 0x40000000");
        let mut guest = Guest::new(band, paging);
        guest.store(entry_of(paging, 0x90_0000), 0x4000_0007);
        guest.call(Call::FlushTlb(FlushScope::All));
        guest.load(Reg::Eax, high(0x90_0000));
        guest.raw(&[0xeb, 0xfe]);
        dies_of(&guest, "physical 0x40000000");
        // Running there.
        let mut guest = Guest::bare(band, paging);
        guest.mov(Reg::Eax, 0x4000_0000);
        guest.raw(&[0xff, 0xe0]);
        dies_of(&guest, "physical 0x40000000");
    }
}

/// Flags that old hosts would not shadow, in an entry that is used.
#[test]
fn entries_with_flags_they_must_not_have_are_fatal() {
    for (band, paging) in all().into_iter().filter(|(band, _)| *band >= Band::V5) {
        let page = 0x90_0000;
        let used = |at: u32, entry: u32| {
            let mut guest = Guest::new(band, paging);
            guest.store(at, entry);
            guest.call(Call::FlushTlb(FlushScope::All));
            guest.load(Reg::Eax, high(page));
            guest
        };
        dies_of(&used(entry_of(paging, page), page | 0x87), "page table entry 0x900087 has flags");
        // Those that are ignored.
        used(entry_of(paging, page), page | 0x11f).check();
        let (upper, level) = match paging {
            Paging::TwoLevel => (high(TOP.0) + ((KERNEL + page) >> 22) * 4, "top-level"),
            Paging::Pae => (high(TOP.0 + 0x1000) + (page >> 21) * 8, "middle-level"),
        };
        // A large page among them.
        for flag in [0x8, 0x10, 0x80, 0x100, 0x200, 0x800] {
            let entry = 0x80_0007 | flag;
            dies_of(&used(upper, entry), &format!("{level} table entry {entry:#x} has flags"));
        }
        if paging == Paging::Pae {
            for flag in [2, 0x8, 0x20, 0x200] {
                let entry = (TOP.0 + 0x1000) | 1 | flag;
                let words = format!("top-level table entry {entry:#x} has flags");
                dies_of(&used(high(TOP.0) + 8, entry), &words);
            }
        }
    }
}

/// An entry in a call is not used yet, unless it bears the marks of use.
#[test]
fn entries_are_judged_in_a_call_if_they_say_they_are_in_use() {
    for (band, paging) in all() {
        let told = |entry: u32| {
            let mut guest = Guest::new(band, paging);
            guest.queue(Call::SetPte { top: TOP, at: Virt(high(0x90_0000)), entry: entry.into() });
            guest.call(Call::FlushAsync);
            guest
        };
        told(0x90_0087).check();
        told(0x4000_0007).check();
        told(0x90_0067).check();
        dies_of(&told(0x90_00a7), "page table entry 0x9000a7 has flags");
        let outside = told(0x4000_0047);
        if band == Band::V6 {
            // A device may be there.
            outside.check();
        } else {
            dies_of(&outside, "entry 0x40000047 leads outside the guest's memory");
        }
    }
}

/// Page tables that are their own next level, and tops that are no tables.
#[test]
fn tables_that_lead_to_themselves_end_somehow() {
    for (band, paging) in all().into_iter().filter(|(band, _)| *band >= Band::V5) {
        let mut guest = Guest::new(band, paging);
        let itself = TOP.0 | 7;
        for n in (0..0x400).filter(|n| ![0, 1, 6, 7, 0x300, 0x301, 0x302].contains(n)) {
            guest.store(high(TOP.0) + n * 4, itself);
        }
        guest.call(Call::FlushTlb(FlushScope::All));
        guest.mov(Reg::Ebx, 0x1000_0000);
        let again = guest.here();
        guest.raw(&[0xff, 0x03]); // inc dword ptr [ebx]
        guest.raw(&[0x81, 0xc3, 0, 0x10, 0, 0]); // add ebx, 0x1000
        guest.jmp(again);
        let (mut config, _) = guest.config(1.0);
        config.timeout = Some(Duration::from_millis(500));
        let outcome = Machine::new(config).unwrap().run().unwrap();
        assert!(matches!(outcome, Outcome::Died(_) | Outcome::TimedOut), "{outcome:?}");
    }
    let mut guest = Guest::bare(Band::V5, Paging::TwoLevel);
    guest.call(Call::Init { data: Phys(DATA) });
    guest.call(Call::NewPgtable { top: Phys(VARS) });
    dies_of(&guest, "neither of two-level nor of PAE");
}

/// Numbers from a seed: the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }

    /// An argument: anything, or something that nearly makes sense.
    fn argument(&mut self) -> u32 {
        match self.next() % 8 {
            0 => self.next(),
            1 => self.next() % 40,
            2 => VARS + self.next() % 0x1000,
            3 => high(VARS + self.next() % 0x1000),
            4 => (32 << 20) - self.next() % 64,
            5 => 0x69,
            6 => u32::MAX - self.next() % 64,
            _ => TOP.0,
        }
    }
}

#[test]
fn random_calls_end_in_order() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..40 {
        for (band, paging) in all() {
            let mut guest = Guest::new(band, paging);
            for n in 0..30 {
                let words = CallWords {
                    number: random.next() % 22,
                    args: std::array::from_fn(|_| random.argument()),
                };
                // HALT with nothing to wait for is a fine way to wait for ever.
                if words.number == lguest_abi::call::number::HALT {
                    continue;
                }
                let Ok(call) = Call::decode(band, paging, &words) else { continue };
                if n % 3 == 0 { guest.queue(call) } else { guest.call(call) }
            }
            guest.done();
            let (config, _) = guest.config(5.0);
            let outcome = Machine::new(config).unwrap().run().unwrap();
            assert!(!matches!(outcome, Outcome::TripleFault { .. }), "{round} {band}");
        }
    }
}
