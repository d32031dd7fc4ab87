//! Stubs that vCPUs share, and what is done without when there is no room for more.

use std::collections::HashSet;
use std::sync::{Arc, Barrier};

use iced_x86::{Code, Instruction, Register as R};

use super::super::{NativeCache, Refused, Stubs};
use super::FeatureSet;
use crate::decode::op::OpFlags;
use crate::testing::TestMachine;
use crate::translate::Config;
use crate::vcpu::Exit;

const START: u64 = 0x1000;
const DATA: u64 = 0x5000;

/// Instructions that want a stub each.
fn shuffles() -> impl DoubleEndedIterator<Item = Instruction> {
    (0..1_u32 << 16).map(|n| {
        let (to, from) = (R::XMM0 + (n >> 8 & 15), R::XMM0 + (n >> 12));
        Instruction::with3(Code::Pshufd_xmm_xmmm128_imm8, to, from, n & 0xff).unwrap()
    })
}

#[test]
fn vcpus_name_the_same_stubs_whoever_wants_them_first() {
    const MANY: usize = 3000;
    let shared = Arc::new(Stubs::new().unwrap());
    let start = Barrier::new(2);
    let [forwards, mut backwards] = std::thread::scope(|scope| {
        let names = |reverse: bool| {
            let mut native = NativeCache::new(Arc::clone(&shared)).unwrap();
            let start = &start;
            move || {
                let mut all: Vec<_> = shuffles().take(MANY).collect();
                if reverse {
                    all.reverse();
                }
                start.wait();
                let mut name = |it: &Instruction| {
                    let lowered = native.lower(it, &[], &FeatureSet::v3()).unwrap();
                    let stub = *native.stub(lowered.imm as u32, lowered.flags).unwrap();
                    (lowered.imm, lowered.flags.bits(), stub.entry as usize)
                };
                all.iter().map(&mut name).collect::<Vec<_>>()
            }
        };
        [false, true].map(|reverse| scope.spawn(names(reverse))).map(|it| it.join().unwrap())
    });
    backwards.reverse();
    assert!(forwards == backwards);
    assert!(forwards.iter().all(|(_, flags, _)| *flags == 0));
    let entries: HashSet<_> = forwards.iter().map(|(.., entry)| entry).collect();
    assert_eq!(entries.len(), MANY);
}

/// Has `machine` want stubs until it gets some of its own, or until there is no room for those
/// either.
fn crowd(machine: &mut TestMachine, full: impl Fn(Result<OpFlags, Refused>) -> bool) {
    let features = *machine.vcpu.cpuid.features();
    let native = &mut machine.vcpu.native;
    let mut lower = |it| native.lower(&it, &[], &features).map(|lowered| lowered.flags);
    assert!(shuffles().any(|it| full(lower(it))));
}

/// A machine whose shared stubs are only a page full. It translates what has run a few times.
fn machine() -> TestMachine {
    let stubs = Arc::new(Stubs::with_room(0x1000).unwrap());
    let config = Config { verify: true, ..Config::default() };
    let mut machine = TestMachine::long_mode().translating_as(3, config);
    machine.vcpu.native = NativeCache::new(stubs).unwrap();
    machine.put(DATA, &[7; 8]);
    machine
}

/// Runs the code at `rip`, with MM0 zero and MM1 all ones. Says what MM0 is then.
fn run(machine: &mut TestMachine, rip: u64) -> [u8; 8] {
    let cpu = &mut machine.vcpu;
    cpu.state.rip = rip;
    cpu.state.gpr[6] = DATA;
    cpu.state.fpu.fxsave[32..40].fill(0);
    cpu.state.fpu.fxsave[48..56].fill(1);
    // Loads miss the TLB, so stubs do them.
    cpu.mmu.flush_all();
    assert_eq!(cpu.run(), Exit::Halt);
    cpu.state.fpu.fxsave[32..40].try_into().unwrap()
}

fn translated(machine: &TestMachine) -> u64 {
    machine.vcpu.translator_counters().unwrap().translated
}

/// paddb mm0, [rsi]; hlt
const LOAD: &[u8] = &[0x0f, 0xfc, 0x06, 0xf4];
/// jmp over nothing; paddw mm0, [rsi]; paddb mm0, mm1; hlt
const OTHER: &[u8] = &[0xeb, 0, 0x0f, 0xfd, 0x06, 0x0f, 0xfc, 0xc1, 0xf4];

/// jmp over nothing; popcnt eax, ecx; hlt
const COUNT: &[u8] = &[0xeb, 0, 0xf3, 0x0f, 0xb8, 0xc1, 0xf4];

#[test]
fn a_vcpu_has_stubs_of_its_own_when_there_is_no_room_and_does_not_translate_them() {
    let mut machine = machine();
    crowd(&mut machine, |lowered| lowered == Ok(OpFlags::OWN_STUB));
    machine.put(START, LOAD);
    machine.put(2 * START, COUNT);
    machine.vcpu.state.gpr[1] = 0b0111;
    for _ in 0..10 {
        assert_eq!(run(&mut machine, START), [7; 8]);
        machine.vcpu.state.gpr[0] = 0;
        run(&mut machine, 2 * START);
        assert_eq!(machine.vcpu.state.gpr[0], 3);
    }
    // The jump alone: all else is in a block with those.
    let counters = machine.vcpu.translator_counters().unwrap();
    assert_eq!((counters.translated, counters.guest_bytes), (1, 2));
    assert_eq!(machine.vcpu.counters().decoded, 3);
}

#[test]
fn own_stubs_begin_anew_when_there_is_no_room_for_more_and_what_is_shared_stays() {
    let mut machine = machine();
    machine.put(START, LOAD);
    for _ in 0..5 {
        assert_eq!(run(&mut machine, START), [7; 8]);
    }
    assert_eq!(translated(&machine), 1);
    crowd(&mut machine, |lowered| lowered == Ok(OpFlags::OWN_STUB));
    machine.put(2 * START, OTHER);
    assert_eq!(run(&mut machine, 2 * START), [8; 8]);
    crowd(&mut machine, |lowered| lowered == Err(Refused::Full));
    let full = machine.vcpu.native.own.stubs.len();
    // psubb mm0, mm1; hlt
    machine.put(3 * START, &[0x0f, 0xf8, 0xc1, 0xf4]);
    assert_eq!(run(&mut machine, 3 * START), [0xff; 8]);
    let own = machine.vcpu.native.own.stubs.len();
    assert!(own < full && own > 0, "{own} of {full}");
    // Numbers that were something else's before.
    let decoded = machine.vcpu.counters().decoded;
    assert_eq!(run(&mut machine, 2 * START), [8; 8]);
    assert!(machine.vcpu.counters().decoded > decoded);
    assert_eq!(run(&mut machine, 3 * START), [0xff; 8]);
    assert_eq!(run(&mut machine, START), [7; 8]);
    assert_eq!(translated(&machine), 1, "it is still there");
}
