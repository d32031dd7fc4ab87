//! Traps of each kind, the frames they make, and the instructions the host carries out.

use lguest_abi::segments::GateKind;
use lguest_abi::{Band, Call, Paging, Virt};

use super::guest::*;

/// Saves the frame of a trap to variables: the error code if there is one, EIP, CS, EFLAGS;
/// then pushes it back with EIP `skip` further on, and returns.
fn record(guest: &mut Guest, first: u32, with_code: bool, skip: u8) {
    guest.inc(var(first));
    if with_code {
        guest.pop_to(var(first + 1));
    }
    guest.pop_to(var(first + 2));
    guest.pop_to(var(first + 3));
    guest.pop_to(var(first + 4));
    guest.push_from(var(first + 4));
    guest.push_from(var(first + 3));
    guest.raw(&[0x83, 0x05]); // add dword ptr [...], skip
    guest.raw(&var(first + 2).to_le_bytes());
    guest.raw(&[skip]);
    guest.push_from(var(first + 2));
    guest.raw(&[0xcf]);
}

#[test]
fn traps_in_the_kernel_are_reflected_with_their_frames() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.handler(6, GateKind::Interrupt, 0, |guest| record(guest, 0, false, 2));
        guest.handler(0, GateKind::Trap, 0, |guest| record(guest, 10, false, 2));
        guest.handler(13, GateKind::Interrupt, 0, |guest| record(guest, 20, true, 2));
        guest.handler(3, GateKind::Trap, 3, |guest| record(guest, 30, false, 0));
        guest.store(guest.irq_enabled(), 0x200);
        guest.raw(&[0x0f, 0x0b]); // ud2
        guest.expect(var(0), 1, "ud2 traps");
        guest.expect(var(3), 0x61, "CS");
        guest.raw(&[0xa1]); // mov eax, saved EFLAGS; and eax, IF
        guest.raw(&var(4).to_le_bytes());
        guest.raw(&[0x25, 0, 2, 0, 0]);
        guest.save(var(5), Reg::Eax);
        guest.expect(var(5), 0x200, "IF was on");
        guest.expect(guest.irq_enabled(), 0, "off in the handler of an interrupt gate");
        guest.raw(&[0x31, 0xc9, 0xf7, 0xf1]); // xor ecx, ecx; div ecx
        guest.expect(var(10), 1, "division");
        guest.raw(&[0xa1]);
        guest.raw(&var(14).to_le_bytes());
        guest.raw(&[0x25, 0, 2, 0, 0]);
        guest.save(var(5), Reg::Eax);
        guest.expect(var(5), 0, "IF was off, whatever the CPU's says");
        guest.store(guest.irq_enabled(), 0x200);
        guest.raw(&[0xcd, 0x03]); // int 3 is allowed
        guest.expect(var(30), 1, "breakpoint");
        guest.expect(guest.irq_enabled(), 0x200, "a trap gate leaves the flag");
        guest.raw(&[0xcd, 0x06]); // int 6 is not
        guest.expect(var(20), 1, "int 6");
        guest.expect(var(21), 6 << 3 | 2, "its error code");
        guest.raw(&[0xcd, 0x55]); // nor is a vector that nobody has
        guest.expect(var(20), 2, "int 0x55");
        guest.expect(var(21), 0x55 << 3 | 2, "its error code");
        guest.check();
    }
}

#[test]
fn page_faults_say_where_in_shared_data() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.handler(14, GateKind::Interrupt, 0, |guest| record(guest, 0, true, 5));
        let at = 0xf123_4567_u32;
        guest.raw(&[0xa2]); // mov [at], al
        guest.raw(&at.to_le_bytes());
        guest.expect(var(0), 1, "a fault");
        guest.expect(var(1), 2, "by a store of the kernel");
        guest.expect(guest.field(band.layout().offsets().cr2), at, "where");
        guest.check();
    }
}

#[test]
fn system_calls_and_faults_of_a_user_arrive_on_the_kernels_stack() {
    for (band, paging) in all() {
        for kind in [GateKind::Trap, GateKind::Interrupt] {
            let mut guest = Guest::new(band, paging);
            guest.user_segments();
            guest.store(guest.irq_enabled(), 0x200);
            let end = guest.label();
            guest.handler(0x80, kind, 3, |guest| {
                guest.kernel_data();
                guest.save(var(0), Reg::Esp);
                for n in 1..6 {
                    guest.pop_to(var(n));
                }
                guest.load(Reg::Ecx, guest.irq_enabled());
                guest.save(var(6), Reg::Ecx);
                guest.jmp(end);
            });
            guest.handler(13, GateKind::Interrupt, 0, |guest| {
                // What a user may not do is skipped.
                guest.kernel_data();
                guest.inc(var(10));
                guest.pop_to(var(11));
                guest.raw(&[0xff, 0x04, 0x24]); // inc dword ptr [esp]
                guest.store(guest.irq_enabled(), 0x200);
                guest.raw(&[0xcf]);
            });
            // hlt; mov al, 7; int 0x80
            guest.user(&[0xf4, 0xb0, 7, 0xcd, 0x80]);
            guest.enter_user();
            guest.bind(end);
            guest.expect(var(10), 1, "hlt in ring 3");
            guest.expect(var(11), 0, "its error code");
            guest.expect(var(0), high(TRAP_STACK) - 20, "five words on the kernel's stack");
            guest.expect(var(1), USER + 5, "EIP behind the instruction");
            guest.expect(var(2), 0x73, "CS");
            guest.expect(var(4), USER, "ESP");
            guest.expect(var(5), 0x7b, "SS");
            let flag = if kind == GateKind::Trap { 0x200 } else { 0 };
            guest.expect(var(6), flag, "the flag in the handler");
            guest.check();
        }
    }
}

#[test]
fn a_user_makes_no_hypercalls() {
    for (band, paging) in all() {
        let mut guest = Guest::new(band, paging);
        guest.user_segments();
        let end = guest.label();
        guest.handler(13, GateKind::Interrupt, 0, |guest| {
            guest.kernel_data();
            guest.pop_to(var(0));
            guest.jmp(end);
        });
        // mov eax, SHUTDOWN; int 0x1f
        guest.user(&[0xb8, 2, 0, 0, 0, 0xcd, 0x1f]);
        guest.enter_user();
        guest.bind(end);
        guest.expect(var(0), 0xfa, "general protection");
        guest.check();

        let mut guest = Guest::new(band, paging);
        guest.user_segments();
        let end = guest.label();
        guest.handler(6, GateKind::Interrupt, 0, |guest| {
            guest.kernel_data();
            guest.jmp(end);
        });
        guest.user(&[0xb8, 2, 0, 0, 0, 0x0f, 0x01, 0xc1]);
        guest.enter_user();
        guest.bind(end);
        guest.check();
    }
}

#[test]
fn instructions_beside_the_hooks_are_carried_out() {
    for (band, paging) in all() {
        let mut guest = Guest::bare(band, paging);
        // Before anything else: an early microcode loader, and a flag that stays.
        guest.mov(Reg::Esp, STACK);
        guest.mov(Reg::Ecx, 0x17);
        guest.mov(Reg::Eax, 0xffff);
        guest.raw(&[0x0f, 0x32]); // rdmsr
        guest.raw(&[0xa3]);
        guest.raw(&(VARS).to_le_bytes());
        guest.raw(&[0x0f, 0x30]); // wrmsr
        guest.raw(&[0x0f, 0x20, 0xd8]); // mov eax, cr3
        guest.raw(&[0x6a, 0, 0x9d]); // push 0; popf
        guest.begin();
        guest.expect(var(0), 0, "an MSR reads as zero");
        guest.raw(&[0x9c]);
        guest.pop_to(var(0));
        guest.raw(&[0xfa]); // cli
        guest.mov(Reg::Eax, 0x1234_5678);
        guest.raw(&[0xe4, 0x71]); // in al, 0x71
        guest.save(var(1), Reg::Eax);
        guest.expect(var(1), 0x1234_56ff, "in al");
        guest.mov(Reg::Eax, 0x1234_5678);
        guest.mov(Reg::Edx, 0x3f8);
        guest.raw(&[0x66, 0xed]); // in ax, dx
        guest.save(var(1), Reg::Eax);
        guest.expect(var(1), 0x1234_ffff, "in ax");
        guest.raw(&[0xed, 0xee, 0xef, 0xe6, 0x80, 0xe7, 0x80]); // in eax, dx; out
        guest.save(var(1), Reg::Eax);
        guest.expect(var(1), u32::MAX, "in eax");
        guest.mov(Reg::Eax, 0);
        guest.raw(&[0xe4, 0x64]);
        guest.save(var(1), Reg::Eax);
        let answer = if band == Band::V6 { 1 } else { 0xff };
        guest.expect(var(1), answer, "the keyboard's status");
        guest.raw(&[0x0f, 0x21, 0xc0]); // mov eax, dr0
        guest.save(var(1), Reg::Eax);
        guest.expect(var(1), 0, "dr0");
        guest.check();
    }
}

#[test]
fn a_stack_need_not_be_contiguous_in_memory() {
    for (band, paging) in all().into_iter().filter(|(band, _)| *band >= Band::V5) {
        let mut guest = Guest::new(band, paging);
        guest.user_segments();
        // The stack's last page but one is elsewhere; the frame crosses into it.
        let below = TRAP_STACK - 0x2000;
        guest.store(entry_of(paging, below), 0x98_0000 | 7);
        let at = Virt(high(below));
        guest.call(Call::SetPte { top: TOP, at, entry: 0x98_0007 });
        guest.call(Call::SetStack { ss: 0x69, esp: Virt(high(TRAP_STACK) - 0x1000 + 8), pages: 2 });
        let end = guest.label();
        guest.handler(0x80, GateKind::Trap, 3, |guest| {
            guest.kernel_data();
            guest.jmp(end);
        });
        guest.user(&[0xcd, 0x80]);
        guest.enter_user();
        guest.bind(end);
        guest.expect(high(TRAP_STACK - 0x1000 + 4), 0x7b, "SS on the upper page");
        guest.expect(high(0x98_0000 + 0xff8), 0x73, "CS on the lower page");
        guest.check();
    }
}

#[test]
fn vmcall_is_an_invalid_opcode_where_it_is_no_call() {
    for band in [Band::V5, Band::V6] {
        let mut guest = Guest::new(band, Paging::TwoLevel);
        guest.handler(6, GateKind::Interrupt, 0, |guest| record(guest, 0, false, 3));
        guest.raw(&[0x0f, 0x01, 0xc1]);
        guest.expect(var(0), 1, "invalid opcode");
        guest.check();
    }
}
