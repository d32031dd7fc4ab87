use super::*;
use crate::state::control::Efer;
use crate::testing::TestMachine;
use crate::vcpu::Exit;

const START: u64 = 0x1000;
/// Flat 32-bit code, and 64-bit code.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const CODE64: u64 = 0x00af_9b00_0000_ffff;

/// Runs the code at [`START`] as the descriptor `code` has it.
fn run(machine: &mut TestMachine, code: u64) -> Exit {
    let state = &mut machine.vcpu.state;
    *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(0x10, code);
    state.rip = START;
    machine.vcpu.segments_changed();
    machine.vcpu.run()
}

fn translated(machine: &TestMachine) -> u64 {
    machine.vcpu.translator_counters().unwrap().translated
}

#[test]
fn the_same_bytes_are_other_code_in_another_mode() {
    // 64-bit code: lea eax, [rax + 1] with a prefix; 32-bit code: inc eax before it.
    let code = [0x40, 0x8d, 0x40, 0x01, 0xf4];
    for threshold in [0, 2] {
        let mut machine = TestMachine::long_mode().translating(threshold);
        machine.put(START, &code);
        machine.vcpu.state.gpr[0] = 0;
        let mut sum = 0;
        for n in 0..20_u64 {
            let (code, adds) = if n % 6 < 3 { (CODE64, 1) } else { (CODE32, 2) };
            assert_eq!(run(&mut machine, code), Exit::Halt);
            sum += adds;
            assert_eq!(machine.vcpu.state.gpr[0], sum, "the run number {n}");
        }
        assert!(machine.vcpu.state.efer.contains(Efer::LMA));
        // `hlt` has a translation of its own if it was gone on with.
        let translated = translated(&machine);
        assert!((2..=4).contains(&translated), "each mode once: {translated}");
    }
}

/// The word that `machine` loads by `mov eax, [ebx]; hlt`, if it comes to the end of that.
fn loaded(machine: &mut TestMachine, segment: Segment) -> Option<u64> {
    *machine.vcpu.state.segment_mut(SegReg::Ds) = segment;
    // Where exceptions go to is nowhere.
    machine.vcpu.state.idtr.limit = 0;
    (run(machine, CODE32) == Exit::Halt).then_some(machine.vcpu.state.gpr[0])
}

#[test]
fn segments_that_are_not_flat_are_added_and_checked() {
    let mut machine = TestMachine::protected_mode().translating(0);
    machine.put(START, &[0x8b, 0x03, 0xf4]);
    for at in [0x2000_u64, 0x3000, 0x3004] {
        machine.put(at, &(at as u32).to_le_bytes());
    }
    let flat = Segment::from_descriptor(0x18, 0x00cf_9300_0000_ffff);
    for _ in 0..3 {
        machine.vcpu.state.gpr[3] = 0x2000;
        assert_eq!(loaded(&mut machine, flat), Some(0x2000));
        assert_eq!(loaded(&mut machine, Segment { base: 0x1000, ..flat }), Some(0x3000));
        assert_eq!(loaded(&mut machine, Segment { base: 0x1004, ..flat }), Some(0x3004));
        assert_eq!(loaded(&mut machine, Segment { limit: 0x2003, ..flat }), Some(0x2000));
        assert_eq!(loaded(&mut machine, Segment { limit: 0x2002, ..flat }), None);
        assert_eq!(loaded(&mut machine, Segment::null(0)), None);
        // It wraps, and so does the sum; but an access may not lie around the wrap.
        machine.vcpu.state.gpr[3] = 0xffff_fffc;
        assert_eq!(loaded(&mut machine, Segment { base: 0x3008, ..flat }), Some(0x3004));
        machine.vcpu.state.gpr[3] = 0xffff_fffe;
        assert_eq!(loaded(&mut machine, Segment { base: 0x3006, ..flat }), None);
        // Nobody reads the upper half.
        machine.vcpu.state.gpr[3] = 0xaaaa_aaaa_0000_2000;
        assert_eq!(loaded(&mut machine, flat), Some(0x2000));
    }
    // One for flat data, one for all others.
    assert_eq!(translated(&machine), 2);
}

#[test]
fn what_code_is_not_translated() {
    let mut machine = TestMachine::protected_mode();
    let modes = [
        (CODE32, true),
        // A base, a limit, 16-bit code.
        (0x00cf_9b00_1000_ffff, false),
        (0x00c1_9b00_0000_ffff, false),
        (0x008f_9b00_0000_ffff, false),
    ];
    for (code, known) in modes {
        *machine.vcpu.state.segment_mut(SegReg::Cs) = Segment::from_descriptor(0x10, code);
        machine.vcpu.segments_changed();
        assert_eq!(machine.vcpu.translation_mode().is_some(), known, "{code:#x}");
    }
}

#[test]
fn a_segment_register_that_is_loaded_makes_another_mode() {
    // mov ds, ecx; mov eax, [ebx]; mov ds, edx; add eax, [ebx]; dec esi; jnz to the start; hlt
    let code = [0x8e, 0xd9, 0x8b, 0x03, 0x8e, 0xda, 0x03, 0x03, 0x4e, 0x75, 0xf5, 0xf4];
    let mut machine = TestMachine::protected_mode().translating(3);
    machine.put(START, &code);
    let (table, flat) = (0x5000, 0x00cf_9300_0000_ffff_u64);
    machine.put(table + 0x18, &flat.to_le_bytes());
    machine.put(table + 0x20, &(flat | 0x1000 << 16).to_le_bytes());
    machine.put(0x2000, &7_u32.to_le_bytes());
    machine.put(0x3000, &50_u32.to_le_bytes());
    let state = &mut machine.vcpu.state;
    (state.gdtr.base, state.gdtr.limit) = (table, 0x27);
    state.gpr[1..4].copy_from_slice(&[0x18, 0x20, 0x2000]);
    state.gpr[6] = 100;
    assert_eq!(run(&mut machine, CODE32), Exit::Halt);
    assert_eq!(machine.vcpu.state.gpr[0], 57);
    let counters = machine.vcpu.translator_counters().unwrap();
    assert!(counters.entered < 20, "it goes from mode to mode by itself: {counters:?}");
}
