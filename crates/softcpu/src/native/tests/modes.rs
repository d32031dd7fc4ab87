//! Which exception comes when a unit is switched off, and pending x87 errors.

use iced_x86::CpuidFeature as F;

use super::super::Refused;
use super::super::features::FeatureSet;
use super::{assert_fault, lower_for, op, run};
use crate::exception::Vector;
use crate::state::control::{Cr0, Cr4};
use crate::testing::TestMachine;

const PADDD_XMM: &[u8] = &[0x66, 0x0f, 0xfe, 0xc1];
const PADDD_MMX: &[u8] = &[0x0f, 0xfe, 0xc1];
const VADDPS: &[u8] = &[0xc5, 0xf4, 0x58, 0xc2];
const VZEROUPPER: &[u8] = &[0xc5, 0xf8, 0x77];
const ANDN: &[u8] = &[0xc4, 0xe2, 0x60, 0xf2, 0xc1];
const FLD1: &[u8] = &[0xd9, 0xe8];
const FNSTSW: &[u8] = &[0xdf, 0xe0];
const FWAIT: &[u8] = &[0x9b];
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x01];
const XSAVE: &[u8] = &[0x0f, 0xae, 0x21];
const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x11];
const POPCNT: &[u8] = &[0xf3, 0x0f, 0xb8, 0xc1];

fn with(change: impl Fn(&mut TestMachine)) -> TestMachine {
    let mut machine = TestMachine::long_mode();
    machine.vcpu.state.gpr[1] = 0x8000;
    change(&mut machine);
    machine
}

#[track_caller]
fn expect(machine: &mut TestMachine, cases: &[(&[u8], Option<Vector>)]) {
    for (bytes, outcome) in cases {
        let step = run(machine, bytes);
        match outcome {
            None => assert_eq!(step, Ok(()), "{bytes:02x?}: {:?}", machine.vcpu.fault),
            Some(vector) => assert_fault(machine, step, *vector),
        }
    }
}

#[test]
fn task_switched_asks_the_system_first() {
    let nm = Some(Vector::DeviceNotAvailable);
    let mut machine = with(|m| m.vcpu.state.cr0 |= Cr0::TS);
    let all =
        [PADDD_XMM, PADDD_MMX, VADDPS, VZEROUPPER, FLD1, FNSTSW, FWAIT, FXSAVE, XSAVE, LDMXCSR];
    expect(&mut machine, &all.map(|bytes| (bytes, nm)));
    expect(&mut machine, &[(POPCNT, None), (ANDN, None)]);
    machine.vcpu.state.cr0 -= Cr0::MP;
    expect(&mut machine, &[(FWAIT, None), (FLD1, nm)]);
}

#[test]
fn emulation_makes_vectors_undefined_and_x87_unavailable() {
    let (ud, nm) = (Some(Vector::InvalidOpcode), Some(Vector::DeviceNotAvailable));
    let mut machine = with(|m| m.vcpu.state.cr0 |= Cr0::EM);
    expect(
        &mut machine,
        &[(PADDD_XMM, ud), (PADDD_MMX, ud), (FLD1, nm), (VADDPS, None), (POPCNT, None)],
    );
}

#[test]
fn units_the_system_never_enabled_are_undefined() {
    let ud = Some(Vector::InvalidOpcode);
    let mut machine = with(|m| m.vcpu.state.cr4 -= Cr4::OSFXSR);
    expect(&mut machine, &[(PADDD_XMM, ud), (LDMXCSR, ud), (PADDD_MMX, None), (VADDPS, None)]);
    let mut machine = with(|m| m.vcpu.state.cr4 -= Cr4::OSXSAVE);
    expect(
        &mut machine,
        &[(VADDPS, ud), (VZEROUPPER, ud), (XSAVE, ud), (ANDN, None), (PADDD_XMM, None)],
    );
    let mut machine = with(|m| m.vcpu.state.xcr0 = 3);
    expect(&mut machine, &[(VADDPS, ud), (VZEROUPPER, ud), (XSAVE, None)]);
    // Real mode has no VEX, not even for general registers.
    let mut machine = with(|m| m.vcpu.state.cr0 -= Cr0::PE);
    expect(&mut machine, &[(VADDPS, ud), (ANDN, ud), (PADDD_XMM, None)]);
}

#[test]
fn x87_errors_wait_for_the_next_waiting_instruction() {
    let mut machine = with(|_| ());
    machine.vcpu.state.fpu.set_control(0x037b); // zero divide unmasked
    expect(&mut machine, &[(FLD1, None), (&[0xd9, 0xee], None)]); // fldz
    let before = machine.vcpu.state.fpu.st(1);
    expect(&mut machine, &[(&[0xdc, 0xf9], None)]); // fdiv st(1), st: 1 / 0
    assert_eq!(machine.vcpu.state.fpu.status() & 0x8084, 0x8084, "ZE, ES and B");
    assert_eq!(machine.vcpu.state.fpu.st(1), before, "an unmasked error leaves the operand");
    let pointers = machine.vcpu.state.fpu.pointers();
    assert_eq!((pointers.opcode, pointers.instruction), (0x4f9, 0x1000));
    let mf = Some(Vector::X87);
    expect(
        &mut machine,
        &[(FLD1, mf), (PADDD_MMX, mf), (FWAIT, mf), (PADDD_XMM, None), (FNSTSW, None)],
    );
    expect(&mut machine, &[(&[0xdb, 0xe2], None), (FLD1, None)]); // fnclex
}

#[test]
fn last_pointers_are_the_guests() {
    let mut machine = with(|_| ());
    machine.put(0x8008, &2.0_f64.to_le_bytes());
    expect(&mut machine, &[(&[0xdd, 0x41, 0x08], None)]); // fld qword [rcx+8]
    let pointers = machine.vcpu.state.fpu.pointers();
    assert_eq!((pointers.opcode, pointers.instruction, pointers.data), (0x541, 0x1000, 0));
    expect(&mut machine, &[(FNSTSW, None)]);
    assert_eq!(machine.vcpu.state.fpu.pointers(), pointers, "control instructions leave them");
    expect(&mut machine, &[(&[0xdb, 0xe3], None)]); // fninit
    assert_eq!(machine.vcpu.state.fpu.pointers(), Default::default());
}

#[test]
fn without_osxmmexcpt_an_unmasked_error_is_undefined() {
    let divide: &[u8] = &[0x0f, 0x5e, 0xc1]; // divps xmm0, xmm1
    let mut machine = with(|m| {
        m.vcpu.state.mxcsr = 0x1f80 & !(1 << 9);
        m.vcpu.state.vec[0].0 = [0x3f80_0000, 7, 8, 9];
    });
    expect(&mut machine, &[(divide, Some(Vector::Simd))]);
    assert_eq!(machine.vcpu.state.vec[0].0, [0x3f80_0000, 7, 8, 9]);
    assert_eq!(machine.vcpu.state.mxcsr & 0x3f, 0b111 & machine.vcpu.state.mxcsr);
    machine.vcpu.state.cr4 -= Cr4::OSXMMEXCPT;
    expect(&mut machine, &[(divide, Some(Vector::InvalidOpcode))]);
}

#[test]
fn what_the_model_lacks_is_refused_or_becomes_what_it_was() {
    let mut machine = with(|_| ());
    let v2 = FeatureSet::v2();
    let decode = |bytes: &[u8]| iced_x86::Decoder::with_ip(64, bytes, 0, 0).decode();
    for bytes in [VADDPS, VZEROUPPER, ANDN, XSAVE] {
        let refused =
            lower_for(&mut machine, &decode(bytes), bytes, &v2).map(|lowered| lowered.imm);
        assert_eq!(refused, Err(Refused::NotOffered), "{bytes:02x?}");
    }
    // EVEX: vaddps zmm0, zmm1, zmm2
    let evex = [0x62, 0xf1, 0x74, 0x48, 0x58, 0xc2];
    let refused = lower_for(&mut machine, &decode(&evex), &evex, &FeatureSet::v3())
        .map(|lowered| lowered.imm);
    assert_eq!(refused, Err(Refused::Encoding));
    // lzcnt eax, ecx is bsr eax, ecx where there is no LZCNT.
    let lzcnt = [0xf3, 0x0f, 0xbd, 0xc1];
    let instruction = decode(&lzcnt);
    machine.vcpu.state.gpr[1] = 0x100;
    for (features, expected) in [(v2.without(F::LZCNT), 8), (v2.with(F::LZCNT), 23)] {
        let lowered = lower_for(&mut machine, &instruction, &lzcnt, &features).unwrap();
        let op = op(&instruction, &lowered);
        (op.run)(&mut machine.vcpu, &op).unwrap();
        assert_eq!(machine.vcpu.state.gpr[0], expected);
    }
}

#[test]
fn short_forms_of_32_bit_code_have_stubs() {
    let mut machine = TestMachine::protected_mode();
    for (bytes, expected) in [([0x41], 0), ([0x49], 0xffff_ffff)] {
        // inc ecx, dec ecx
        let instruction = iced_x86::Decoder::with_ip(32, &bytes, 0, 0).decode();
        let lowered = super::lower(&mut machine, &instruction, &bytes).unwrap();
        let op = op(&instruction, &lowered);
        machine.vcpu.state.gpr[1] = if expected == 0 { 0xffff_ffff } else { 0 };
        (op.run)(&mut machine.vcpu, &op).unwrap();
        assert_eq!(machine.vcpu.state.gpr[1], expected);
    }
}
