use super::super::Counters;
use super::super::config::Config;
use super::*;
use crate::testing::TestMachine;
use crate::vcpu::Exit;

const START: u64 = 0x1000;
const STACK: u64 = 0x8000;

/// Calls a function that is two blocks, ECX times; then `hlt`.
const CALLS: &[u8] = &[
    0xe8, 0x05, 0x00, 0x00, 0x00, // again: call function
    0xff, 0xc9, // dec ecx
    0x75, 0xf7, // jnz again
    0xf4, // hlt
    0xff, 0xc0, // function: inc eax
    0xeb, 0x01, // jmp over the next
    0xcc, // int3
    0x01, 0xc2, // add edx, eax
    0xc3, // ret
];

/// A machine that orders what has run three times from `workshop`.
fn machine(workshop: &Arc<Workshop>) -> TestMachine {
    let config = Config { verify: true, ..Config::default() };
    let machine = TestMachine::long_mode().translating_as(3, config).ordering(workshop);
    machine.put(START, CALLS);
    machine
}

/// Has it call so often, and says what the translator has done in all.
fn call(machine: &mut TestMachine, times: u64) -> Counters {
    let state = &mut machine.vcpu.state;
    (state.rip, state.gpr[4]) = (START, STACK);
    (state.gpr[0], state.gpr[1], state.gpr[2]) = (0, times, 0);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    let state = &machine.vcpu.state;
    assert_eq!(state.rip, START + 10);
    assert_eq!(state.gpr[..3], [times, 0, times * (times + 1) / 2]);
    machine.vcpu.translator_counters().unwrap()
}

fn waiting(workshop: &Workshop) -> usize {
    lock(&workshop.state).orders.len()
}

#[test]
fn what_was_ordered_is_run_once_it_is_there() {
    let workshop = Arc::<Workshop>::default();
    let mut machine = machine(&workshop);
    let counters = call(&mut machine, 4);
    // The call, what is behind it, and the function, of which the second block comes with the first.
    assert_eq!((waiting(&workshop), counters.translated, counters.entered), (3, 0, 0));
    workshop.work_off();
    let counters = call(&mut machine, 4);
    assert_eq!((counters.beside, counters.taken_back), (3, 0));
    assert!(counters.entered > 0 && waiting(&workshop) <= 1, "{counters:?}");
}

#[test]
fn what_nobody_makes_is_taken_back_in_the_end() {
    let workshop = Arc::<Workshop>::default();
    let mut machine = machine(&workshop);
    let counters = call(&mut machine, 1000);
    assert!(counters.taken_back >= 2 && counters.beside == 0, "{counters:?}");
    assert!(counters.translated >= 2 && counters.entered > 0, "{counters:?}");
    assert_eq!(waiting(&workshop), 0);
}

#[test]
fn what_has_changed_meanwhile_is_not_run() {
    let workshop = Arc::<Workshop>::default();
    let mut machine = machine(&workshop);
    call(&mut machine, 4);
    // add edx, eax becomes sub edx, eax.
    machine.put(START + 15, &[0x29]);
    workshop.work_off();
    (machine.vcpu.state.rip, machine.vcpu.state.gpr[4]) = (START, STACK);
    machine.vcpu.state.gpr[..3].copy_from_slice(&[0, 4, 0]);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    assert_eq!(machine.vcpu.state.gpr[2], 0_u32.wrapping_sub(10).into());
    assert_eq!(machine.vcpu.translator_counters().unwrap().beside, 0);
}

#[test]
fn a_closed_workshop_takes_no_orders() {
    let workshop = Arc::<Workshop>::default();
    let mut machine = machine(&workshop);
    call(&mut machine, 4);
    workshop.close();
    // Returns at once.
    workshop.work();
    let counters = call(&mut machine, 100);
    assert!(counters.beside == 0 && counters.translated >= 2, "{counters:?}");
}

#[test]
fn a_thread_works_for_several_vcpus_until_it_is_closed() {
    let workshop = Arc::<Workshop>::default();
    let mut machines = [machine(&workshop), machine(&workshop)];
    let (theirs, deadline) = (Arc::clone(&workshop), Instant::now() + Duration::from_secs(60));
    let thread = std::thread::spawn(move || theirs.work());
    for machine in &mut machines {
        while call(machine, 4).beside == 0 {
            assert!(Instant::now() < deadline, "nothing is made");
            // Longer than it stays awake.
            sleep(AWAKE * 2);
        }
    }
    workshop.close();
    thread.join().unwrap();
}

#[test]
fn no_more_wait_than_there_is_room_for() {
    let workshop = Arc::<Workshop>::default();
    let config = Config { verify: true, ..Config::default() };
    let mut machine = TestMachine::long_mode().translating_as(0, config).ordering(&workshop);
    // Each a page of its own: jmp to the next.
    for page in 0..2 * MOST as u64 {
        machine.put(START + page * 0x1000, &[0xe9, 0xfb, 0x0f, 0, 0]);
    }
    machine.put(START + 2 * MOST as u64 * 0x1000, &[0xf4]);
    machine.vcpu.state.rip = START;
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    assert_eq!(waiting(&workshop), MOST);
    assert!(machine.vcpu.translator_counters().unwrap().translated >= MOST as u64);
}

/// Two vCPUs on one memory with `code`, which order from `workshop`.
fn siblings(workshop: &Arc<Workshop>, code: &[u8]) -> [TestMachine; 2] {
    let config = Config { verify: true, ..Config::default() };
    let first = TestMachine::long_mode();
    first.put(START, code);
    let second = first.sibling().translating_as(3, config).ordering(workshop);
    [first.translating_as(3, config).ordering(workshop), second]
}

#[test]
fn what_was_made_for_one_vcpu_is_there_for_the_other_before_it_has_run() {
    let workshop = Arc::new(Workshop::with_shelf(1 << 20));
    let [mut first, mut second] = siblings(&workshop, CALLS);
    call(&mut first, 4);
    workshop.work_off();
    assert_eq!(call(&mut first, 4).shared, 0);
    let counters = call(&mut second, 1);
    assert_eq!((counters.shared, counters.beside), (3, 0));
    assert!(counters.entered > 0 && second.vcpu.counters().ops < 3, "{counters:?}");
    call(&mut second, 100);
}

#[test]
fn what_was_made_of_other_code_is_not_taken() {
    let workshop = Arc::new(Workshop::with_shelf(1 << 20));
    let [mut first, mut second] = siblings(&workshop, CALLS);
    call(&mut first, 4);
    workshop.work_off();
    // add edx, eax becomes sub edx, eax.
    second.put(START + 15, &[0x29]);
    second.vcpu.state.rip = START;
    second.vcpu.state.gpr[..5].copy_from_slice(&[0, 4, 0, 0, STACK]);
    assert_eq!(second.vcpu.run(), Exit::Halt);
    assert_eq!(second.vcpu.state.gpr[2], 0_u32.wrapping_sub(10).into());
    assert_eq!(second.vcpu.translator_counters().unwrap().shared, 0);
}

/// paddb mm0, [rsi]; paddw mm0, mm1; hlt
const STUBS: &[u8] = &[0x0f, 0xfc, 0x06, 0x0f, 0xfd, 0xc1, 0xf4];

#[test]
fn what_names_stubs_means_the_same_to_the_vcpu_that_takes_it() {
    let workshop = Workshop::with_shelf(1 << 20).prompt();
    let [mut first, mut second] = siblings(&workshop, STUBS);
    // The second has other stubs before those.
    let others = [&[0x0f, 0xfe, 0xc1, 0x0f, 0xf8, 0xc1, 0xf4][..], &[0x0f, 0xf9, 0x06, 0xf4]];
    for (n, code) in (2..).zip(others) {
        second.put(n * START, code);
        second.vcpu.state.rip = n * START;
        second.vcpu.state.gpr[6] = 0x6000;
        assert_eq!(second.vcpu.run(), Exit::Halt);
    }
    first.put(0x6000, &[1; 8]);
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
fn a_shelf_has_only_so_much_room() {
    let workshop = Workshop::with_shelf(4 << 10).prompt();
    let config = Config { verify: true, ..Config::default() };
    let mut machine = TestMachine::long_mode().translating_as(0, config).ordering(&workshop);
    machine.put(START, &[0xeb, 0].repeat(64));
    machine.put(START + 128, &[0xf4]);
    for _ in 0..3 {
        machine.vcpu.state.rip = START;
        assert_eq!(machine.vcpu.run(), Exit::Halt);
    }
    let beside = machine.vcpu.translator_counters().unwrap().beside;
    let shelf = lock(workshop.shelf.as_ref().unwrap());
    assert!((1..beside as usize).contains(&shelf.len()), "{} of {beside}", shelf.len());
}
