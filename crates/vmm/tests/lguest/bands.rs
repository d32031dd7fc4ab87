//! Every band's calls, direct and through the ring.

use lguest_abi::call::{FlushScope, ShutdownReason, number};
use lguest_abi::segments::GateKind;
use lguest_abi::{Band, Call, Paging, Phys, Virt};
use vmm::machine::{Machine, Outcome};

use super::guest::*;

#[test]
fn every_band_introduces_itself_and_powers_off() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        let offsets = band.layout().offsets();
        guest.expect(guest.field(offsets.reserve_mem), 0x40_0000, "reserve_mem");
        // What the loader has told it: memory, command line.
        guest.expect(0x2d8 + KERNEL, 32 << 20, "memory");
        guest.expect(0x1000 + KERNEL, u32::from_le_bytes(*b"quie"), "command line");
        if let Some(pgdir) = offsets.pgdir {
            // Two-level: entry 0 and that of PAGE_OFFSET are the same.
            guest.load(Reg::Eax, guest.field(pgdir));
            guest.raw(&[0x8b, 0x88, 0, 0x0c, 0, 0]); // mov ecx, [eax + 0xc00]
            guest.raw(&[0x33, 0x08]); // xor ecx, [eax]
            guest.raw(&[0x83, 0xe1, 0x9f]); // and ecx, ~0x60: accessed and dirty apart
            guest.save(var(0), Reg::Ecx);
            guest.expect(var(0), 0, "both halves of the first tables");
        }
        guest.check();
    }
}

#[test]
fn registers_are_kept_by_calls() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.raw(&[0xbd, 0x11, 0x22, 0x33, 0x44]); // mov ebp
        guest.call(Call::Ts(true));
        guest.save(var(0), Reg::Eax);
        guest.save(var(1), Reg::Esi);
        guest.raw(&[0x89, 0x2d]);
        guest.raw(&var(2).to_le_bytes());
        guest.call(Call::Ts(false));
        guest.expect(var(0), number::TS, "EAX");
        guest.expect(var(1), 0, "ESI");
        guest.expect(var(2), 0x4433_2211, "EBP");
        guest.check();
    }
}

#[test]
fn the_ring_is_drained_in_order_before_a_direct_call() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        // More than fit at once, twice around: the last of each wins.
        let descriptor = VARS + 0x100;
        for round in 0..3_u32 {
            for n in 0..40_u32 {
                guest.store(high(descriptor), 0x0000_ffff | n << 16);
                guest.store(high(descriptor) + 4, 0x00cf_f200 | round);
                guest.queue(Call::LoadTls { table: Phys(descriptor), cpu: 0 });
                guest.queue(Call::SetStack { ss: 0x69, esp: Virt(high(TRAP_STACK)), pages: 1 });
                guest.call(Call::FlushAsync);
            }
        }
        // Through entry 6, at 0x2_0027 now.
        guest.mov(Reg::Eax, 0x33);
        guest.raw(&[0x8e, 0xe8]); // mov gs, eax
        guest.store(high(0x2_0027 + 0x40_0000), 0x5a);
        guest.raw(&[0x65, 0xa1]); // mov eax, gs:[...]
        guest.raw(&high(0x40_0000).to_le_bytes());
        guest.save(var(0), Reg::Eax);
        guest.expect(var(0), 0x5a, "the last descriptor queued");
        // All slots are free again.
        let status = guest.field(band.layout().offsets().hcall_status);
        for word in 0..16 {
            guest.expect(status + word * 4, u32::MAX, "a slot is not free");
        }
        guest.check();
    }
}

#[test]
fn tls_takes_effect_under_a_loaded_register() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        let table = VARS + 0x100;
        let load = |guest: &mut Guest, base: u32| {
            guest.store(high(table), base << 16 | 0xffff);
            guest.store(high(table) + 4, 0x00cf_f200 | base >> 16 & 0xff | base & 0xff00_0000);
            guest.call(Call::LoadTls { table: Phys(table), cpu: 0 });
        };
        load(&mut guest, high(VARS));
        guest.mov(Reg::Eax, 0x33);
        guest.raw(&[0x8e, 0xe0]); // mov fs, eax
        load(&mut guest, high(VARS) + 4);
        guest.store(var(1), 0x1234);
        guest.raw(&[0x64, 0xa1, 0, 0, 0, 0]); // mov eax, fs:[0]
        guest.save(var(2), Reg::Eax);
        guest.expect(var(2), 0x1234, "the new base");
        guest.check();
    }
}

/// A page is taken away and given back, by each way of saying so.
#[test]
fn page_tables_change_as_calls_say() {
    for (band, paging) in all().into_iter().filter(|(band, _)| *band >= Band::V5) {
        let page = 0x90_0000;
        let entry = entry_of(paging, page);
        let other = 0x91_0000;
        for way in 0..4 {
            let mut guest = Guest::new(band, paging);
            guest.store(high(page), 1);
            guest.store(high(other), 2);
            guest.expect(high(page), 1, "at first");
            guest.store(entry, other | 7);
            let at = Virt(high(page));
            match way {
                0 => guest.call(Call::SetPte { top: TOP, at, entry: u64::from(other | 7) }),
                1 => guest.call(Call::FlushTlb(FlushScope::All)),
                2 => {
                    guest.queue(Call::SetPte { top: TOP, at, entry: u64::from(other | 7) });
                    guest.call(Call::FlushAsync);
                }
                _ => guest.call(Call::NewPgtable { top: TOP }),
            }
            guest.expect(high(page), 2, "the other page");
            // SET_PGD and, with PAE, SET_PMD are taken as well.
            guest.call(Call::SetPgd { top: TOP, index: 3 });
            if paging == Paging::Pae {
                guest.call(Call::SetPmd { table: TOP, index: 5 });
            }
            guest.expect(high(page), 2, "still");
            guest.check();
        }
    }
}

#[test]
fn pae_tables_of_old_bands_are_found_out_by_the_text() {
    for band in [Band::V3, Band::V4] {
        let mut guest = Guest::new(band, Paging::Pae);
        let pgdir = band.layout().offsets().pgdir.unwrap();
        // The PDPT: entry 0 and 3 are alike, with the present flag alone.
        guest.load(Reg::Eax, guest.field(pgdir));
        guest.raw(&[0x8b, 0x08]); // mov ecx, [eax]
        guest.raw(&[0x89, 0xca]); // mov edx, ecx
        guest.raw(&[0x33, 0x48, 0x18]); // xor ecx, [eax + 24]
        guest.raw(&[0x81, 0xe2, 0xff, 0x0f, 0, 0]); // and edx, 0xfff
        guest.save(var(0), Reg::Ecx);
        guest.save(var(1), Reg::Edx);
        guest.expect(var(0), 0, "both halves");
        guest.expect(var(1), 1, "flags");
        guest.call(Call::SetPmd { table: Phys(0), index: 0 });
        guest.check();
    }
}

#[test]
fn strings_are_printed_early_where_there_is_a_call_for_it() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        let text = VARS + 0x100;
        for (n, word) in b"hello, host\n\0\0\0\0".chunks(4).enumerate() {
            let word = u32::from_le_bytes(word.try_into().unwrap());
            guest.store(high(text) + 4 * n as u32, word);
        }
        if band == Band::V6 {
            guest.call(Call::Notify { address: Phys(text) });
            assert!(guest.dies().contains("hypercall 0x11 does not exist"));
            continue;
        }
        guest.call(Call::Notify { address: Phys(text) });
        assert_eq!(guest.check(), "hello, host\n");
    }
}

#[test]
fn the_end_has_a_reason() {
    for (band, paging) in all() {
        let end = |reason, text: &[u8; 8]| {
            let mut guest = Guest::new(band, paging);
            for (n, word) in text.chunks(4).enumerate() {
                let word = u32::from_le_bytes(word.try_into().unwrap());
                guest.store(high(VARS) + 4 * n as u32, word);
            }
            guest.call(Call::Shutdown { text: Phys(VARS), reason });
            guest.run().0
        };
        assert_eq!(end(ShutdownReason::Restart, b"again\0\0\0"), Outcome::Reset);
        let panic = Outcome::PanickedSaying("Oh no".into());
        assert_eq!(end(ShutdownReason::PowerOff, b"Oh\nno\0\0\0"), panic);
        assert_eq!(end(ShutdownReason::Crash, b"Oh no\0zz"), panic);
    }
}

#[test]
fn the_fpu_is_the_guests_to_switch() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.handler(7, GateKind::Interrupt, 0, |guest| {
            guest.inc(var(0));
            guest.raw(&[0x60]); // pusha
            guest.call(Call::Ts(false));
            guest.raw(&[0x61]); // popa
            guest.raw(&[0xcf]);
        });
        guest.raw(&[0xdb, 0xe3]); // fninit: TS is clear at first
        guest.expect(var(0), 0, "no trap at first");
        guest.call(Call::Ts(true));
        guest.raw(&[0xd9, 0xe8]); // fld1
        guest.raw(&[0xd9, 0xe8]);
        guest.expect(var(0), 1, "one trap");
        guest.queue(Call::Ts(true));
        guest.raw(&[0xd9, 0xe8]);
        guest.expect(var(0), 1, "queued, not done");
        guest.call(Call::FlushAsync);
        guest.raw(&[0xd9, 0xe8]);
        guest.expect(var(0), 2, "and done");
        guest.check();
    }
}

#[test]
fn one_vcpu_and_no_more() {
    let (mut config, _) = Guest::new(Band::V5, Paging::TwoLevel).config(1.0);
    config.cpus = 2;
    let error = Machine::new(config).unwrap_err();
    assert!(error.is_users() && error.to_string().contains("--cpus 1"), "{error}");
}

#[test]
fn the_ring_goes_round_again_and_again() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.repeat(var(100), 300, |guest| {
            for n in 0..64 {
                guest.queue(Call::Ts(n % 2 == 0));
            }
            guest.call(Call::FlushAsync);
            let offsets = guest.band.layout().offsets();
            let last = guest.field(offsets.hcall_status + 60);
            guest.expect(last, u32::MAX, "all slots are free again");
        });
        guest.check();
    }
}

#[test]
fn a_kernel_may_halt_by_the_instruction() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.handler(0x20, GateKind::Interrupt, 0, |guest| {
            guest.store(var(1), 1);
            // Once more, should it have come before the hlt.
            guest.raw(&[0x60]); // pushad
            guest.call(Call::SetClockevent { nanoseconds: 2_000_000 });
            guest.raw(&[0x61]); // popad
            guest.store(guest.irq_enabled(), 0x200);
            guest.raw(&[0xcf]);
        });
        guest.store(guest.blocked(), 0);
        guest.store(guest.irq_enabled(), 0x200);
        guest.call(Call::SetClockevent { nanoseconds: 2_000_000 });
        guest.raw(&[0xf4]);
        guest.expect(var(1), 1, "the clock ends a hlt with interrupts on");
        guest.check();
        // With interrupts off nothing does: it halts until somebody ends the run.
        let mut guest = Guest::new(band, paging);
        guest.store(guest.blocked(), 0);
        guest.call(Call::SetClockevent { nanoseconds: 1_000_000 });
        guest.raw(&[0xf4]);
        guest.done();
        let (config, _) = guest.config(0.3);
        let outcome = vmm::machine::Machine::new(config).unwrap().run().unwrap();
        assert_eq!(outcome, vmm::machine::Outcome::TimedOut, "{band}");
    }
}
