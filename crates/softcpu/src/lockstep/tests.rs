//! Programs in lockstep: right ones agree, and mistakes planted in the translator are found,
//! whatever they are.

use std::sync::Arc;

use iced_x86::{Code, Instruction};

use super::*;
use crate::addr::GuestPhysAddr;
use crate::decode::op::Op;
use crate::testing::TestMachine;

/// Where programs are, and where their data is.
const CODE: u64 = 0x1000;
const DATA: u64 = 0x2_0000;

/// Adds up a thousand numbers, storing each sum; looks at the clock and writes to a port.
const LOOP: &[u8] = &[
    0xb9, 0xe8, 3, 0, 0, // mov ecx, 1000
    0xbb, 0, 0, 2, 0, // mov ebx, DATA
    0x48, 0x01, 0xc8, // again: add rax, rcx
    0x48, 0x89, 0x04, 0xcb, // mov [rbx + rcx * 8], rax
    0xff, 0xc9, // dec ecx
    0x75, 0xf5, // jnz again
    0x0f, 0x31, // rdtsc
    0x89, 0x43, 0xf8, // mov [rbx - 8], eax
    0xe6, 0x80, // out 80h, al
    0xf4, // hlt
];

/// Where `again` is in [`LOOP`].
const AGAIN: u64 = CODE + 10;

fn machine(code: &[u8]) -> TestMachine {
    let machine = TestMachine::long_mode();
    machine.put(CODE, code);
    let mut machine = machine.in_lockstep();
    machine.vcpu.state.rip = CODE;
    machine
}

/// Runs `code` with `mistake` made of each instruction that is translated.
fn report(code: &[u8], mistake: fn(&mut Instruction, &mut Op)) -> String {
    let mut machine = machine(code);
    *machine.vcpu.translator.as_mut().unwrap().mistake() = Some(mistake);
    assert_eq!(machine.vcpu.run(), Exit::Diverged);
    let report = machine.vcpu.divergence().unwrap().to_owned();
    println!("{report}");
    report
}

#[test]
fn a_right_translation_agrees() {
    let mut machine = machine(LOOP);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    assert_eq!(machine.get(DATA + 8, 8), 500_500_u64.to_le_bytes());
    let counters = machine.vcpu.lockstep_counters().unwrap();
    assert_eq!((counters.stretches, counters.raced), (2, 0), "{counters:?}");
    // Three before the loop, four in it a thousand times, and four behind it.
    assert!((4005..4020).contains(&counters.instructions), "{counters:?}");
    assert_eq!(machine.vcpu.divergence(), None);
}

#[test]
fn a_wrong_operation_is_shown_with_its_block_and_registers() {
    let report = report(LOOP, |instruction, _| {
        if instruction.code() == Code::Add_rm64_r64 {
            instruction.set_code(Code::Sub_rm64_r64);
        }
    });
    // The first block that has it begins with the program.
    assert!(report.starts_with("translator and interpreter differ, from rip 0x1000 "), "{report}");
    for wanted in [
        "000000000000100a  4801c8                   add rax,rcx",
        "host code of the block at 0x1000",
        " sub r",
        "* rax     0000000000000000  00000000000003e8  fffffffffffffc18",
        "flags that differ: [\"CF\"]",
        "memory that differs",
        "* 0x21f40: e803000000000000  18fcffffffffffff",
    ] {
        assert!(report.contains(wanted), "no {wanted}:\n{report}");
    }
    assert!(!report.contains("* rcx"), "{report}");
}

#[test]
fn a_store_to_another_place_is_shown_on_both_places() {
    let report = report(LOOP, |instruction, op| {
        if instruction.code() == Code::Mov_rm64_r64 && op.rip > AGAIN {
            op.disp = 0x10_0000;
        }
    });
    for wanted in ["* 0x21f40: e803  0000", "* 0x121f40: 0000  e803"] {
        assert!(report.contains(wanted), "no {wanted}:\n{report}");
    }
    assert!(!report.contains("\n* r"), "{report}");
}

#[test]
fn a_wrong_question_to_the_machine_is_a_difference() {
    // mov al, 5; mov dl, 3; xchg dl, al; out 80h, al; xor eax, eax; xor edx, edx; hlt
    let code = [0xb0, 5, 0xb2, 3, 0x86, 0xc2, 0xe6, 0x80, 0x31, 0xc0, 0x31, 0xd2, 0xf4];
    let report = report(&code, |instruction, _| {
        if instruction.code() == Code::Xchg_rm8_r8 {
            instruction.set_code(Code::Mov_rm8_r8);
        }
    });
    assert!(report.contains("asks the machine for PortWrite { port: 80, data: [3] }"), "{report}");
}

#[test]
fn a_fault_that_one_has_is_a_difference() {
    // mov rbx, [1 << 40]; hlt: far beyond what is mapped.
    let code = [0x48, 0xbb, 0, 0, 0, 0, 0, 1, 0, 0, 0x48, 0x8b, 0x1b, 0xf4];
    let report = report(&code, |instruction, op| {
        if instruction.code() == Code::Mov_r64_rm64 {
            (op.base, op.disp) = (crate::state::GPR_ZERO, DATA);
        }
    });
    assert!(report.contains("interpreter: Exception") && report.contains("PageFault"), "{report}");
}

#[test]
fn code_that_changes_itself_agrees() {
    // mov ecx, 200; again: mov [rip + 2], cl; nop; mov al, 0; add edx, eax; loop again; hlt
    let code =
        [0xb9, 200, 0, 0, 0, 0x88, 0x0d, 2, 0, 0, 0, 0x90, 0xb0, 0, 0x01, 0xc2, 0xe2, 0xf3, 0xf4];
    let mut machine = machine(&code);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    assert_eq!(machine.vcpu.state.gpr[2], 20_100);
    let counters = machine.vcpu.lockstep_counters().unwrap();
    assert!(counters.instructions >= 1000 && counters.raced == 0, "{counters:?}");
}

/// A device that stores to memory when it is told to, by any port, or read at [`STORES`]; and
/// whose answers do not come twice.
struct Device(Arc<PhysMemory>, u8);

const STORES: u8 = 0x71;

impl Device {
    fn store(&self, value: u8) {
        assert!(self.0.write(GuestPhysAddr(DATA), &[value]));
    }
}

impl Environment for Device {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        self.1 = self.1.wrapping_add(1);
        data.fill(self.1);
        if port == u16::from(STORES) {
            self.store(9);
        }
    }

    fn port_write(&mut self, _port: u16, data: &[u8]) {
        self.store(data[0]);
    }

    fn mmio_read(&mut self, _addr: GuestPhysAddr, data: &mut [u8]) {
        data.fill(0);
    }

    fn mmio_write(&mut self, _addr: GuestPhysAddr, _data: &[u8]) {}
}

fn machine_with_device(code: &[u8]) -> TestMachine {
    let mut machine = machine(code);
    let device: Box<dyn Environment> = Box::new(Device(Arc::clone(&machine.memory), 0));
    let tape = machine.vcpu.tape.clone().unwrap();
    machine.vcpu.env = Box::new(Taped::new(tape, Some(device)));
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    machine
}

#[test]
fn a_device_that_stores_between_the_two_is_no_difference_and_answers_once() {
    let machine = machine_with_device(&[
        0xe4, 0x70, // in al, 70h: 1
        0x8a, 0x1c, 0x25, 0, 0, 2, 0, // mov bl, [DATA]: 0
        0xe4, STORES, // in al, STORES: 2
        0x8a, 0x0c, 0x25, 0, 0, 2, 0, // mov cl, [DATA]: 9
        0xe4, 0x70, // in al, 70h: 3
        0xf4, // hlt
    ]);
    let gpr = &machine.vcpu.state.gpr;
    assert_eq!((gpr[0] & 0xff, gpr[1] & 0xff, gpr[3] & 0xff), (3, 9, 0));
    let counters = machine.vcpu.lockstep_counters().unwrap();
    assert_eq!((counters.stretches, counters.raced), (1, 1), "{counters:?}");
}

#[test]
fn what_devices_store_is_not_compared_and_what_they_are_told_waits_for_the_check() {
    let machine = machine_with_device(&[
        0xb0, 7, // mov al, 7
        0x88, 0x04, 0x25, 0, 0, 2, 0, // mov [DATA], al
        0xe4, STORES, // in al, STORES: 1, and [DATA] is 9
        0xb0, 5, // mov al, 5
        0xe6, 0x80, // out 80h, al: [DATA] is 5, but not yet
        0x8a, 0x0c, 0x25, 0, 0, 2, 0, // mov cl, [DATA]
        0xe4, 0x70, // in al, 70h: 2
        0x8a, 0x1c, 0x25, 0, 0, 2, 0,    // mov bl, [DATA]: 5
        0xf4, // hlt
    ]);
    let gpr = &machine.vcpu.state.gpr;
    assert_eq!((gpr[0] & 0xff, gpr[3] & 0xff), (2, 5));
    assert!([5, 9].contains(&(gpr[1] & 0xff)), "{:#x}", gpr[1]);
    let counters = machine.vcpu.lockstep_counters().unwrap();
    assert_eq!(counters.raced, 0, "{counters:?}");
}
