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
