//! Guests that mean no good: the guest dies, by a line that says of what, and the process
//! ends in order.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vmm::devices::virtio::Entropy;

use super::calls::call_code;
use super::*;

/// Runs code that may do anything, for a moment.
fn survives(image: Vec<u8>) -> Outcome {
    let (mut config, console) = config(image, 0.3);
    config.devices = vec![Box::new(Entropy::new(Arc::clone(&config.io)))];
    run((config, console)).0
}

fn ends_in_order(outcome: &Outcome) -> bool {
    !matches!(outcome, Outcome::TripleFault { .. } | Outcome::Stopped)
}

/// Numbers that are something to somebody, or nothing.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        0_u64..40,
        Just(0x300),
        (0_u64..0x2100).prop_map(|page| page << 12),
        (0_u64..0x2100).prop_map(|page| KERNEL_MAP + (page << 12)),
        (0_u64..0x2100).prop_map(|page| 0xffff_8000_0000_0000 + (page << 12)),
        prop::bits::u64::ANY,
        Just(u64::MAX),
        Just(32 << 20),
    ]
}

fn call() -> impl Strategy<Value = [u64; 5]> {
    (0_u64..26, [word(), word(), word(), word()])
        .prop_map(|(number, [a, b, c, d])| [number, a, b, c, d])
}

#[test]
fn any_hypercalls_end_in_order() {
    let mut runner = TestRunner::new(Config { cases: 60, ..Config::default() });
    let calls = prop::collection::vec(call(), 1..30);
    runner
        .run(&calls, |calls| {
            let mut code = call_code([1, DATA, 0, 0, 0]);
            code.extend(calls.into_iter().flat_map(call_code));
            code.extend([0x0f, 0x0b]);
            let outcome = survives(image(&code));
            prop_assert!(ends_in_order(&outcome), "{:?}", outcome);
            Ok(())
        })
        .unwrap();
}

#[test]
fn any_calls_in_the_ring_end_in_order() {
    let mut runner = TestRunner::new(Config { cases: 40, ..Config::default() });
    let slots = prop::collection::vec(call(), 64);
    runner
        .run(&(slots, 0_u32..70), |(slots, tail)| {
            let mut shared = SharedData::new();
            shared.irq_words = DATA + 64;
            shared.kernel_address = 1 << 63 | 0x7fff_8000_0000_0000;
            shared.ring.copy_from_slice(&slots);
            let mut data = vec![0; 4096];
            shared.write(&mut data).unwrap();
            let mut code = call_code([1, DATA, 0, 0, 0]);
            // mov dword ptr [RING_TAIL], tail
            code.extend([0xc7, 0x04, 0x25]);
            code.extend(((KERNEL_MAP + DATA + 256) as u32).to_le_bytes());
            code.extend(tail.to_le_bytes());
            code.extend(call_code([0, 0, 0, 0, 0]));
            code.extend(call_code([2, 0, 0, 1, 0]));
            let outcome = survives(image_with(&code, &data));
            prop_assert!(ends_in_order(&outcome), "{:?}", outcome);
            Ok(())
        })
        .unwrap();
}

#[test]
fn any_code_and_any_shared_data_end_in_order() {
    let mut runner = TestRunner::new(Config { cases: 40, ..Config::default() });
    let bytes = |len| prop::collection::vec(any::<u8>(), len);
    runner
        .run(&(bytes(512), bytes(256)), |(noise, words)| {
            let mut shared = SharedData::new();
            shared.irq_words = DATA + 64;
            shared.kernel_address = 0xffff_8000_0000_0000;
            let mut data = vec![0; 4096];
            shared.write(&mut data).unwrap();
            data[64..64 + 256].copy_from_slice(&words);
            data[256..260].copy_from_slice(&[0; 4]);
            let code = [call_code([1, DATA, 0, 0, 0]), noise].concat();
            let outcome = survives(image_with(&code, &data));
            prop_assert!(ends_in_order(&outcome), "{:?}", outcome);
            Ok(())
        })
        .unwrap();
}

guest!(
    table_loop,
    "
    begin
    gate 14, 8f
    # A top level whose every entry is itself, and code that goes on in it.
    mov rdi, DIRECT + 0x300000
    mov rax, 0x300027
    mov ecx, 512
    rep stosq
    hcall 4, 0x300000
8:  nop
    "
);

guest!(
    stack_on_the_bus,
    "
    begin
    gate 6, 8f
    mov rsp, DIRECT + (32 << 20) + 4096
8:  ud2
    "
);

guest!(
    everything_at_once,
    "
    begin
    # The shared page is its own stack, its words and the ring.
    gate 6, 8f
    mov rsp, SHARED + 4096
8:  ud2
    "
);

#[test]
fn loops_and_odd_places_end_in_order() {
    for code in [table_loop(), stack_on_the_bus(), everything_at_once()] {
        let outcome = survives(image(code));
        assert!(matches!(outcome, Outcome::Died(_) | Outcome::TimedOut), "{outcome:?}");
    }
}

#[test]
fn a_guest_with_several_cpus_or_no_memory_is_refused() {
    let (mut two, _) = config(image(&[0xeb, 0xfe]), 1.0);
    two.cpus = 2;
    let refused = Machine::new(two).unwrap_err();
    assert!(refused.is_users() && refused.to_string().contains("--cpus 1"), "{refused}");
}
