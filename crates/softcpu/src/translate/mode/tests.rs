use std::sync::{Arc, Mutex};

use super::*;
use crate::state::control::{Cr0, Efer};
use crate::state::rflags::RFlags;
use crate::testing::TestMachine;
use crate::trace::{Event, Tracer};
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

/// 16-bit code from `base` on, of which RIP counts.
fn code16(base: u64) -> u64 {
    0x0000_9b00_0000_ffff | (base & 0xff_ffff) << 16 | (base >> 24) << 56
}

/// Loads CX with `turns`, calls what pushes and pops as often, and halts. The call is to behind
/// `gap` bytes.
fn calls(turns: u16, gap: u16) -> Vec<u8> {
    let [low, high] = turns.to_le_bytes();
    let [near, far] = (gap + 4).to_le_bytes();
    // mov cx, turns; again: call there; dec cx; jnz again; hlt
    let mut code = vec![0xb9, low, high, 0xe8, near, far, 0x49, 0x75, 0xfa, 0xf4];
    code.resize(code.len() + usize::from(gap), 0xf4);
    // there: add ax, [bx + si + 2]; push ax; pop dx; ret
    code.extend([0x03, 0x40, 0x02, 0x50, 0x5a, 0xc3]);
    code
}

/// Runs `calls` in a segment that begins at `base`, and says what AX, DX and SP are.
fn run_calls(machine: &mut TestMachine, base: u64) -> [u64; 3] {
    let stack = Segment { base: 0x8000, ..Segment::from_descriptor(0x20, 0x0000_9300_0000_ffff) };
    let state = &mut machine.vcpu.state;
    *state.segment_mut(SegReg::Ss) = stack;
    *state.segment_mut(SegReg::Ds) = Segment { base: 0x6000, ..stack };
    state.gpr[..8].copy_from_slice(&[0x7777_0000, 0, 0x8888_0000, 0x3ffe, 0x2_0000, 0, 4, 0]);
    assert_eq!(run(machine, code16(base)), Exit::Halt);
    let gpr = &machine.vcpu.state.gpr;
    [gpr[0], gpr[2], gpr[4]]
}

#[test]
fn code_of_16_bits_is_translated_wherever_its_segment_is() {
    // Where pages of the segment are pages; where they are not; and where the call goes to the
    // next page.
    for (base, gap) in [(0x2000, 0), (0x2340, 0), (0x2f10, 0), (0x1ff0, 0x300), (0x2345, 0x900)] {
        let mut machine = TestMachine::protected_mode().translating(3);
        machine.put(base + START, &calls(2000, gap));
        // At DS:BX + SI + 2, of which nobody takes more than 16 bits.
        machine.put(0x6000 + 0x4004, &3_u16.to_le_bytes());
        let done = [0x7777_0000 + 6000, 0x8888_0000 + 6000, 0x2_0000];
        assert_eq!(run_calls(&mut machine, base), done, "{base:#x}");
        let counters = machine.vcpu.translator_counters().unwrap();
        assert!(counters.translated > 0 && counters.interpreted < 40, "{base:#x} {counters:?}");
        assert!(counters.entered < 80, "it goes on by itself: {base:#x} {counters:?}");
        // What is written there is seen.
        let there = base + START + 10 + u64::from(gap);
        machine.put(there, &[0x2b]);
        let less = [0x7777_0000 + 0x10000 - 6000, 0x8888_0000 + 0x10000 - 6000, 0x2_0000];
        assert_eq!(run_calls(&mut machine, base), less, "sub ax, [bx + si + 2] at {base:#x}");
    }
}

#[test]
fn the_same_offset_is_other_code_in_another_segment() {
    let mut machine = TestMachine::protected_mode().translating(0);
    machine.put(0x6000 + 0x4004, &3_u16.to_le_bytes());
    let segments = [(0x2000, 100), (0x2100, 200), (0x3000, 300)];
    for (base, turns) in segments {
        machine.put(base + START, &calls(turns, 0));
    }
    for (base, turns) in segments.repeat(3) {
        let sum = 3 * u64::from(turns);
        let done = [0x7777_0000 + sum, 0x8888_0000 + sum, 0x2_0000];
        assert_eq!(run_calls(&mut machine, base), done, "{base:#x}");
    }
}

/// The RIP that the code at [`START`] faults at when its segment ends at `limit`; `None` if it
/// comes to a `hlt`.
fn faults_at(machine: &mut TestMachine, limit: u32) -> Option<u64> {
    let faulted = Arc::new(Mutex::new(None));
    machine.vcpu.set_tracer(Some(Box::new(Faults(Arc::clone(&faulted)))));
    machine.vcpu.state.idtr.limit = 0;
    let state = &mut machine.vcpu.state;
    *state.segment_mut(SegReg::Cs) = Segment { limit, ..Segment::from_descriptor(0x10, CODE32) };
    state.rip = START;
    machine.vcpu.segments_changed();
    let halted = machine.vcpu.run() == Exit::Halt;
    let faulted = faulted.lock().unwrap().take();
    assert_eq!(halted, faulted.is_none());
    faulted
}

struct Faults(Arc<Mutex<Option<u64>>>);

impl Tracer for Faults {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Exception { state, .. } = event {
            self.0.lock().unwrap().get_or_insert(state.rip);
        }
    }

    fn wants_blocks(&self) -> bool {
        false
    }
}

#[test]
fn jumps_beyond_the_limit_fault_where_they_are() {
    let beyond = START + 0x20;
    // jmp beyond; jz beyond, taken; call beyond; push beyond, ret; mov eax, beyond, jmp eax
    let ways: [&[u8]; 5] = [
        &[0xeb, 0x1e],
        &[0x31, 0xc0, 0x74, 0x1c],
        &[0xe8, 0x1b, 0, 0, 0],
        &[0x68, 0x20, 0x10, 0, 0, 0xc3],
        &[0xb8, 0x20, 0x10, 0, 0, 0xff, 0xe0],
    ];
    let at = [0, 2, 0, 5, 5];
    for (way, at) in ways.iter().zip(at) {
        let mut machine = TestMachine::protected_mode().translating(0);
        machine.put(START, way);
        machine.put(beyond, &[0xf4]);
        for _ in 0..3 {
            machine.vcpu.state.gpr[4] = 0x5000;
            assert_eq!(faults_at(&mut machine, beyond as u32), None, "{way:x?}");
            machine.vcpu.state.gpr[4] = 0x5000;
            let fault = faults_at(&mut machine, beyond as u32 - 1);
            assert_eq!(fault, Some(START + at), "{way:x?}");
        }
    }
}

/// Real mode, and virtual-8086 mode: segments are where their selectors say.
#[test]
fn code_of_the_8086_is_translated() {
    for virtual_8086 in [false, true] {
        let mut machine = TestMachine::protected_mode().translating(3);
        machine.put(0x2340 + 0x100, &calls(2000, 0));
        machine.put(0x6000 + 0x4004, &3_u16.to_le_bytes());
        let state = &mut machine.vcpu.state;
        let segment = if virtual_8086 { Segment::virtual_8086 } else { Segment::real_mode };
        for (register, selector) in
            [(SegReg::Cs, 0x234), (SegReg::Ss, 0x800), (SegReg::Ds, 0x600), (SegReg::Es, 0)]
        {
            *state.segment_mut(register) = segment(selector);
        }
        if virtual_8086 {
            state.rflags |= RFlags::VM;
        } else {
            state.cr0 -= Cr0::PE;
        }
        state.gpr[..8].copy_from_slice(&[0, 0, 0, 0x3ffe, 0x1000, 0, 4, 0]);
        state.rip = 0x100;
        state.idtr.limit = 0;
        machine.vcpu.state_changed();
        // `hlt` is not for users: nobody takes what it raises.
        let end = machine.vcpu.run();
        assert_eq!(end == Exit::Halt, !virtual_8086, "{end:?}");
        let state = &machine.vcpu.state;
        assert_eq!([state.gpr[0], state.gpr[2], state.gpr[4]], [6000, 6000, 0x1000]);
        let counters = machine.vcpu.translator_counters().unwrap();
        assert!(counters.translated > 0 && counters.interpreted < 40, "{counters:?}");
    }
}
