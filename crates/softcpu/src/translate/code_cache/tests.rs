use std::num::NonZeroU32;

use super::super::config::{Config, Invalidate};
use super::super::invalidation::Schedule;
use super::super::regions::{Filling, LARGEST};
use super::super::run::Translation;
use super::*;
use crate::decode::cache::BlockCache;
use crate::memory::ram::RamFrame;
use crate::testing::{Random, TestMachine};
use crate::trace::{Event as Traced, Tracer};
use crate::vcpu::Exit;

/// Where the guest's code and stacks are.
const START: u64 = 0x1000;
const STACK: u64 = 0x8000;

/// Adds the numbers from ECX down to one up in EDX, by a call each; then `hlt`.
const SUM: &[u8] = &[
    0xe8, 0x05, 0x00, 0x00, 0x00, // again: call function
    0xff, 0xc9, // dec ecx
    0x75, 0xf7, // jnz again
    0xf4, // hlt
    0x01, 0xca, // function: add edx, ecx
    0xc3, // ret
];

fn code(stubs: &Arc<Stubs>) -> Arc<CodeCache> {
    Arc::new(CodeCache::new(Config::SMALLEST, stubs).unwrap())
}

/// Code memory of nobody's.
fn nobodys() -> Arc<CodeCache> {
    code(&Arc::new(Stubs::new().unwrap()))
}

/// Two vCPUs on one memory with [`SUM`], which share code memory and translate what has run so often.
fn siblings(runs: u32, config: Config) -> [TestMachine; 2] {
    let first = TestMachine::long_mode();
    let code = code(first.vcpu.native.shared());
    first.put(START, SUM);
    let second = first.sibling();
    [first, second].map(|machine| machine.translating_in(&code, runs, config))
}

/// Has it add up so many numbers, by the code at `at`.
fn sum(machine: &mut TestMachine, at: u64, count: u64) -> u64 {
    let state = &mut machine.vcpu.state;
    (state.rip, state.gpr[1], state.gpr[2], state.gpr[4]) = (at, count, 0, STACK);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    machine.vcpu.state.gpr[2]
}

#[test]
fn what_one_vcpu_has_translated_runs_on_another_before_it_was_run_there() {
    let [mut first, mut second] = siblings(3, Config { verify: true, ..Config::default() });
    assert_eq!(sum(&mut first, START, 100), 5050);
    let made = first.vcpu.translator_counters().unwrap();
    assert!(made.translated >= 2 && made.shared == 0, "{made:?}");
    assert_eq!(sum(&mut second, START, 100), 5050);
    let found = second.vcpu.translator_counters().unwrap();
    assert_eq!((found.translated, found.used), (0, made.used), "{found:?}");
    assert!(found.shared > 0 && second.vcpu.counters().ops < 5, "{found:?}");
}

#[test]
fn what_changes_is_dropped_for_all() {
    let [mut first, mut second] = siblings(0, Config { verify: true, ..Config::default() });
    for turn in 0..20 {
        // add edx, ecx, and sub edx, ecx
        first.put(START + 10, &[if turn % 2 == 0 { 0x01 } else { 0x29 }]);
        let wanted = if turn % 2 == 0 { 5050 } else { 0_u32.wrapping_sub(5050).into() };
        for machine in [&mut first, &mut second] {
            assert_eq!(sum(machine, START, 100), wanted, "{turn}");
        }
    }
    let [first, second] = [first, second].map(|it| it.vcpu.translator_counters().unwrap());
    assert!(first.invalidated >= 19 && second.invalidated == 0, "{first:?} {second:?}");
}

/// paddb mm0, [rsi]; paddw mm0, mm1; hlt
const STUBS: &[u8] = &[0x0f, 0xfc, 0x06, 0x0f, 0xfd, 0xc1, 0xf4];

#[test]
fn what_names_stubs_means_the_same_to_all() {
    let [mut first, mut second] = siblings(3, Config { verify: true, ..Config::default() });
    first.put(START, STUBS);
    first.put(0x6000, &[1; 8]);
    // The second has other stubs before those.
    let others = [&[0x0f, 0xfe, 0xc1, 0x0f, 0xf8, 0xc1, 0xf4][..], &[0x0f, 0xf9, 0x06, 0xf4]];
    for (n, code) in (2..).zip(others) {
        second.put(n * START, code);
        second.vcpu.state.rip = n * START;
        second.vcpu.state.gpr[6] = 0x6000;
        assert_eq!(second.vcpu.run(), Exit::Halt);
    }
    let sums = [&mut first, &mut second].map(|machine| {
        machine.vcpu.state.fpu.fxsave[32..56].fill(0);
        for _ in 0..6 {
            machine.vcpu.state.rip = START;
            machine.vcpu.state.gpr[6] = 0x6000;
            // The load misses the TLB, so the stub does it.
            machine.vcpu.mmu.flush_all();
            assert_eq!(machine.vcpu.run(), Exit::Halt);
        }
        machine.vcpu.state.fpu.fxsave[32..40].to_vec()
    });
    assert_eq!(sums, [[6; 8]; 2]);
    assert!(second.vcpu.translator_counters().unwrap().shared > 0);
    assert!(first.vcpu.translator_counters().unwrap().interpreted > 0);
}

#[test]
fn vcpus_that_have_other_stubs_or_features_do_not_share_code() {
    let (mut first, second) = (TestMachine::long_mode(), TestMachine::long_mode());
    let code = code(second.vcpu.native.shared());
    assert!(first.vcpu.translate_after(0, Config::default(), Some(code)).is_err());
    let stubs = Stubs::new().unwrap();
    let features = *first.vcpu.cpuid.features();
    assert!(stubs.serve(&features) && stubs.serve(&features));
    assert!(!stubs.serve(&Default::default()));
}

/// Fills the region that is being filled.
fn fill(code: &CodeCache) {
    let mut translations = code.lock();
    while translations.regions.has_room(0x1000) {
        let offset = translations.regions.next_offset().unwrap();
        translations.regions.take(offset as usize, 0x1000).unwrap();
    }
}

#[test]
fn a_region_is_not_filled_again_before_all_vcpus_have_left_it() {
    let code = nobodys();
    let handles = [VcpuHandle::new(), VcpuHandle::new()];
    let [me, other] = handles.clone().map(|handle| code.enrol(handle));
    let [mut mine, mut others] = [Progress::default(); 2];
    code.enter(&me, mine);
    code.enter(&other, others);
    let has_room = |code: &CodeCache| code.with_room(&me, code.lock(), LARGEST).is_some();
    for turn in 1..10 {
        fill(&code);
        let evicted = code.give_up_next(&me).unwrap();
        assert_eq!((evicted.number, evicted.turned), (turn, turn % 2 == 0));
        assert!(code.give_up_next(&me).is_none(), "it is given up already");
        assert!(!code.is_current(mine) && !code.is_current(others));
        assert!(handles[1].take(Event::CODE_CHANGED) == Event::CODE_CHANGED);
        assert!(!has_room(&code), "nobody has left");
        code.catch_up(&me, &mut mine, |evicted| assert_eq!(evicted.unwrap().number, turn));
        assert!(code.is_current(mine) && !has_room(&code));
        assert!(handles[1].take(Event::CODE_CHANGED) == Event::CODE_CHANGED);
        if turn % 3 == 0 {
            code.leave(&other);
            assert!(has_room(&code));
            code.enter(&other, others);
            assert!(!code.is_current(others), "it has to catch up still");
        }
        code.catch_up(&other, &mut others, |evicted| assert_eq!(evicted.unwrap().number, turn));
        assert!(has_room(&code));
        assert_eq!(handles[0].pending(), Event::empty());
    }
}

#[test]
fn the_next_region_is_given_up_while_there_is_room_if_there_are_others() {
    let code = nobodys();
    let me = code.enrol(VcpuHandle::new());
    let has_room = |code: &CodeCache| code.with_room(&me, code.lock(), 1).is_some();
    fill(&code);
    // Some room is left.
    assert!(has_room(&code));
    code.enrol(VcpuHandle::new());
    assert!(!has_room(&code) && code.give_up_next(&me).is_some() && has_room(&code));
    assert!(code.observers.have_seen(u64::MAX), "neither runs");
}

#[test]
fn who_has_missed_too_much_forgets_everything() {
    let code = nobodys();
    let [me, other] = [(); 2].map(|()| code.enrol(VcpuHandle::new()));
    let [mut mine, mut others] = [Progress::default(); 2];
    for _ in 0..=LOG {
        fill(&code);
        code.give_up_next(&me).unwrap();
        code.catch_up(&me, &mut mine, |_| ());
        assert!(code.with_room(&me, code.lock(), LARGEST).is_some());
    }
    let mut forgotten = Vec::new();
    code.catch_up(&other, &mut others, |evicted| forgotten.push(evicted.is_some()));
    assert_eq!(forgotten, [false]);
}

#[test]
fn nothing_is_linked_to_what_has_been_given_up() {
    // Whether some link of [`SUM`]'s translations leads elsewhere once all are to be connected.
    let links = |given_up: bool| {
        let mut machine = TestMachine::long_mode().translating_as(0, Config::default());
        machine.put(START, SUM);
        // Nothing is linked by itself then.
        machine.vcpu.alone = true;
        assert_eq!(sum(&mut machine, START, 3), 6);
        let mut translations = machine.vcpu.translator.as_ref().unwrap().code.lock();
        let all = (0..).map_while(|number| Some((number, translations.target(number)?)));
        let linked: Vec<_> = all
            .filter_map(|(number, target)| {
                let (entry, _) = (0..8).find_map(|n| translations.entry_at(n, target))?;
                Some((number, target, entry))
            })
            .collect();
        if given_up {
            translations.give_up(0, 1);
        }
        let before = translations.memory.read(0, 0x8000).to_vec();
        for (number, target, entry) in linked {
            translations.connect(number, target, entry);
        }
        before != translations.memory.read(0, 0x8000)
    };
    assert!(links(false) && !links(true));
}

#[test]
fn code_that_has_changed_since_it_was_looked_at_is_not_translated() {
    let [mut machine, other] = siblings(0, Config::default());
    assert_eq!(sum(&mut machine, START, 3), 6);
    let (frame, map) = (RamFrame(1), machine.memory.code());
    let version = map.version(frame);
    let place = |machine: &mut TestMachine| {
        let mut asked = false;
        let made = machine.vcpu.place_translation(100, (frame, version, None), |_, _| {
            asked = true;
            None
        });
        assert_eq!(made, None);
        asked
    };
    assert!(place(&mut machine));
    // Another vCPU has found that out, and closed what there was.
    other.put(START, SUM);
    let code = Arc::clone(&machine.vcpu.translator.as_ref().unwrap().code);
    code.drop_stale(other.memory.code(), |_| ());
    assert!(code.is_up_to_date(other.memory.code()) && !place(&mut machine));
}

/// Gives up the first region, as another vCPU might, once it is told that translations were dropped.
struct GivesUp(Arc<CodeCache>);

impl Tracer for GivesUp {
    fn event(&mut self, event: Traced<'_>) {
        if matches!(event, Traced::Dropped { .. }) {
            self.0.fillings.set(0, Filling::default());
            self.0.given_up.store(1, Ordering::SeqCst);
        }
    }

    fn wants_blocks(&self) -> bool {
        false
    }
}

#[test]
fn what_is_given_up_while_code_is_taken_for_changed_is_not_entered() {
    let found = |given_up: bool| {
        let [mut machine, _] = siblings(0, Config::default());
        assert_eq!(sum(&mut machine, START, 3), 6);
        let translator = machine.vcpu.translator.as_mut().unwrap();
        let code = Arc::clone(&translator.code);
        let always = Invalidate { every: NonZeroU32::MIN, seed: 1 };
        translator.invalidation = Some(Schedule::new(always));
        if given_up {
            machine.vcpu.set_tracer(Some(Box::new(GivesUp(Arc::clone(&code)))));
        }
        machine.vcpu.state.rip = START;
        let found = machine.vcpu.with_blocks(|vcpu, blocks| {
            let block = blocks.get(BlockCache::slot(START)).unwrap();
            vcpu.translated(block)
        });
        assert_eq!(code.given_up.load(Ordering::SeqCst), u64::from(given_up));
        matches!(found, Translation::Known(_))
    };
    assert!(found(false) && !found(true));
}

/// Where the `n`-th copy of [`SUM`] is, which adds `n` more in the end.
fn copy(n: u64) -> u64 {
    0x10_0000 + n * 0x400
}

#[test]
fn two_vcpus_at_once_run_translate_change_and_evict_the_same_code() {
    const COPIES: u64 = 600;
    let every = NonZeroU32::new(300);
    let invalidate = every.map(|every| Invalidate { every, seed: 1 });
    let config = Config { verify: true, turns: 50, invalidate, ..Config::default() };
    let mut machines = siblings(1, config);
    for n in 0..COPIES {
        let tail = [&SUM[..9], &[0x81, 0xc2], &(n as u32).to_le_bytes(), &[0xf4]].concat();
        // The function is behind it now.
        let mut all = tail;
        all[1] = (all.len() - 5) as u8;
        all.extend([0x01, 0xca, 0xc3]);
        machines[0].put(copy(n), &all);
    }
    std::thread::scope(|scope| {
        for (seed, machine) in (3..).zip(&mut machines) {
            scope.spawn(move || {
                machine.vcpu.state.gpr[4] = STACK + seed * 0x1000;
                let mut random = Random(seed);
                for _ in 0..30_000 {
                    let (n, count) = (random.below(COPIES), 1 + random.below(40));
                    let state = &mut machine.vcpu.state;
                    (state.rip, state.gpr[1], state.gpr[2]) = (copy(n), count, 0);
                    assert_eq!(machine.vcpu.run(), Exit::Halt, "{:?}", machine.vcpu.failure());
                    assert_eq!(machine.vcpu.state.gpr[2], count * (count + 1) / 2 + n);
                }
            });
        }
    });
    for machine in machines {
        let counters = machine.vcpu.translator_counters().unwrap();
        assert!(counters.evicted > 0 && counters.shared > 0, "{counters:?}");
        assert!(counters.invalidated > 0 && counters.hot > 0, "{counters:?}");
    }
}
