//! Runs where they end: at a page's end, at a fault, on a page with code; backwards; and none.

use crate::state::VcpuState;
use crate::state::rflags::RFlags;
use crate::testing::TestMachine;
use crate::translate::Config;
use crate::vcpu::Exit;

const CODE: u64 = 0x1000;
/// What follows is present, but for the page at [`ABSENT`].
const DATA: u64 = 0x8000;
const ABSENT: u64 = 0xb000;

const MOVSB: &[u8] = &[0xf3, 0xa4, 0xf4];
const MOVSQ: &[u8] = &[0xf3, 0x48, 0xa5, 0xf4];
const STOSB: &[u8] = &[0xf3, 0xaa, 0xf4];
const STOSW: &[u8] = &[0x66, 0xf3, 0xab, 0xf4];
const STOSQ: &[u8] = &[0xf3, 0x48, 0xab, 0xf4];
/// The same with addresses of 32 bits.
const NARROW_STOSD: &[u8] = &[0x67, 0xf3, 0xab, 0xf4];
const NARROW_MOVSB: &[u8] = &[0x67, 0xf3, 0xa4, 0xf4];

/// RCX, RSI, RDI.
type Registers = [u64; 3];

fn machine() -> TestMachine {
    let mut machine = TestMachine::long_mode();
    machine.set_present(ABSENT, false);
    let data: Vec<u8> = (0..0x3000_u32).map(|n| (n / 3 * 7) as u8).collect();
    machine.put(DATA, &data);
    machine
}

/// Runs `code` a few times from the same registers: how it ends, and how many instructions were
/// interpreted the last time.
fn run(machine: &mut TestMachine, code: &[u8], at: Registers, flags: RFlags) -> (VcpuState, u64) {
    machine.put(CODE, code);
    let mut interpreted = 0;
    for _ in 0..3 {
        let state = &mut machine.vcpu.state;
        state.gpr[0] = 0x1122_3344_5566_7788;
        [state.gpr[1], state.gpr[6], state.gpr[7]] = at;
        state.rip = CODE;
        state.rflags = RFlags::FIXED | RFlags::CF | flags;
        let counted = |machine: &TestMachine| {
            machine.vcpu.translator_counters().map_or(0, |counters| counters.interpreted)
        };
        let before = counted(machine);
        // Without a table of handlers a fault shuts down.
        assert!(matches!(machine.vcpu.run(), Exit::Halt | Exit::Shutdown));
        interpreted = counted(machine) - before;
    }
    (machine.vcpu.state.clone(), interpreted)
}

/// Runs it on both; says how many instructions of a warm translation were interpreted.
fn compare(code: &[u8], at: Registers, flags: RFlags) -> u64 {
    let mut interpreter = machine();
    let config = Config { verify: true, ..Config::default() };
    let mut translator = machine().translating_as(0, config);
    let (expected, _) = run(&mut interpreter, code, at, flags);
    let (found, interpreted) = run(&mut translator, code, at, flags);
    assert_eq!(expected.gpr, found.gpr, "{code:x?} {at:x?}");
    assert_eq!((expected.rip, expected.rflags), (found.rip, found.rflags), "{code:x?} {at:x?}");
    assert_eq!(expected.cr2, found.cr2, "{code:x?} {at:x?}");
    assert_eq!(interpreter.get(0, 0x10000), translator.get(0, 0x10000), "{code:x?} {at:x?}");
    interpreted
}

/// Reads at RSI and stores at RDI: what is done in place there is looked up anew at each run.
const LOOKS: &[u8] = &[0x8a, 0x16, 0x80, 0x0f, 0x00];
/// The same with addresses of 32 bits.
const NARROW_LOOKS: &[u8] = &[0x67, 0x8a, 0x16, 0x67, 0x80, 0x0f, 0x00];

/// As [`compare`]; says whether nothing was interpreted but those looks.
fn in_line(code: &[u8], at: Registers) -> bool {
    let looks = if code[0] == 0x67 { NARROW_LOOKS } else { LOOKS };
    let alone = compare(&[looks, &[0xf4]].concat(), at, RFlags::empty());
    compare(&[looks, code].concat(), at, RFlags::empty()) == alone
}

#[test]
fn a_run_within_pages_is_done_at_once() {
    for (code, count, word) in
        [(MOVSB, 4096, 1), (MOVSQ, 512, 8), (STOSB, 64, 1), (STOSW, 2048, 2), (STOSQ, 512, 8)]
    {
        assert!(in_line(code, [count, DATA, DATA + 0x1000]));
        let short = DATA + 0x2000 - 3 * word;
        assert!(in_line(code, [3, DATA + 0x123, short]));
    }
    for code in [NARROW_MOVSB, NARROW_STOSD] {
        let upper = 0xaaaa_0000_0000;
        let at = [upper + 7, upper + DATA + 5, upper + DATA + 0x1800];
        assert!(in_line(code, at));
        // Of none nothing changes, not even what is above.
        assert_eq!(compare(code, [upper, upper + DATA, upper + DATA], RFlags::empty()), 0);
    }
}

#[test]
fn overlapping_runs_repeat_what_lies_between() {
    for distance in [0_u64, 1, 3, 8, 63] {
        for code in [MOVSB, MOVSQ] {
            let at = [40, DATA + 0x100, DATA + 0x100 + distance];
            assert!(in_line(code, at));
            assert!(in_line(code, [40, at[2], at[1]]));
        }
    }
}

#[test]
fn what_reaches_further_goes_backwards_or_is_nothing_is_the_interpreters() {
    for code in [MOVSB, MOVSQ, STOSB, STOSW, STOSQ, NARROW_MOVSB, NARROW_STOSD] {
        assert_eq!(compare(code, [0, 1 << 63, 1 << 62], RFlags::empty()), 0);
        for (count, from, to) in [
            (300, DATA, DATA + 0xff8),
            (300, DATA + 0xffc, DATA + 0x1000),
            (3, DATA + 0xff9, DATA + 0x1ff9),
            (5000, DATA, DATA + 0x10),
            // The page that is not there, and then.
            (300, DATA, ABSENT - 8),
            (300, DATA + 3, ABSENT - 7),
            (8, ABSENT - 4, DATA),
            (8, DATA, ABSENT),
        ] {
            assert!(compare(code, [count, from, to], RFlags::empty()) > 0, "{code:x?} {count}");
        }
        let at = [20, DATA + 0x800, DATA + 0x1800];
        assert!(compare(code, at, RFlags::DF) > 0);
    }
}

#[test]
fn a_run_over_code_is_seen() {
    // Itself, and what comes behind it: by as many `hlt`s.
    for count in [1, 2, 64] {
        let mut interpreter = machine();
        let mut translator = machine().translating_as(0, Config::default());
        let code = [&[0xb0, 0xf4][..], STOSB, &[0x90; 4]].concat();
        let at = [count, DATA, CODE + 4];
        let (expected, _) = run(&mut interpreter, &code, at, RFlags::empty());
        let (found, interpreted) = run(&mut translator, &code, at, RFlags::empty());
        assert!(interpreted > 0);
        assert_eq!((expected.gpr, expected.rip), (found.gpr, found.rip));
        assert_eq!(interpreter.get(CODE, 0x100), translator.get(CODE, 0x100));
    }
}

#[test]
fn single_elements_are_done_in_line() {
    // lodsb; stosb; movsw; movsq; scasd; setb dl; cmpsb; setz dh; lodsw; stosq; hlt
    let code = [
        0xac, 0xaa, 0x66, 0xa5, 0x48, 0xa5, 0xaf, 0x0f, 0x92, 0xc2, 0xa6, 0x0f, 0x94, 0xc6, 0x66,
        0xad, 0x48, 0xab, 0xf4,
    ];
    assert!(in_line(&code, [9, DATA + 0x10, DATA + 0x1003]));
    assert!(compare(&code, [9, DATA + 0xffe, DATA + 0x1fff], RFlags::empty()) > 0);
    assert!(compare(&code, [9, DATA, ABSENT - 4], RFlags::empty()) > 0);
    assert!(compare(&code, [9, DATA + 0x40, DATA + 0x1080], RFlags::DF) > 0);
}
