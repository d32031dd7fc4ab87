//! Port instructions, and hypercalls.

use super::*;
use crate::state::rflags::RFlags;

#[test]
fn the_bitmap_decides_below_iopl() {
    let run = |prepare: &dyn Fn(&mut Guest), code: &[u8]| {
        let mut guest = Guest::long();
        prepare(&mut guest);
        guest.set(Gpr::Rax, 0);
        let end = guest.run_user(&[code, &[0x0f, 0x0b]].concat());
        (end, guest.reg(Gpr::Rax))
    };
    let byte = [0xe4, 0x17];
    let word = [0x66, 0xe5, 0x17];
    assert_eq!(run(&|_| {}, &byte).0, gp(0));
    // Port 0x17 is bit 7 of byte 2; 0x18 the next byte's bit 0.
    let open = |guest: &mut Guest| guest.machine.put(TSS + 0x68 + 2, &[0x7f]);
    assert_eq!(run(&open, &byte), (UD, 0xff));
    assert_eq!(run(&open, &word).0, gp(0), "both bytes of a word");
    let both = |guest: &mut Guest| guest.machine.put(TSS + 0x68 + 2, &[0x7f, 0xfe]);
    assert_eq!(run(&both, &word), (UD, 0xffff));
    let short = |guest: &mut Guest| {
        open(guest);
        guest.machine.vcpu.state.tr.limit = 0x68 + 2;
    };
    assert_eq!(run(&short, &byte).0, gp(0), "two bytes of bitmap are read");
    let by_level = |guest: &mut Guest| guest.machine.vcpu.state.rflags |= RFlags::IOPL;
    assert_eq!(run(&by_level, &byte), (UD, 0xff));
}

#[test]
fn repeated_input_stops_where_it_faults_and_goes_on() {
    let mut guest = Guest::long();
    guest.machine.set_present(0xd000, false);
    guest.set(Gpr::Rdi, 0xcff0);
    guest.set(Gpr::Rcx, 0x20);
    // rep insb
    assert_eq!(guest.run(&[0xf3, 0x6c]), End::Vector(14, Some(2)));
    assert_eq!((guest.reg(Gpr::Rdi), guest.reg(Gpr::Rcx)), (0xd000, 0x10));
    assert_eq!(guest.machine.vcpu.state.cr2, 0xd000);
    assert_eq!(guest.stack(1), CODE);
    guest.machine.set_present(0xd000, true);
    assert_eq!(guest.run(&[0xf3, 0x6c]), End::Done);
    assert_eq!((guest.reg(Gpr::Rdi), guest.reg(Gpr::Rcx)), (0xd010, 0));
    assert_eq!(guest.machine.get(0xcff0, 0x20), [0xff; 0x20]);
    assert_eq!(guest.machine.get(0xd010, 1), [0]);
}

#[test]
fn long_repeats_are_done_in_pieces() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rdi, 0x4_0000);
    guest.set(Gpr::Rcx, 1000);
    // rep insd; then backwards with rep outsd
    assert_eq!(guest.run(&[0xf3, 0x6d]), End::Done);
    assert_eq!((guest.reg(Gpr::Rdi), guest.reg(Gpr::Rcx)), (0x4_0000 + 4000, 0));
    guest.set(Gpr::Rsi, 0x4_0000);
    guest.set(Gpr::Rcx, 3);
    assert_eq!(guest.run(&[0xfd, 0xf3, 0x6f]), End::Done);
    assert_eq!(guest.reg(Gpr::Rsi), 0x4_0000 - 12);
}

#[test]
fn hypercalls_reach_the_environment() {
    let mut guest = Guest::long();
    assert_eq!(guest.run(&[0x0f, 0x01, 0xc1]), End::Done);
    assert_eq!(guest.reg(Gpr::Rax), u64::MAX);
    let mut guest = Guest::protected();
    assert_eq!(guest.run(&[0x0f, 0x01, 0xd9]), End::Done);
    assert_eq!(guest.reg(Gpr::Rax), 0xffff_ffff);
}
