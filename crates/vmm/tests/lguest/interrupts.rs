//! Interrupts: the flag, the mask, the window in which none may come, halting and the clock.

use lguest_abi::segments::GateKind;
use lguest_abi::{Band, Call, Paging};

use super::guest::*;

const CLOCK: u8 = 0x20;

/// Counts in variable 0, saves the frame's EIP and EFLAGS to 1 and 2, and goes on with the
/// flag as it was.
fn count(guest: &mut Guest) {
    guest.inc(var(0));
    guest.pop_to(var(1));
    guest.pop_to(var(3));
    guest.pop_to(var(2));
    guest.push_from(var(2));
    guest.push_from(var(3));
    guest.push_from(var(1));
    guest.push_from(var(2));
    guest.pop_to(guest.irq_enabled());
    guest.raw(&[0xcf]);
}

fn with_clock(band: Band, paging: Paging) -> Guest {
    let mut guest = Guest::new(band, paging);
    guest.handler(CLOCK, GateKind::Interrupt, 0, count);
    guest.store(guest.blocked(), 0);
    guest
}

#[test]
fn halt_waits_for_the_clock_and_wakes_with_interrupts_on() {
    for (band, paging) in all() {
        let mut guest = with_clock(band, paging);
        for n in 1..4 {
            guest.store(guest.irq_enabled(), 0);
            guest.call(Call::SetClockevent { nanoseconds: 2_000_000 });
            guest.call(Call::Halt);
            guest.expect(var(0), n, "one interrupt for each event");
        }
        let time = guest.field(band.layout().offsets().time);
        guest.load(Reg::Eax, time);
        guest.raw(&[0xc1, 0xe8, 30]); // shr eax, 30: later than 2004
        guest.save(var(5), Reg::Eax);
        guest.expect(var(5), 1, "the time of day");
        guest.check();
    }
}

#[test]
fn an_interrupt_waits_for_the_flag_and_comes_without_being_asked_for() {
    for (band, paging) in all() {
        let mut guest = with_clock(band, paging);
        guest.store(guest.irq_enabled(), 0);
        guest.call(Call::SetClockevent { nanoseconds: 100 });
        if let Some(pending) = band.layout().offsets().irq_pending {
            let pending = guest.field(pending);
            guest.wait_for(pending, 0x200);
            guest.expect(var(0), 0, "not while they are off");
            // Bit 1 of EFLAGS, as an iret path leaves it, does not count for the flag.
            guest.store(guest.irq_enabled(), 2);
            guest.raw(&[0xeb, 0]);
            guest.expect(var(0), 0, "nor by another bit");
            guest.store(guest.irq_enabled(), 0x202);
            guest.wait_for(var(0), 1);
            guest.expect(pending, 0, "none waits any more");
        } else {
            guest.store(guest.irq_enabled(), 0x200);
            guest.wait_for(var(0), 1);
        }
        guest.check();
    }
}

#[test]
fn a_masked_interrupt_comes_when_it_is_unmasked() {
    for (band, paging) in all() {
        let mut guest = with_clock(band, paging);
        guest.store(guest.blocked(), 1);
        guest.store(guest.irq_enabled(), 0x200);
        guest.call(Call::SetClockevent { nanoseconds: 100 });
        // Long enough for it to be raised: count to 20 million.
        guest.mov(Reg::Ecx, 20_000_000);
        guest.raw(&[0x49, 0x75, 0xfd]); // dec ecx; jnz
        guest.expect(var(0), 0, "not while it is masked");
        // In plain memory, without a word.
        guest.store(guest.blocked(), 0);
        guest.wait_for(var(0), 1);
        guest.check();
    }
}

#[test]
fn a_cancelled_clock_event_does_not_come() {
    let mut guest = with_clock(Band::V5, Paging::TwoLevel);
    guest.store(guest.irq_enabled(), 0x200);
    guest.call(Call::SetClockevent { nanoseconds: 50_000_000 });
    guest.call(Call::SetClockevent { nanoseconds: 0 });
    guest.call(Call::SetClockevent { nanoseconds: 100_000_000 });
    guest.call(Call::Halt);
    guest.expect(var(0), 1, "only the second");
    guest.check();
}

#[test]
fn nothing_is_pushed_into_the_window() {
    for (band, paging) in all().into_iter().filter(|(band, _)| *band != Band::V6) {
        let mut guest = with_clock(band, paging);
        let (start, end) = (guest.label(), guest.label());
        guest.window(start, end);
        guest.store(guest.irq_enabled(), 0);
        guest.call(Call::SetClockevent { nanoseconds: 100 });
        // In the window with interrupts on: for long enough, over many blocks.
        guest.mov(Reg::Ecx, 20_000_000);
        guest.bind(start);
        guest.store(guest.irq_enabled(), 0x200);
        guest.raw(&[0x49, 0x75, 0xfd]);
        guest.load(Reg::Eax, var(0));
        guest.bind(end);
        guest.save(var(4), Reg::Eax);
        guest.wait_for(var(0), 1);
        guest.expect(var(4), 0, "none within the window");
        guest.check();
    }
}

#[test]
fn at_v6s_iret_the_frame_is_taken_over() {
    for paging in [Paging::TwoLevel, Paging::Pae] {
        let mut guest = with_clock(Band::V6, paging);
        let (iret, target) = (guest.label(), guest.label());
        guest.window(iret, iret);
        let pending = guest.field(Band::V6.layout().offsets().irq_pending.unwrap());
        guest.store(guest.irq_enabled(), 0);
        guest.call(Call::SetClockevent { nanoseconds: 100 });
        guest.wait_for(pending, 0x200);
        // An interrupt's way back: the frame, the flag from it, and the iret, where the
        // interrupt that waits comes (the jump makes a block of it).
        guest.save(var(8), Reg::Esp);
        guest.push(0x202);
        guest.push(0x61);
        guest.mov_label(Reg::Eax, target);
        guest.raw(&[0x50]); // push eax
        guest.raw(&[0xff, 0x74, 0x24, 8]); // push [esp + 8]
        guest.pop_to(guest.irq_enabled());
        guest.jmp(iret);
        guest.bind(iret);
        guest.raw(&[0xcf]);
        guest.expect(var(8), 0, "not reached");
        guest.bind(target);
        guest.save(var(9), Reg::Esp);
        guest.expect(var(0), 1, "the interrupt came");
        guest.mov_label(Reg::Eax, target);
        guest.raw(&[0x33, 0x05]); // xor eax, [saved EIP]
        guest.raw(&var(1).to_le_bytes());
        guest.save(var(10), Reg::Eax);
        guest.expect(var(10), 0, "with the frame of the iret");
        guest.load(Reg::Eax, var(8));
        guest.raw(&[0x33, 0x05]);
        guest.raw(&var(9).to_le_bytes());
        guest.save(var(10), Reg::Eax);
        guest.expect(var(10), 0, "and the stack is as it was");
        guest.expect(guest.irq_enabled(), 0x202, "interrupts are on again");
        guest.check();
    }
}

#[test]
fn an_interrupt_in_ring_3_comes_on_the_kernels_stack() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.user_segments();
        let end = guest.label();
        guest.handler(CLOCK, GateKind::Interrupt, 0, |guest| {
            guest.kernel_data();
            guest.save(var(0), Reg::Esp);
            guest.jmp(end);
        });
        guest.store(guest.blocked(), 0);
        guest.call(Call::SetClockevent { nanoseconds: 100 });
        // So that it comes there and not before, the user sets the flag, which these tables
        // let it: push 0x7b; pop ds; mov dword ptr [irq_enabled], 0x200; jmp to self
        let flag = guest.irq_enabled().to_le_bytes();
        guest.user(
            &[&[0x6a, 0x7b, 0x1f, 0xc7, 0x05][..], &flag, &[0, 2, 0, 0, 0xeb, 0xfe]].concat(),
        );
        guest.enter_user();
        guest.bind(end);
        guest.expect(var(0), high(TRAP_STACK) - 20, "five words");
        guest.expect(high(TRAP_STACK) - 20, USER + 13, "EIP");
        guest.check();
    }
}

#[test]
fn an_interrupt_without_a_gate_waits_for_one() {
    let mut guest = Guest::new(Band::V5, Paging::TwoLevel);
    guest.store(guest.blocked(), 0);
    guest.store(guest.irq_enabled(), 0x200);
    guest.call(Call::SetClockevent { nanoseconds: 100 });
    guest.call(Call::Halt);
    guest.handler(CLOCK, GateKind::Interrupt, 0, count);
    guest.wait_for(var(0), 1);
    guest.check();
}
