//! Single step and breakpoints.

use super::*;
use crate::state::control::Cr4;
use crate::state::rflags::RFlags;

const DB: End = End::Vector(1, None);

/// `pushfq; or dword [rsp], 0x100; popfq`: sets TF. 9 bytes.
const SET_TF: [u8; 9] = [0x9c, 0x81, 0x0c, 0x24, 0x00, 0x01, 0, 0, 0x9d];

fn dr6(guest: &Guest) -> u64 {
    guest.machine.vcpu.state.dr6
}

#[test]
fn single_step_traps_after_the_next_instruction() {
    let mut guest = Guest::long();
    let code = [&SET_TF[..], &[0x90, 0x90]].concat();
    assert_eq!(guest.run(&code), DB);
    assert_eq!(guest.stack(0), CODE + 10);
    assert_eq!(dr6(&guest) & 0xe00f, 1 << 14);
    assert!(!guest.machine.vcpu.state.rflags.contains(RFlags::TF));
    // Stepping on: every instruction traps once until TF goes.
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, 0);
    guest.handler(1, &[0xff, 0xc3, 0x48, 0xcf]);
    // nop; nop; popfq of flags without TF; nop
    let code = [&[0x6a, 0x02][..], &SET_TF, &[0x90, 0x90, 0x9d, 0x90]].concat();
    assert_eq!(guest.run(&code), End::Done);
    assert_eq!(guest.reg(Gpr::Rbx), 3, "the popf that clears TF still traps");
}

#[test]
fn software_interrupts_swallow_the_step() {
    let mut guest = Guest::long();
    assert_eq!(guest.run(&[&SET_TF[..], &[0xcd, 0x21]].concat()), End::Vector(0x21, None));
    assert_ne!(guest.stack(2) & RFlags::TF.bits(), 0, "the frame keeps TF");
}

#[test]
fn a_load_of_ss_holds_the_step_off_for_one_instruction() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rcx, u64::from(sel::DATA));
    // popfq sets TF; mov ss, ecx; nop; nop: the trap comes after the nop behind the load.
    let code = [&SET_TF[..], &[0x8e, 0xd1, 0x90, 0x90]].concat();
    assert_eq!(guest.run(&code), DB);
    assert_eq!(guest.stack(0), CODE + 12);
}

#[test]
fn a_load_of_ss_does_not_hold_instruction_breakpoints_off() {
    let mut guest = Guest::long();
    guest.set(Gpr::Rcx, u64::from(sel::DATA));
    set_breakpoint(&mut guest, CODE + 2, dr7(0, 0));
    // mov ss, ecx; nop
    assert_eq!(guest.run(&[0x8e, 0xd1, 0x90]), DB);
    assert_eq!((guest.stack(0), guest.machine.vcpu.state.dr6 & 0xf), (CODE + 2, 2));

    // What the load itself read is reported at the same time, or with no other breakpoint
    // after the next instruction.
    guest.machine.put(DATA, &sel::DATA.to_le_bytes());
    let both = dr7(0, 0) | 1 << 4 | (3 | 1 << 2) << 24;
    let load = [0x8e, 0x14, 0x25, 0x00, 0xc0, 0, 0, 0x90, 0x90];
    set_breakpoint(&mut guest, CODE + 7, both);
    guest.machine.vcpu.state.dr[2] = DATA;
    assert_eq!(guest.run(&load), DB);
    assert_eq!((guest.stack(0), guest.machine.vcpu.state.dr6 & 0xf), (CODE + 7, 6));
    guest.machine.vcpu.state.dr7 &= !(1 << 2);
    guest.machine.vcpu.state.dr6 &= !0xf;
    assert_eq!(guest.run(&load), DB);
    assert_eq!((guest.stack(0), guest.machine.vcpu.state.dr6 & 0xf), (CODE + 8, 4));
    // An int1 there is one exception with it, not two.
    guest.machine.vcpu.state.dr6 &= !0xf;
    guest.set(Gpr::Rsp, STACK);
    let load = [0x8e, 0x14, 0x25, 0x00, 0xc0, 0, 0, 0xf1, 0x90];
    assert_eq!(guest.run(&load), DB);
    assert_eq!((guest.stack(0), guest.machine.vcpu.state.dr6 & 0xf), (CODE + 8, 4));
}

fn set_breakpoint(guest: &mut Guest, addr: u64, dr7: u64) {
    guest.set(Gpr::Rax, addr);
    guest.set(Gpr::Rdx, dr7);
    // mov dr1, rax; mov dr7, rdx
    assert_eq!(guest.run(&[0x0f, 0x23, 0xc8, 0x0f, 0x23, 0xfa]), End::Done);
}

/// DR7 for breakpoint 1.
fn dr7(condition: u64, len: u64) -> u64 {
    1 << 2 | condition << 20 | len << 22
}

#[test]
fn instruction_breakpoints_fault_once_and_resume() {
    let mut guest = Guest::long();
    set_breakpoint(&mut guest, CODE + 1, dr7(0, 0));
    assert_eq!(guest.run(&[0x90, 0x90, 0x90]), DB);
    assert_eq!((guest.stack(0), dr6(&guest) & 0xf), (CODE + 1, 2));
    // inc ebx; or dword [rsp+16], RF; iretq
    guest.handler(1, &[0xff, 0xc3, 0x81, 0x4c, 0x24, 16, 0, 0, 1, 0, 0x48, 0xcf]);
    guest.set(Gpr::Rbx, 0);
    assert_eq!(guest.run(&[0x90, 0x90, 0x90]), End::Done);
    assert_eq!(guest.reg(Gpr::Rbx), 1);
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    // mov [DATA], eax; mov ecx, [DATA]; nop
    let store = [0x89, 0x04, 0x25, 0x00, 0xc0, 0, 0];
    let load = [0x8b, 0x0c, 0x25, 0x00, 0xc0, 0, 0];
    let run = |condition, addr, code: &[u8]| {
        let mut guest = Guest::long();
        // The page is in the TLB before the breakpoint is set.
        assert_eq!(guest.run(&[store, load].concat()), End::Done);
        set_breakpoint(&mut guest, addr, dr7(condition, 3));
        let end = guest.run(code);
        let rip = if end == DB { guest.stack(0) } else { 0 };
        (end, rip)
    };
    let code = [&load[..], &store, &[0x90]].concat();
    assert_eq!(run(1, DATA, &code), (DB, CODE + 14), "writes");
    assert_eq!(run(3, DATA, &code), (DB, CODE + 7), "reads and writes");
    assert_eq!(run(1, DATA + 4, &code), (End::Done, 0), "next to it");
    assert_eq!(run(3, DATA + 3, &code), (DB, CODE + 7), "low bits are ignored");
}

#[test]
fn debug_registers_are_guarded() {
    // General detect: the access faults and the guard is lifted for the handler.
    let mut guest = Guest::long();
    set_breakpoint(&mut guest, 0, 1 << 13);
    assert_eq!(guest.run(&[0x0f, 0x21, 0xc0]), DB);
    assert_eq!(guest.stack(0), CODE);
    assert_eq!(dr6(&guest) & 0xe00f, 1 << 13);
    assert_eq!(guest.machine.vcpu.state.dr7, 0x400);
    // DR4 is DR6, until CR4.DE.
    let mut guest = Guest::long();
    let from_dr4 = [0x0f, 0x21, 0xe0];
    assert_eq!(guest.run(&from_dr4), End::Done);
    assert_eq!(guest.reg(Gpr::Rax), 0xffff_0ff0);
    guest.machine.vcpu.state.cr4 |= Cr4::DE;
    assert_eq!(guest.run(&from_dr4), UD);
    // The upper halves of DR6 and DR7 are reserved.
    guest.set(Gpr::Rax, 1 << 32);
    assert_eq!(guest.run(&[0x0f, 0x23, 0xf8]), gp(0));
}
