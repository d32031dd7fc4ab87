//! x87 and MMX code against the interpreter, and what of it the host may not see.

use std::arch::asm;

use crate::state::VcpuState;
use crate::state::control::Cr0;
use crate::testing::TestMachine;
use crate::translate::Config;
use crate::vcpu::Exit;

const CODE: u64 = 0x1000;
const DATA: u64 = 0x8000;
/// A page that is not there.
const ABSENT: u64 = 0x9000;
const HALT: &[u8] = &[0xf4];

/// `mov ecx, 50`, the pieces, and back until that is none; then `hlt`.
fn repeated(pieces: &[&[u8]]) -> Vec<u8> {
    let body = pieces.concat();
    let back = -(body.len() as i32 + 3 + 6);
    let jump = [&[0x83, 0xe9, 0x01, 0x0f, 0x85][..], &back.to_le_bytes()].concat();
    [&[0xb9, 50, 0, 0, 0][..], &body, &jump, HALT].concat()
}

/// Runs `code` on `machine`: how it ends, and how many instructions were interpreted.
fn run(machine: &mut TestMachine, code: &[u8], cr0: Cr0) -> (Exit, VcpuState, u64) {
    machine.set_present(ABSENT, false);
    machine.put(CODE, code);
    machine.put(DATA, &3.25_f64.to_le_bytes());
    let masked: u16 = 0x0f7f;
    let unmasked: u16 = 0x037b;
    machine.put(DATA + 0x10, &[masked.to_le_bytes(), unmasked.to_le_bytes()].concat());
    let state = &mut machine.vcpu.state;
    state.gpr[6] = DATA;
    state.gpr[7] = ABSENT;
    state.rip = CODE;
    state.cr0 |= cr0;
    machine.vcpu.state_changed();
    let exit = machine.vcpu.run();
    let interpreted = machine.vcpu.translator_counters().map_or(0, |counters| counters.interpreted);
    (exit, machine.vcpu.state.clone(), interpreted)
}

/// Runs it on both. Says how it ended, in what state, and what the translator had interpreted.
fn compare(code: &[u8], cr0: Cr0) -> (Exit, VcpuState, u64) {
    let mut interpreter = TestMachine::long_mode();
    let config = Config { verify: true, ..Config::default() };
    let mut translator = TestMachine::long_mode().translating_as(0, config);
    let (exit, expected, _) = run(&mut interpreter, code, cr0);
    let (found_exit, found, interpreted) = run(&mut translator, code, cr0);
    assert_eq!((exit, expected.rip), (found_exit, found.rip), "{code:x?}");
    assert_eq!((expected.gpr, expected.rflags), (found.gpr, found.rflags), "{code:x?}");
    assert!(expected.fpu == found.fpu, "{:x?}\n{:x?}", expected.fpu.fxsave, found.fpu.fxsave);
    assert_eq!(interpreter.get(DATA, 0x100), translator.get(DATA, 0x100), "{code:x?}");
    (exit, found, interpreted)
}

const FLD1: &[u8] = &[0xd9, 0xe8];
const FLDZ: &[u8] = &[0xd9, 0xee];
const FADDP: &[u8] = &[0xde, 0xc1];
const FADD_MEMORY: &[u8] = &[0xdc, 0x06]; // fadd qword [rsi]
const FSTP_TEN: &[u8] = &[0xdb, 0x7e, 0x20]; // fstp tbyte [rsi + 32]
const FLD_TEN: &[u8] = &[0xdb, 0x6e, 0x20]; // fld tbyte [rsi + 32]
const FISTP: &[u8] = &[0xdf, 0x7e, 0x30]; // fistp qword [rsi + 48]
const FCOMIP: &[u8] = &[0xdf, 0xf1];
const SETB: &[u8] = &[0x0f, 0x92, 0xc3]; // setb bl
const FNSTSW: &[u8] = &[0xdf, 0xe0];
const FNSTCW: &[u8] = &[0xd9, 0x7e, 0x12]; // fnstcw [rsi + 18]
const FLDCW_MASKED: &[u8] = &[0xd9, 0x6e, 0x10]; // fldcw [rsi + 16]
const FLDCW_UNMASKED: &[u8] = &[0xd9, 0x6e, 0x12]; // fldcw [rsi + 18]
const FDIVP: &[u8] = &[0xde, 0xf9];
const FWAIT: &[u8] = &[0x9b];
const FNSTENV: &[u8] = &[0xd9, 0x76, 0x40]; // fnstenv [rsi + 64]
const FLDCW_BACK: &[u8] = &[0xd9, 0x6e, 0x40]; // fldcw [rsi + 64]
const MMX: &[u8] = &[0x0f, 0xfc, 0xc1, 0x0f, 0xd4, 0xc8, 0x0f, 0x7e, 0xc2]; // paddb; paddq; movd
const EMMS: &[u8] = &[0x0f, 0x77];
/// `jmp` over a byte that is none.
const JUMP: &[u8] = &[0xeb, 0x01, 0x0f];

#[test]
fn arithmetic_is_done_on_live_registers() {
    let code = repeated(&[
        FLD1,
        FADD_MEMORY,
        FSTP_TEN,
        FLD_TEN,
        FLD1,
        FADDP,
        FLDZ,
        FCOMIP,
        SETB,
        FWAIT,
        FISTP,
        FNSTSW,
        FLDCW_MASKED,
        FNSTCW,
        MMX,
        EMMS,
    ]);
    let (exit, state, interpreted) = compare(&code, Cr0::empty());
    assert_eq!(exit, Exit::Halt);
    assert_eq!((state.fpu.control(), state.fpu.tags()), (0xf7f, 0));
    // Only what had to be looked up first.
    assert!(interpreted < 10, "{interpreted}");
}

#[test]
fn the_last_instruction_is_the_guests_wherever_it_is_asked_for() {
    let other = [FLD1, FISTP].concat();
    for before in [&[FLD1][..], &[FLD1, FLDZ], &[FLD1, JUMP], &[&other], &[FLDZ, FSTP_TEN, JUMP]] {
        for after in [&[][..], &[FNSTSW], &[MMX], &[JUMP, FLDCW_MASKED]] {
            let pieces = [before, after, &[FNSTENV, FLDCW_BACK]].concat();
            let (exit, _, interpreted) = compare(&repeated(&pieces), Cr0::empty());
            assert_eq!(exit, Exit::Halt);
            assert!(interpreted >= 49, "fnstenv is");
            // And at the end.
            compare(&repeated(&[before, after].concat()), Cr0::empty());
        }
    }
}

#[test]
fn a_fault_leaves_the_instruction_before_the_last_one() {
    const FADD_ABSENT: &[u8] = &[0xdc, 0x07]; // fadd qword [rdi]
    const FISTP_ABSENT: &[u8] = &[0xdf, 0x3f]; // fistp qword [rdi]
    for faults in [FADD_ABSENT, FISTP_ABSENT] {
        for before in [&[FLD1][..], &[FLD1, FADD_MEMORY], &[FLD1, FNSTSW], &[FLDZ, JUMP]] {
            let (exit, state, _) = compare(&[&before.concat(), faults].concat(), Cr0::empty());
            assert_eq!(exit, Exit::Shutdown);
            let pointers = state.fpu.pointers();
            assert_eq!(pointers.instruction < state.rip, state.fpu.tags() != 0);
            assert!(pointers.instruction >= CODE);
        }
    }
}

#[test]
fn exceptions_that_are_not_masked_are_the_interpreters() {
    for last in [FLD1, FWAIT, MMX, FADD_MEMORY, FNSTSW] {
        let code = repeated(&[
            FLD1,
            FADD_MEMORY,
            FISTP,
            FLDCW_UNMASKED,
            FLD1,
            FLDZ,
            FDIVP,
            FSTP_TEN,
            last,
        ]);
        let (exit, state, _) = compare(&code, Cr0::empty());
        // Without a table of handlers it shuts down, where the store waits for the division.
        assert_eq!(exit, Exit::Shutdown, "{last:x?}");
        assert!(state.fpu.pending() && state.fpu.tags() != 0);
    }
    // They are masked again, and it goes on in line.
    let code = repeated(&[FLDCW_UNMASKED, FLD1, FLDCW_MASKED, FISTP]);
    assert_eq!(compare(&code, Cr0::empty()).0, Exit::Halt);
}

#[test]
fn a_unit_that_is_switched_off_is_not_used() {
    for pieces in [&[FLD1][..], &[MMX], &[FWAIT], &[FLDCW_MASKED], &[EMMS]] {
        for cr0 in [Cr0::TS, Cr0::EM, Cr0::TS | Cr0::MP] {
            compare(&repeated(pieces), cr0);
        }
    }
}

#[test]
fn the_host_finds_its_own_unit_empty() {
    let code = repeated(&[FLDCW_MASKED, FLD1, FLDZ, &[0xd9, 0xea], FADD_MEMORY, FLD1]);
    let (_, state, _) = compare(&code, Cr0::empty());
    assert_ne!(state.fpu.tags(), 0);
    let mut environment = [0_u16; 14];
    // SAFETY: stores 28 bytes, which there are, and masks exceptions, which are masked.
    unsafe { asm!("fnstenv [{}]", in(reg) environment.as_mut_ptr(), options(nostack)) };
    let [control, _, _, _, tags, ..] = environment;
    assert_eq!((control, tags), (0x37f, 0xffff));
}
