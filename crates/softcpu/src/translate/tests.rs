//! The translator as those see it who watch: what it tells, counts and refuses.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use super::{Config, Counters, Invalidate};
use crate::state::segment::{SegReg, Segment};
use crate::stats::{Stats, StatsSink};
use crate::testing::TestMachine;
use crate::trace::{Event, Tracer};
use crate::vcpu::Exit;

/// Where the guest's code is.
const START: u64 = 0x1000;

/// A thousand divisions, which are interpreted because they are of bytes, in a loop; then `hlt`.
const DIVISIONS: &[u8] = &[
    0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
    0x31, 0xd2, // again: xor edx, edx
    0xb8, 0x64, 0x00, 0x00, 0x00, // mov eax, 100
    0xbb, 0x07, 0x00, 0x00, 0x00, // mov ebx, 7
    0xf6, 0xf3, // div bl
    0xff, 0xc9, // dec ecx
    0x75, 0xee, // jnz again
    0xf4, // hlt
];

#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

impl Tracer for Heard {
    fn event(&mut self, event: Event<'_>) {
        let line = match event {
            Event::Thunks { code, .. } => format!("thunks {}", !code.is_empty()),
            Event::Translated { rip, user, instructions, host, code } => {
                assert!(host != 0 && code.len() > instructions);
                format!("translated {rip:#x} {user} {instructions}")
            }
            Event::Dropped { rip } => format!("dropped {rip:#x}"),
            Event::Evicted { host, len, blocks } => {
                assert!(host != 0 && len < Config::SMALLEST as u64 && blocks > 0);
                "evicted".to_owned()
            }
            _ => return,
        };
        self.0.lock().unwrap().push(line);
    }

    fn wants_blocks(&self) -> bool {
        false
    }
}

#[derive(Clone, Default)]
struct Published(Arc<Mutex<Vec<Stats>>>);

impl StatsSink for Published {
    fn publish(&mut self, stats: &Stats) {
        self.0.lock().unwrap().push(stats.clone());
    }
}

/// A machine that translates `code` at its first run.
fn machine(code: &[u8], config: Config) -> TestMachine {
    let machine = TestMachine::long_mode().translating_as(0, config);
    machine.put(START, code);
    machine
}

fn run(machine: &mut TestMachine) -> Exit {
    machine.vcpu.state.rip = START;
    machine.vcpu.run()
}

#[test]
fn who_watches_is_told_of_blocks_that_come_and_go() {
    let mut machine = machine(DIVISIONS, Config::default());
    let heard = Heard::default();
    machine.vcpu.set_tracer(Some(Box::new(heard.clone())));
    assert_eq!(run(&mut machine), Exit::Halt);
    machine.put(START, DIVISIONS);
    assert_eq!(run(&mut machine), Exit::Halt);
    let heard = heard.0.lock().unwrap();
    // The loop is in the trace that begins before it.
    let translated = "translated 0x1000 false 7";
    assert_eq!(heard[..2], ["thunks true", translated]);
    let dropped = heard.iter().filter(|line| line.starts_with("dropped 0x10")).count();
    assert!(dropped >= 1, "{heard:?}");
    assert!(heard.iter().filter(|line| **line == translated).count() == 2, "{heard:?}");
}

/// A hundred calls, through a register, of a function whose constant is counted up after
/// each; then `hlt`.
const CHANGING: &[u8] = &[
    0xb9, 0x64, 0x00, 0x00, 0x00, // mov ecx, 100
    0xbb, 0x00, 0x20, 0x00, 0x00, // mov ebx, 0x2000
    0x31, 0xf6, // xor esi, esi
    0xff, 0xd3, // again: call rbx
    0x01, 0xc6, // add esi, eax
    0xff, 0x43, 0x01, // inc dword [rbx + 1]
    0xff, 0xc9, // dec ecx
    0x75, 0xf5, // jnz again
    0xf4, // hlt
];

#[test]
fn code_that_changes_behind_the_jump_cache_is_looked_at_again() {
    let mut machine = machine(CHANGING, Config::default());
    // mov eax, 1; ret
    machine.put(0x2000, &[0xb8, 1, 0, 0, 0, 0xc3]);
    machine.vcpu.state.gpr[4] = 0x8000;
    assert_eq!(run(&mut machine), Exit::Halt);
    assert_eq!(machine.vcpu.state.gpr[6], 5050);
    let counters = machine.vcpu.translator_counters().unwrap();
    assert!(counters.invalidated >= 99, "{counters:?}");
}

#[test]
fn code_that_is_taken_for_changed_does_the_same() {
    let run_with = |every: u32, seed| {
        let every = NonZeroU32::new(every).unwrap();
        let invalidate = Some(Invalidate { every, seed });
        let mut machine =
            machine(DIVISIONS, Config { verify: true, invalidate, ..Config::default() });
        assert_eq!(run(&mut machine), Exit::Halt);
        assert_eq!(machine.vcpu.state.rip, START + DIVISIONS.len() as u64);
        assert_eq!(machine.vcpu.state.gpr[..2], [0x020e, 0]);
        let counters = machine.vcpu.translator_counters().unwrap();
        (counters.invalidated, counters.translated, counters.entered)
    };
    // Between all but the first of a thousand turns; it is never hot then.
    assert!(run_with(1, 0).0 > 400, "{:?}", run_with(1, 0));
    let (seldom, other) = (run_with(20, 0), run_with(20, 2));
    assert!((20..200).contains(&seldom.0), "{seldom:?}");
    assert_ne!(seldom, other, "by the seed");
    assert_eq!(seldom, run_with(20, 0), "by nothing else");
}

/// Code that tells where it is.
const SOMEWHERE: &[u8] = &[
    0x48, 0x8d, 0x05, 0x10, 0x00, 0x00, 0x00, // lea rax, [rip + 0x10]: the data
    0x8b, 0x0d, 0x0a, 0x00, 0x00, 0x00, // mov ecx, [rip + 10]: the data
    0xe8, 0x02, 0x00, 0x00, 0x00, // call over the next
    0xeb, 0x02, // jmp to hlt
    0xc3, 0x90, // ret; nop
    0xf4, // hlt
    0x78, 0x56, 0x34, 0x12, // data
];

#[test]
fn code_that_is_mapped_twice_runs_at_both_addresses() {
    const ALIAS: u64 = 100 << 21;
    for threshold in [0, 2, u32::MAX] {
        let mut machine = TestMachine::long_mode().translating_as(threshold, Config::default());
        machine.put(START, SOMEWHERE);
        let cr3 = machine.vcpu.state.cr3;
        // The table of 2 MiB pages is the third one.
        machine.put(cr3 + 0x2000 + 100 * 8, &0xe7_u64.to_le_bytes());
        for at in [START, START + ALIAS, START, START + ALIAS, START + ALIAS, START] {
            machine.vcpu.state.rip = at;
            machine.vcpu.state.gpr[4] = 0x8000;
            machine.vcpu.state.gpr[0..2].fill(0);
            assert_eq!(machine.vcpu.run(), Exit::Halt);
            let state = &machine.vcpu.state;
            assert_eq!(state.gpr[..2], [at + 0x17, 0x1234_5678]);
            assert_eq!(state.rip, at + 0x17);
        }
        let counters = machine.vcpu.stats().engine;
        assert!(counters.decoded <= 5, "decoded once: {counters:?}");
    }
}

/// A hundred thousand turns of a loop that adds two words at RBX, and stores between them;
/// then `hlt`.
const TOGETHER: &[u8] = &[
    0xb9, 0xa0, 0x86, 0x01, 0x00, // mov ecx, 100000
    0x31, 0xd2, // xor edx, edx
    0x48, 0x03, 0x13, // again: add rdx, [rbx]
    0x48, 0x89, 0x4b, 0x08, // mov [rbx + 8], rcx
    0x48, 0x03, 0x53, 0x10, // add rdx, [rbx + 16]
    0xff, 0xc9, // dec ecx
    0x75, 0xf1, // jnz again
    0xf4, // hlt
];

/// RBX points to `at`, where [`TOGETHER`] finds three and four.
fn point_to_words(machine: &mut TestMachine, at: u64) {
    machine.put(at, &3_u64.to_le_bytes());
    machine.put(at + 16, &4_u64.to_le_bytes());
    machine.vcpu.state.gpr[3] = at;
}

#[test]
fn what_lies_in_two_pages_is_not_checked_at_once_for_ever() {
    for (at, in_two_pages) in [(0x5100, false), (0x5ff0, true), (0x5ff8, true), (0x6000, false)] {
        let mut machine = machine(TOGETHER, Config { verify: true, ..Config::default() });
        point_to_words(&mut machine, at);
        assert_eq!(run(&mut machine), Exit::Halt);
        assert_eq!(machine.vcpu.state.gpr[2], 700_000);
        let counters = machine.vcpu.translator_counters().unwrap();
        assert_eq!(counters.split > 0, in_two_pages, "{counters:?}");
        // Not so often that a stolen processor in between could make it more.
        assert!(counters.split < 50_000, "{counters:?}");
        // It is the same again where it was.
        point_to_words(&mut machine, 0x5100);
        assert_eq!(run(&mut machine), Exit::Halt);
        assert_eq!(machine.vcpu.state.gpr[2], 700_000);
    }
}

/// Adds two words of each of ten thousand records of RSI bytes from RBX on; then `hlt`.
const RECORDS: &[u8] = &[
    0xb9, 0x10, 0x27, 0x00, 0x00, // mov ecx, 10000
    0x48, 0x03, 0x13, // again: add rdx, [rbx]
    0x48, 0x03, 0x53, 0x10, // add rdx, [rbx + 16]
    0x48, 0x01, 0xf3, // add rbx, rsi
    0xff, 0xc9, // dec ecx
    0x75, 0xf2, // jnz again
    0xf4, // hlt
];

#[test]
fn who_walks_through_pages_goes_on_checking_at_once() {
    let mut machine = machine(RECORDS, Config { verify: true, ..Config::default() });
    let at = 0x10_0000;
    machine.put(at, &1_u64.to_le_bytes().repeat(30_000));
    // The records that lie in two pages.
    let split = (0..10_000_u64).filter(|n| ((n * 24) & 0xfff) + 24 > 0x1000).count() as u64;
    for walks in 1..=4 {
        (machine.vcpu.state.gpr[2], machine.vcpu.state.gpr[3]) = (0, at);
        machine.vcpu.state.gpr[6] = 24;
        assert_eq!(run(&mut machine), Exit::Halt);
        assert_eq!(machine.vcpu.state.gpr[2], 20_000);
        let counters = machine.vcpu.translator_counters().unwrap();
        // But for one that is looked at while that is new.
        assert!(counters.split >= (split - 1) * walks, "{split} a walk, {walks}: {counters:?}");
    }
}

#[test]
fn what_lies_in_two_pages_lies_in_one_window() {
    let config = Config { verify: true, turns: 1, ..Config::default() };
    let mut machine = machine(TOGETHER, config);
    // Linux's __USER_CS and __USER_DS.
    let state = &mut machine.vcpu.state;
    *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(0x33, 0x00af_fb00_0000_ffff);
    *state.segment_mut(SegReg::Ss) = Segment::from_descriptor(0x2b, 0x00cf_f300_0000_ffff);
    machine.vcpu.state_changed();
    let at = 0x5ff0;
    point_to_words(&mut machine, at);
    // Users may not do the last instruction, and there is nobody to tell.
    assert_eq!(run(&mut machine), Exit::Shutdown);
    assert_eq!(machine.vcpu.state.gpr[2], 700_000);
    let counters = machine.vcpu.translator_counters().unwrap();
    assert!(counters.hot > 0 && counters.mirrored > 0, "{counters:?}");
    // So many while it was new. Hot, it is checked at once again, and asks for the mirror at the
    // first split, not when patience has come to its end.
    assert!((64..80).contains(&counters.split), "{counters:?}");
}

#[test]
fn what_was_done_and_how_long_it_took_is_published() {
    let mut machine = machine(DIVISIONS, Config::default());
    let published = Published::default();
    machine.vcpu.set_stats(Box::new(published.clone()), true);
    assert_eq!(run(&mut machine), Exit::Halt);
    machine.vcpu.publish_stats();
    let published = published.0.lock().unwrap();
    let stats = published.last().unwrap();
    let counters = stats.translator;
    assert!(counters.translated >= 1 && counters.entered >= 1, "{counters:?}");
    assert!(counters.used > counters.bytes && counters.used < counters.capacity, "{counters:?}");
    assert_eq!(counters.exits.iter().sum::<u64>(), counters.entered);
    assert!(
        counters.exits.iter().zip(Counters::EXITS).all(|(n, name)| *n == 0 || !name.is_empty())
    );
    let divisions = stats.called_back.iter().find(|(name, _)| name == "div").unwrap().1;
    assert!((990..=1000).contains(&divisions), "{divisions}");
    let (time, detail) = (stats.time, stats.time.detail.unwrap());
    let parts = [time.halted, time.outside, time.decoding, time.translating];
    assert!(parts.iter().all(|part| !part.is_zero() || *part == time.outside), "{time:?}");
    let sum = parts.iter().sum::<std::time::Duration>() + detail.translated + detail.called_back;
    assert!(!detail.translated.is_zero() && !detail.called_back.is_zero());
    assert!(sum <= stats.elapsed, "{stats:?}");
}

#[test]
fn without_being_asked_for_detail_is_not_measured() {
    let mut machine = machine(DIVISIONS, Config::default());
    machine.vcpu.set_stats(Box::new(Published::default()), false);
    assert_eq!(run(&mut machine), Exit::Halt);
    let stats = machine.vcpu.stats();
    assert!(stats.time.detail.is_none() && stats.called_back.is_empty());
    assert!(stats.translator.interpreted >= 990);
}

#[test]
fn the_least_code_memory_is_filled_again_and_again() {
    // Each a block of its own: jmp to the next.
    let count = 0x8000;
    let mut code = [0xeb, 0x00].repeat(count);
    code.push(0xf4);
    let config =
        Config { code_cache: Config::SMALLEST, verify: true, turns: 5, ..Config::default() };
    let mut machine = machine(&code, config);
    let heard = Heard::default();
    machine.vcpu.set_tracer(Some(Box::new(heard.clone())));
    for _ in 0..2 {
        assert_eq!(run(&mut machine), Exit::Halt);
        assert_eq!(machine.vcpu.state.rip, START + code.len() as u64);
    }
    let counters = machine.vcpu.stats().translator;
    assert!(counters.evicted >= counters.translated / 2, "{counters:?}");
    assert!(counters.used <= Config::SMALLEST as u64, "{counters:?}");
    let heard = heard.0.lock().unwrap();
    assert!(heard.iter().filter(|line| *line == "evicted").count() >= 4, "{counters:?}");
}

fn run_at(machine: &mut TestMachine, rip: u64) -> Exit {
    machine.vcpu.state.rip = rip;
    machine.vcpu.run()
}

/// Fills code memory, a page of the guest's at a time.
fn filler(machine: &TestMachine) -> impl FnMut(&mut TestMachine) -> Counters + use<> {
    // Jumps to the next one each.
    machine.put(0x2_0000, &[0xeb, 0].repeat(0x10_0000));
    let mut more = 0x2_0000;
    move |machine| {
        machine.put(more + 0xffe, &[0xf4]);
        assert_eq!(run_at(machine, more), Exit::Halt);
        more += 0x1000;
        machine.vcpu.translator_counters().unwrap()
    }
}

#[test]
fn jumps_to_what_was_evicted_lead_out_until_it_is_back() {
    let config = Config { code_cache: Config::SMALLEST, verify: true, ..Config::default() };
    // Ends in a jump to 0x1080.
    let mut machine = machine(&[0xff, 0xc3, 0xe9, 0x79, 0, 0, 0], config);
    // mov eax, 5; hlt
    machine.put(0x1080, &[0xb8, 5, 0, 0, 0, 0xf4]);
    let mut fill = filler(&machine);
    assert_eq!(run_at(&mut machine, 0x1080), Exit::Halt);
    // What is jumped to is in the first half of the memory, what jumps in the second.
    while fill(&mut machine).used < Config::SMALLEST as u64 / 2 {}
    // How often a jump led out.
    let out = |machine: &mut TestMachine| {
        let before = machine.vcpu.translator_counters().unwrap();
        machine.vcpu.state.gpr[..4].fill(0);
        assert_eq!(run(machine), Exit::Halt);
        assert_eq!((machine.vcpu.state.gpr[0], machine.vcpu.state.gpr[3]), (5, 1));
        assert_eq!(machine.vcpu.state.rip, 0x1086);
        let after = machine.vcpu.translator_counters().unwrap();
        assert_eq!(after.evicted, before.evicted);
        after.exits[2] - before.exits[2]
    };
    assert_eq!([(); 3].map(|()| out(&mut machine)), [1, 0, 0]);
    while fill(&mut machine).evicted == 0 {}
    assert_eq!([(); 3].map(|()| out(&mut machine)), [1, 0, 0]);
}

#[test]
fn what_began_with_a_jump_to_what_was_evicted_stays_closed() {
    let config = Config { code_cache: Config::SMALLEST, verify: true, ..Config::default() };
    // jmp 0x1080, where there is mov eax, 5; hlt
    let mut machine = machine(&[0xe9, 0x7b, 0, 0, 0], config);
    machine.put(0x1080, &[0xb8, 5, 0, 0, 0, 0xf4]);
    // inc ebx; jmp START, from another page
    machine.put(0x3000, &[0xff, 0xc3, 0xe9, 0xf9, 0xdf, 0xff, 0xff]);
    let mut fill = filler(&machine);
    assert_eq!(run_at(&mut machine, 0x1080), Exit::Halt);
    while fill(&mut machine).used < Config::SMALLEST as u64 / 2 {}
    for _ in 0..3 {
        assert_eq!(run(&mut machine), Exit::Halt);
        assert_eq!(run_at(&mut machine, 0x3000), Exit::Halt);
    }
    assert_eq!((machine.vcpu.state.gpr[0], machine.vcpu.state.gpr[3]), (5, 3));
    // mov eax, 9; hlt
    machine.put(START, &[0xb8, 9, 0, 0, 0, 0xf4]);
    while fill(&mut machine).evicted == 0 {}
    assert_eq!(run_at(&mut machine, 0x3000), Exit::Halt);
    assert_eq!(machine.vcpu.state.gpr[0], 9);
}

#[test]
fn what_went_with_the_code_memory_becomes_hot_anew() {
    // Each a block of its own, and a trace: call to the next.
    let count = 0x2000;
    let mut code = [0xe8, 0, 0, 0, 0].repeat(count);
    code.push(0xf4);
    let config = Config { code_cache: Config::SMALLEST, ..Config::default() };
    let mut machine = TestMachine::long_mode().translating_as(3, config);
    machine.put(START, &code);
    let mut translated = 0;
    let times = [1, 2, 3, 4, 5].map(|_| {
        machine.vcpu.state.gpr[4] = 0x20_0000;
        assert_eq!(run(&mut machine), Exit::Halt);
        let before = translated;
        translated = machine.vcpu.translator_counters().unwrap().translated;
        translated - before
    });
    // At the third run, as far as patience went, and not at once when that was lost.
    assert!(machine.vcpu.translator_counters().unwrap().evicted >= 1);
    assert_eq!(times, [0, 0, times[2], 0, 0]);
    assert!(times[2] > 100, "{times:?}");
}

#[test]
fn a_translation_that_reaches_what_it_may_not_ends_the_vcpu() {
    let config = Config { verify: true, ..Config::default() };
    let mut machine = machine(DIVISIONS, config);
    // syscall
    machine.vcpu.translator.as_mut().unwrap().maker.bench.smuggled = vec![0x0f, 0x05];
    assert_eq!(run(&mut machine), Exit::Failed);
    let failure = machine.vcpu.failure().unwrap();
    assert_eq!(failure.rip, START);
    let text = failure.to_string();
    assert!(text.contains("0x1000") && text.contains("syscall"), "{text}");
    assert_eq!(machine.vcpu.stats().translator.translated, 0);
}

/// Calls, a hundred times each, of `mov eax, imm32; ret` that begins at 0x1ffd; its last bytes
/// are changed by a store, and then by another page that is mapped there. Sums are in ESI.
const ACROSS: &[u8] = &[
    0xbf, 0x03, 0x00, 0x00, 0x00, // mov edi, 3
    0xb9, 0x64, 0x00, 0x00, 0x00, // turn: mov ecx, 100
    0xe8, 0xee, 0x0e, 0x00, 0x00, // again: call 0x1ffd
    0x01, 0xc6, // add esi, eax
    0xff, 0xc9, // dec ecx
    0x75, 0xf5, // jnz again
    0xff, 0xcf, // dec edi
    0x74, 0x20, // jz end
    0x83, 0xff, 0x02, // cmp edi, 2
    0x75, 0x09, // jne other
    0xfe, 0x04, 0x25, 0x01, 0x20, 0x00, 0x00, // inc byte [0x2001]
    0xeb, 0xde, // jmp turn
    0x48, 0x89, 0x1c, 0x25, 0, 0, 0, 0, // other: mov [entry], rbx
    0x0f, 0x01, 0x3c, 0x25, 0x00, 0x20, 0x00, 0x00, // invlpg [0x2000]
    0xeb, 0xcc, // jmp turn
    0xf4, // end: hlt
];

#[test]
fn an_instruction_in_two_pages_is_translated_and_looked_at_in_both() {
    for threshold in [0, 3, u32::MAX] {
        let mut machine = TestMachine::long_mode();
        machine.set_present(0x2000, true);
        let entry = (machine.vcpu.state.cr3 & !0xfff) + 0x3000 + 2 * 8;
        let mut code = ACROSS.to_vec();
        let at = code.windows(4).position(|four| four == [0; 4]).unwrap();
        code[at..at + 4].copy_from_slice(&(entry as u32).to_le_bytes());
        machine.put(0x1100, &code);
        let function = [0xb8, 1, 0, 0, 0, 0xc3];
        machine.put(0x1ffd, &function);
        // Another second half.
        machine.put(0x5000, &[0, 2, 0xc3]);
        let state = &mut machine.vcpu.state;
        (state.gpr[3], state.gpr[4], state.gpr[6], state.rip) = (0x5067, 0x8000, 0, 0x1100);
        machine.vcpu.state_changed();
        let config = Config { verify: true, ..Config::default() };
        let mut machine = machine.translating_as(threshold, config);
        assert_eq!(machine.vcpu.run(), Exit::Halt);
        let [first, second, third] = [1, 0x100_0001, 0x200_0001];
        let sum = (100 * (first + second + third)) & 0xffff_ffff_u64;
        assert_eq!(machine.vcpu.state.gpr[6], sum, "{threshold}");
        if threshold != u32::MAX {
            // It is no reason to leave translated code.
            let entered = machine.vcpu.translator_counters().unwrap().entered;
            assert!(entered < 60, "{entered}");
        }
    }
}

#[test]
fn loops_by_the_counter_go_on_by_themselves() {
    // again: add rax, 3; jrcxz out; loop again; out: hlt; with RCX, and with ECX.
    let ways: [(&[u8], u64); 2] = [
        (&[0x48, 0x83, 0xc0, 3, 0xe3, 2, 0xe2, 0xf8, 0xf4], 1000),
        (&[0x48, 0x83, 0xc0, 3, 0x67, 0xe3, 3, 0x67, 0xe2, 0xf6, 0xf4], 0x7_0000_0000 | 1000),
    ];
    for (code, turns) in ways {
        for (counter, adds) in [(turns, 3000), (turns & !0xffff, 3)] {
            let mut machine = TestMachine::long_mode().translating(3);
            machine.put(START, code);
            machine.vcpu.state.gpr[..2].copy_from_slice(&[0, counter]);
            machine.vcpu.state.rip = START;
            assert_eq!(machine.vcpu.run(), Exit::Halt);
            let stays = if adds == 3 { counter } else { 0 };
            assert_eq!(machine.vcpu.state.gpr[..2], [adds, stays]);
            let counters = machine.vcpu.translator_counters().unwrap();
            assert!(counters.interpreted < 20 && counters.entered < 20, "{counters:?}");
        }
    }
}
