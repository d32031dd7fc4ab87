//! Operands that cannot be worked on in place, and accesses that fault half way.

use super::{assert_fault, run};
use crate::exception::Vector;
use crate::memory::code_map::Observer;
use crate::state::fpu::VectorRegister;
use crate::testing::{DEVICE, TestMachine};
use crate::vcpu::Vcpu;

/// The last bytes of a page, followed by one that tests make absent.
const EDGE: u64 = 0x9000;

fn set(cpu: &mut Vcpu, register: usize, value: u64) {
    cpu.state.gpr[register] = value;
}

fn mark_as_code(machine: &TestMachine, addr: u64) {
    let cpu = &machine.vcpu;
    let (_, frame) = machine.memory.page(crate::GuestPhysAddr(addr)).unwrap();
    let me: &Observer = &cpu.observer;
    let offset = addr & 0xfff;
    machine.memory.code().decode(me, frame, offset..offset + 16, || ());
}

#[test]
fn operands_may_cross_pages() {
    let mut machine = TestMachine::long_mode();
    let data: Vec<u8> = (1..=16).collect();
    machine.put(EDGE - 5, &data);
    set(&mut machine.vcpu, 1, EDGE - 5);
    run(&mut machine, &[0x0f, 0x10, 0x01]).unwrap(); // movups xmm0, [rcx]
    assert_eq!(machine.vcpu.state.vec[0].to_bytes()[..16], data);
    set(&mut machine.vcpu, 1, EDGE - 9);
    run(&mut machine, &[0x0f, 0x11, 0x01]).unwrap(); // movups [rcx], xmm0
    assert_eq!(machine.get(EDGE - 9, 16), data);
    // lock add qword [rcx], rax
    set(&mut machine.vcpu, 0, 5);
    set(&mut machine.vcpu, 1, EDGE - 3);
    machine.put(EDGE - 3, &10_u64.to_le_bytes());
    run(&mut machine, &[0xf0, 0x48, 0x01, 0x01]).unwrap();
    assert_eq!(machine.get(EDGE - 3, 8), 15_u64.to_le_bytes());
}

#[test]
fn a_store_that_faults_on_its_second_page_stores_nothing() {
    let mut machine = TestMachine::long_mode();
    machine.put(EDGE - 8, &[7; 16]);
    machine.set_present(EDGE, false);
    machine.vcpu.state.vec[0] = VectorRegister([u64::MAX; 4]);
    set(&mut machine.vcpu, 1, EDGE - 8);
    let step = run(&mut machine, &[0x0f, 0x11, 0x01]); // movups [rcx], xmm0
    assert_fault(&machine, step, Vector::PageFault);
    assert_eq!(machine.vcpu.fault.payload, EDGE);
    assert_eq!(machine.get(EDGE - 8, 16), [7; 16]);
}

#[test]
fn devices_see_one_access_of_the_operands_size() {
    let mut machine = TestMachine::long_mode();
    set(&mut machine.vcpu, 1, DEVICE + 0x10);
    run(&mut machine, &[0xf3, 0x0f, 0x6f, 0x01]).unwrap(); // movdqu xmm0, [rcx]
    let expected: Vec<u8> = (0..16).map(|i| !(0x10 + i)).collect();
    assert_eq!(machine.vcpu.state.vec[0].to_bytes()[..16], expected);
    run(&mut machine, &[0x66, 0x0f, 0xd6, 0x01]).unwrap(); // movq [rcx], xmm0
    let log = machine.devices.lock().unwrap().clone();
    assert_eq!(log, [(crate::GuestPhysAddr(DEVICE + 0x10), expected[..8].to_vec())]);
}

#[test]
fn stores_to_code_are_done_in_place_and_noticed() {
    let mut machine = TestMachine::long_mode();
    mark_as_code(&machine, 0x5040);
    machine.vcpu.state.vec[0] = VectorRegister([0x1111, 0x2222, 0, 0]);
    set(&mut machine.vcpu, 1, 0x5080);
    run(&mut machine, &[0x0f, 0x11, 0x01]).unwrap();
    assert!(!machine.vcpu.code_hit, "another line of the page");
    set(&mut machine.vcpu, 1, 0x5044);
    run(&mut machine, &[0x0f, 0x11, 0x01]).unwrap();
    assert!(machine.vcpu.code_hit);
    assert_eq!(machine.get(0x5044, 2), [0x11, 0x11]);
}

#[test]
fn masked_accesses_fault_only_for_selected_elements() {
    let mut machine = TestMachine::long_mode();
    machine.put(EDGE - 16, &[9; 16]);
    machine.set_present(EDGE, false);
    set(&mut machine.vcpu, 1, EDGE - 16);
    let low = VectorRegister([u64::MAX, u64::MAX, 0, 0]);
    machine.vcpu.state.vec[2] = low;
    machine.vcpu.state.vec[1] = VectorRegister([5, 6, 7, 8]);
    run(&mut machine, &[0xc4, 0xe2, 0x6d, 0x2e, 0x09]).unwrap(); // vmaskmovps [rcx], ymm2, ymm1
    assert_eq!(machine.get(EDGE - 16, 8), 5_u64.to_le_bytes());
    run(&mut machine, &[0xc4, 0xe2, 0x6d, 0x2c, 0x19]).unwrap(); // vmaskmovps ymm3, ymm2, [rcx]
    assert_eq!(machine.vcpu.state.vec[3], VectorRegister([5, 6, 0, 0]));

    machine.vcpu.state.vec[2].0[2] = 1 << 63;
    machine.vcpu.state.vec[1] = VectorRegister([1, 2, 3, 4]);
    let step = run(&mut machine, &[0xc4, 0xe2, 0x6d, 0x2e, 0x09]);
    assert_fault(&machine, step, Vector::PageFault);
    assert_eq!(machine.get(EDGE - 16, 8), 5_u64.to_le_bytes(), "nothing was stored");
    let step = run(&mut machine, &[0xc4, 0xe2, 0x6d, 0x2c, 0x19]);
    assert_fault(&machine, step, Vector::PageFault);
    assert_eq!(machine.vcpu.fault.payload, EDGE + 4);
    assert_eq!(machine.vcpu.state.vec[3], VectorRegister([5, 6, 0, 0]), "nothing was loaded");

    // maskmovdqu xmm1, xmm2 with byte 15 and byte 16 - 16 = 0 of the next page
    set(&mut machine.vcpu, 7, EDGE - 15);
    machine.vcpu.state.vec[2] = VectorRegister([0x80, 0, 0, 0]);
    run(&mut machine, &[0x66, 0x0f, 0xf7, 0xca]).unwrap();
    assert_eq!(machine.get(EDGE - 15, 1), [1]);
    machine.vcpu.state.vec[2] = VectorRegister([0x80, 1 << 63, 0, 0]);
    let step = run(&mut machine, &[0x66, 0x0f, 0xf7, 0xca]);
    assert_fault(&machine, step, Vector::PageFault);
    assert_eq!(machine.vcpu.fault.payload, EDGE);
}

#[test]
fn a_gather_resumes_where_it_faulted() {
    let mut machine = TestMachine::long_mode();
    machine.set_present(EDGE, false);
    machine.put(0x8000, &0x1111_u64.to_le_bytes());
    machine.put(EDGE + 8, &0x3333_u64.to_le_bytes());
    let cpu = &mut machine.vcpu;
    set(cpu, 1, 0x8000);
    cpu.state.vec[1] = VectorRegister([7; 4]);
    cpu.state.vec[2] = VectorRegister([0, 0, (EDGE + 8 - 0x8000) / 8, 0]);
    cpu.state.vec[3] = VectorRegister([u64::MAX, 0, 1 << 63, u64::MAX]);
    // vpgatherqq ymm1, [rcx+ymm2*8], ymm3
    let gather = [0xc4, 0xe2, 0xe5, 0x91, 0x0c, 0xd1];
    let step = run(&mut machine, &gather);
    assert_fault(&machine, step, Vector::PageFault);
    assert_eq!(machine.vcpu.fault.payload, EDGE + 8);
    assert_eq!(machine.vcpu.state.vec[1], VectorRegister([0x1111, 7, 7, 7]));
    assert_eq!(machine.vcpu.state.vec[3], VectorRegister([0, 0, 1 << 63, u64::MAX]));
    machine.set_present(EDGE, true);
    run(&mut machine, &gather).unwrap();
    assert_eq!(machine.vcpu.state.vec[1], VectorRegister([0x1111, 7, 0x3333, 0x1111]));
    assert_eq!(machine.vcpu.state.vec[3], VectorRegister([0; 4]));
}

#[test]
fn misaligned_operands_fault_before_paging_does() {
    let mut machine = TestMachine::long_mode();
    set(&mut machine.vcpu, 1, 0x8008);
    let step = run(&mut machine, &[0x0f, 0x28, 0x01]); // movaps xmm0, [rcx]
    assert_fault(&machine, step, Vector::GeneralProtection);
    let step = run(&mut machine, &[0x48, 0x0f, 0xc7, 0x09]); // cmpxchg16b [rcx]
    assert_fault(&machine, step, Vector::GeneralProtection);
    run(&mut machine, &[0xc5, 0xf8, 0x58, 0x01]).unwrap(); // vaddps xmm0, xmm0, [rcx]
}
