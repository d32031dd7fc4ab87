use super::super::config::Config;
use super::super::relocate::Kind;
use super::super::thunks::Thunks;
use super::super::trace::{Step, Then, Trace};
use super::*;
use crate::state::control::Cr0;
use crate::testing::TestMachine;
use crate::vcpu::Exit;

/// `trace`, `distance` further on.
fn moved(trace: &Trace, distance: u64) -> Trace {
    let step = |step: &Step| {
        let mut instruction = step.instruction;
        instruction.set_ip(instruction.ip().wrapping_add(distance));
        if instruction.near_branch_target() != 0 {
            instruction.set_near_branch64(instruction.near_branch64().wrapping_add(distance));
        }
        if instruction.is_ip_rel_memory_operand() {
            let displacement = instruction.memory_displacement64().wrapping_add(distance);
            instruction.set_memory_displacement64(displacement);
        }
        let then = match step.then {
            Then::Unless { taken, exit } => {
                Then::Unless { taken, exit: exit.wrapping_add(distance) }
            }
            then => then,
        };
        let onwards = step.onwards.map(|rip| rip.wrapping_add(distance));
        Step { instruction, shape: step.shape, then, onwards }
    };
    Trace {
        steps: trace.steps.iter().map(step).collect(),
        ops: trace.ops.iter().map(|op| op.moved(distance)).collect(),
        mode: trace.mode,
        segment: trace.segment,
    }
}

/// The clone that was placed last, of the translation `number`, is what translating its code
/// would have made. Every clone that a unit test makes comes by here.
pub(super) fn compare(
    translations: &mut Translations,
    thunks: &Thunks,
    number: u32,
    links: &[block::Link],
) {
    let newest = *translations.regions.newest().unwrap().blocks.last().unwrap();
    let origin = translations.regions.block(number).unwrap();
    let (trace, manner) = &translations.traces[&number];
    let (trace, manner) = (moved(trace, newest.rip.wrapping_sub(origin.rip)), *manner);
    translations.remember(&trace, manner);
    compare_newest(translations, thunks, links);
}

/// What was placed last is what would have been made there of its trace, which is remembered.
pub(in super::super) fn compare_newest(
    translations: &Translations,
    thunks: &Thunks,
    links: &[block::Link],
) {
    let region = translations.regions.newest().unwrap();
    let newest = *region.blocks.last().unwrap();
    let number = translations.regions.number(region.blocks.len() - 1).unwrap();
    let (trace, manner) = &translations.traces[&number];
    let address = translations.memory.address(newest.offset as usize) as u64;
    let mut ops = Ops::default();
    let first_link = newest.first_link;
    let site = block::Site { thunks, base: address, first_link };
    let (mut scratch, spare) = Default::default();
    let made = block::translate(trace, site, &mut ops, *manner, &mut scratch, spare).unwrap();
    let (mut wanted, relocations) = (made.code, made.relocations);
    let kept = newest.relocations.of(&region.relocations);
    assert_eq!(kept, Some(&relocations[..]).filter(|_| made.movable));
    assert_eq!((newest.way_out as usize, links), (made.way_out, &made.links[..]));
    let code = translations.memory.read(newest.offset as usize, newest.len as usize);
    // Its ops are elsewhere, and the same.
    for relocation in relocations.iter().filter(|relocation| relocation.kind() == Kind::Op) {
        let place = relocation.at()..relocation.at() + 8;
        let address = |code: &[u8]| u64::from_le_bytes(code[place.clone()].try_into().unwrap());
        let wanted_op = ops.get(ops.number(address(&wanted), 0).unwrap()).unwrap();
        let first = newest.first_op as usize;
        let number = region.ops.number(address(code), first).unwrap();
        assert!((first..first + usize::from(newest.ops)).contains(&number));
        let op = region.ops.get(number).unwrap();
        assert_eq!(format!("{wanted_op:?}"), format!("{op:?}"));
        wanted[place.clone()].copy_from_slice(&code[place]);
    }
    assert_eq!(wanted, code, "moved to {:#x}", newest.rip);
}

/// The frame that the code is in.
const FRAME: u64 = 0x1000;
/// Its tables: a table of 512 times that frame, in two large pages, at many places.
const TABLES: u64 = 0x10_0000;
/// Where a stack and data are.
const STACK: u64 = 0x8000;

/// The address of the frame that `n` stands for.
fn address(n: u64) -> u64 {
    ((1 + n % 200) << 39) + ((n % 1024) << 12)
}

/// A machine that has `code` at every [`address`], and translates what has run three times.
fn machine(code: &[u8], config: Config) -> TestMachine {
    with_aliases(TestMachine::long_mode(), code).translating_as(3, config)
}

fn with_aliases(machine: TestMachine, code: &[u8]) -> TestMachine {
    let (l3, l2, l1) = (TABLES, TABLES + 0x1000, TABLES + 0x2000);
    for n in 1..=200 {
        machine.put(machine.vcpu.state.cr3 + n * 8, &(l3 | 0x67).to_le_bytes());
    }
    machine.put(l3, &(l2 | 0x67).to_le_bytes());
    for n in 0..2 {
        machine.put(l2 + n * 8, &(l1 | 0x67).to_le_bytes());
    }
    for n in 0..512 {
        machine.put(l1 + n * 8, &(FRAME | 0x67).to_le_bytes());
    }
    machine.put(FRAME, code);
    machine
}

fn run(machine: &mut TestMachine, at: u64) -> Exit {
    machine.vcpu.state.rip = at;
    machine.vcpu.state.gpr[..16].fill(0);
    machine.vcpu.state.gpr[4] = STACK;
    machine.vcpu.run()
}

/// Where the code's data is.
const DATA: u64 = 0x200;

/// Code that depends on where it is in all ways there are, with its data at [`DATA`].
const SOMEWHERE: &[&[u8]] = &[
    &[0x48, 0x8d, 0x05, 0xf9, 0x01, 0x00, 0x00], // lea rax, [data]
    &[0x8b, 0x15, 0xfa, 0x01, 0x00, 0x00],       // mov edx, [data]
    &[0x4c, 0x8b, 0x1d, 0xf9, 0x01, 0x00, 0x00], // mov r11, [data]
    &[0x89, 0x15, 0xfa, 0x01, 0x00, 0x00],       // mov [data], edx
    &[0x0f, 0x10, 0x05, 0xf9, 0x01, 0x00, 0x00], // movups xmm0, [data]
    &[0x64, 0x48, 0x03, 0x1d, 0xf8, 0x01, 0x00, 0x00], // add rbx, fs:[data]
    &[0x48, 0x8b, 0x05, 0xf5, 0x0f, 0x00, 0x00], // mov rax, [the end of the page]
    &[0x68, 0x78, 0x56, 0x34, 0x12, 0x5e],       // push 0x12345678; pop rsi
    &[0xe8, 0x01, 0x00, 0x00, 0x00, 0xf4, 0xc3], // call function; hlt; function: ret
    // lea rax, [function]; call rax; hlt; function: ret
    &[0x48, 0x8d, 0x05, 0x03, 0x00, 0x00, 0x00, 0xff, 0xd0, 0xf4, 0xc3],
    // lea rax, [end]; push rax; ret; end:
    &[0x48, 0x8d, 0x05, 0x02, 0x00, 0x00, 0x00, 0x50, 0xc3],
    // lea rax, [end]; jmp rax; end:
    &[0x48, 0x8d, 0x05, 0x02, 0x00, 0x00, 0x00, 0xff, 0xe0],
    // lea rax, [function]; mov [data], rax; call [data]; hlt; function: ret
    &[
        0x48, 0x8d, 0x05, 0x0e, 0x00, 0x00, 0x00, 0x48, 0x89, 0x05, 0xf2, 0x01, 0x00, 0x00, 0xff,
        0x15, 0xec, 0x01, 0x00, 0x00, 0xf4, 0xc3,
    ],
    // lea rax, [end]; mov [data], rax; jmp [data]; end:
    &[
        0x48, 0x8d, 0x05, 0x0d, 0x00, 0x00, 0x00, 0x48, 0x89, 0x05, 0xf2, 0x01, 0x00, 0x00, 0xff,
        0x25, 0xec, 0x01, 0x00, 0x00,
    ],
    // mov ecx, 5; again: add ebx, ecx; div cl; dec ecx; jnz again
    &[0xb9, 5, 0, 0, 0, 0x01, 0xcb, 0xf6, 0xf1, 0xff, 0xc9, 0x75, 0xf8],
    // mov ecx, 3; again: dec ecx; jz end; mov eax, [data]; jmp again; end:
    &[0xb9, 3, 0, 0, 0, 0xff, 0xc9, 0x74, 0x08, 0x8b, 0x05, 0xf1, 0x01, 0x00, 0x00, 0xeb, 0xf4],
    // test ecx, ecx; jnz end; nop; jmp on; on: call end; end:
    &[0x85, 0xc9, 0x75, 0x0b, 0x0f, 0x1f, 0x00, 0xeb, 0x00, 0xe8, 0x01, 0, 0, 0, 0x90],
    &[0xe9, 0x00, 0x10, 0x00, 0x00], // jmp end, a page further
    &[0xe9, 0x00, 0xf0, 0xff, 0xff], // jmp end, a page before
    &[0xe8, 0x01, 0x10, 0x00, 0x00, 0xf4, 0xc3], // call function, a page further
    &[0xb1, 0x01, 0xf6, 0xf1, 0x0f, 0xa2], // mov cl, 1; div cl; cpuid
    &[0xb9, 3, 0, 0, 0, 0x31, 0xd2, 0xf7, 0xf1], // mov ecx, 3; xor edx, edx; div ecx
    // lea rbx, [data]; mov rax, [rbx]; mov rcx, [rbx + 8]; mov rdx, [rbx + 16]
    &[
        0x48, 0x8d, 0x1d, 0xf9, 0x01, 0x00, 0x00, 0x48, 0x8b, 0x03, 0x48, 0x8b, 0x4b, 0x08, 0x48,
        0x8b, 0x53, 0x10,
    ],
    // lea r13, [data]; mov rax, [r13]; mov rcx, [r13 + 8]; add r15, r13
    &[
        0x4c, 0x8d, 0x2d, 0xf9, 0x01, 0x00, 0x00, 0x49, 0x8b, 0x45, 0x00, 0x49, 0x8b, 0x4d, 0x08,
        0x4d, 0x01, 0xef,
    ],
    &[0x53, 0x51, 0x5e, 0x5f], // push rbx; push rcx; pop rsi; pop rdi
];

/// `mov rax, [eip + 0x1f8]`: the page is the same in the lower half of addresses only.
const NARROW: &[u8] = &[0x67, 0x48, 0x8b, 0x05, 0xf8, 0x01, 0x00, 0x00];

/// `code`, ended by `hlt`, and data.
fn ended(code: &[u8]) -> Vec<u8> {
    let mut all = [code, &[0xf4]].concat();
    all.resize(DATA as usize, 0xf4);
    all.extend(1..=64);
    all
}

/// Runs the same on both machines, which must agree.
fn run_both(machines: [&mut TestMachine; 2], at: u64) {
    let [ours, theirs] = machines.map(|machine| {
        assert_eq!(run(machine, at), Exit::Halt);
        let state = &machine.vcpu.state;
        let data = machine.get(FRAME + DATA, 64);
        (state.gpr, state.rip, state.rflags, state.vec, data)
    });
    assert_eq!(ours, theirs, "at {at:#x}");
}

#[test]
fn code_that_was_hot_elsewhere_runs_from_its_first_time_on_as_a_clone() {
    let all = SOMEWHERE[..8].concat();
    for code in SOMEWHERE.iter().copied().chain([&all[..]]) {
        let code = ended(code);
        let mut machine = machine(&code, Config::default());
        let mut interpreter = with_aliases(TestMachine::long_mode(), &code);
        for _ in 0..5 {
            run_both([&mut machine, &mut interpreter], address(3));
        }
        let before = machine.vcpu.stats();
        assert!(before.translator.translated > 0 && before.translator.moved == 0, "{before:?}");
        for n in [700, 3, 1021, 700, 1] {
            run_both([&mut machine, &mut interpreter], address(n));
        }
        let after = machine.vcpu.stats();
        assert!(after.translator.moved >= 3, "{code:x?} {after:?}");
        assert_eq!(after.translator.translated, before.translator.translated, "{code:x?}");
        // Neither what is hot nor the `hlt` behind it.
        let decoded = after.engine.decoded - before.engine.decoded;
        assert_eq!(decoded, 0, "{code:x?} {after:?}");
        let interpreted = after.engine.blocks - before.engine.blocks;
        assert_eq!(interpreted, 0, "{code:x?} {after:?}");
    }
}

#[test]
fn what_cannot_be_moved_is_translated_at_each_address() {
    let low = |n: u64| FRAME + (n << 21) * 100;
    for (code, addresses) in [
        (NARROW, [address(3), address(700)]),
        (SOMEWHERE[0], [FRAME, address(5)]),
        (SOMEWHERE[0], [address(5), low(0)]),
    ] {
        let code = ended(code);
        let mut machine = machine(&code, Config::default());
        let mut interpreter = with_aliases(TestMachine::long_mode(), &code);
        for at in addresses {
            let before = machine.vcpu.stats().translator.translated;
            for _ in 0..5 {
                run_both([&mut machine, &mut interpreter], at);
            }
            assert!(machine.vcpu.stats().translator.translated > before);
        }
        assert_eq!(machine.vcpu.stats().translator.moved, 0);
    }
}

#[test]
fn clones_become_stale_with_their_code() {
    // call function; hlt; function: mov eax, 1; ret
    let code = ended(&[0xe8, 0x01, 0, 0, 0, 0xf4, 0xb8, 1, 0, 0, 0, 0xc3]);
    let mut machine = machine(&code, Config::default());
    for value in 1..5 {
        machine.put(FRAME + 7, &[value]);
        for n in [1, 1, 1, 1, 2, 3, 2, 1] {
            assert_eq!(run(&mut machine, address(n)), Exit::Halt);
            assert_eq!(machine.vcpu.state.gpr[0], u64::from(value));
        }
    }
    let counters = machine.vcpu.stats().translator;
    assert!(counters.moved >= 8 && counters.invalidated >= counters.moved / 2, "{counters:?}");
}

#[test]
fn a_clone_that_may_not_have_the_vector_unit_is_interpreted() {
    let code = ended(SOMEWHERE[4]);
    let mut machine = machine(&code, Config::default());
    for _ in 0..5 {
        assert_eq!(run(&mut machine, address(3)), Exit::Halt);
    }
    machine.vcpu.state.cr0 |= Cr0::TS;
    machine.vcpu.state_changed();
    // #NM, for which there is no IDT.
    assert_eq!(run(&mut machine, address(4)), Exit::Shutdown);
    assert_eq!(machine.vcpu.state.rip, address(4));
    let counters = machine.vcpu.stats().translator;
    assert_eq!((counters.moved, counters.exits[3]), (1, 1));
    machine.vcpu.state.cr0 -= Cr0::TS;
    machine.vcpu.state_changed();
    assert_eq!(run(&mut machine, address(4)), Exit::Halt);
    let counters = machine.vcpu.stats().translator;
    assert_eq!((counters.moved, counters.exits[3]), (1, 1));
}

#[test]
fn clones_go_with_the_code_memory_they_are_in() {
    let code = ended(&SOMEWHERE[..8].concat());
    let config = Config { code_cache: Config::SMALLEST, verify: true, ..Config::default() };
    let mut machine = machine(&code, config);
    let mut interpreter = with_aliases(TestMachine::long_mode(), &code);
    for n in 0..2000 {
        run_both([&mut machine, &mut interpreter], address(n / 5 * 7));
    }
    let counters = machine.vcpu.stats().translator;
    assert!(counters.moved > 50 && counters.evicted > 0, "{counters:?}");
}

#[test]
fn clones_are_looked_at_before_they_run() {
    let code = ended(SOMEWHERE[1]);
    let mut machine = machine(&code, Config { verify: true, ..Config::default() });
    for _ in 0..5 {
        assert_eq!(run(&mut machine, address(3)), Exit::Halt);
    }
    let mut translations = machine.vcpu.translator.as_ref().unwrap().code.lock();
    let mut blocks = translations.regions.blocks().flatten();
    let placed = *blocks.find(|placed| placed.rip == address(3)).unwrap();
    drop(blocks);
    // syscall
    assert!(translations.memory.write(placed.offset as usize, &[0x0f, 0x05]));
    drop(translations);
    assert_eq!(run(&mut machine, address(4)), Exit::Failed);
    let failure = machine.vcpu.failure().unwrap();
    assert_eq!(failure.rip, address(4));
    assert_eq!(machine.vcpu.stats().translator.moved, 0);
}

#[test]
fn clones_agree_in_lockstep() {
    for code in SOMEWHERE {
        let mut machine = with_aliases(TestMachine::long_mode(), &ended(code)).in_lockstep();
        for n in [3, 3, 3, 700, 9, 1021, 700] {
            let exit = run(&mut machine, address(n));
            assert_eq!(exit, Exit::Halt, "{:?}", machine.vcpu.divergence());
        }
        assert!(machine.vcpu.stats().translator.moved >= 2);
    }
}

#[test]
fn a_clone_whose_checks_cannot_be_shared_is_made_anew_and_is_what_is_cloned_then() {
    // mov esi, [data]; mov rax, [rsi]; mov rcx, [rsi + 8]
    let code = ended(&[0x8b, 0x35, 0xfa, 0x01, 0, 0, 0x48, 0x8b, 0x06, 0x48, 0x8b, 0x4e, 0x08]);
    let mut machine = machine(&code, Config::default());
    let mut interpreter = with_aliases(TestMachine::long_mode(), &code);
    let point = |machines: [&TestMachine; 2], to: u64| {
        machines.iter().for_each(|machine| machine.put(FRAME + DATA, &to.to_le_bytes()));
    };
    point([&machine, &interpreter], STACK);
    for n in [3, 3, 3, 3, 3, 4] {
        run_both([&mut machine, &mut interpreter], address(n));
    }
    let before = machine.vcpu.stats().translator;
    assert_eq!(before.moved, 1);
    // From one page into the next.
    point([&machine, &interpreter], STACK + 0xff8);
    for _ in 0..3000 {
        run_both([&mut machine, &mut interpreter], address(4));
    }
    let split = machine.vcpu.stats().translator;
    // What follows the first access is gone to by itself each time until then.
    assert_eq!((split.translated, split.moved), (before.translated + 2, 1), "{split:?}");
    for n in [5, 3, 5] {
        run_both([&mut machine, &mut interpreter], address(n));
    }
    let after = machine.vcpu.stats().translator;
    assert_eq!((after.translated, after.moved), (split.translated, 3), "{after:?}");
    // Only the one at the first address still has anything to split.
    assert_eq!(after.split, split.split + 1, "{after:?}");
}
