//! Routes between several local APICs and the IO-APIC.

use softcpu::{Event, VcpuHandle};

use super::super::local::{DeadlineSink, LocalApicConfig};
use super::super::message::{Address, Trigger};
use super::*;
use crate::clock::TscFrequency;

struct Nobody;

impl DeadlineSink for Nobody {
    fn arm(&self, _: usize, _: Option<u64>) {}
}

fn machine(cpus: usize) -> Arc<InterruptController> {
    let locals = (0..cpus).map(|vcpu| {
        let local = LocalApic::new(LocalApicConfig {
            id: vcpu as u32,
            vcpu,
            phys_bits: 40,
            frequency: TscFrequency::from_hz(1_000_000_000),
            handle: VcpuHandle::new(),
            deadlines: Arc::new(Nobody),
        });
        let _ = local.mmio_write(0xf0, &0x1ff_u32.to_le_bytes());
        local
    });
    InterruptController::new(locals.collect(), IoApic::default())
}

fn message(destination: Destination, mode: DeliveryMode) -> InterruptMessage {
    InterruptMessage { destination, mode, vector: 0x40, trigger: Trigger::Edge }
}

/// Which vCPUs got vector 0x40; they take it and end it.
fn takers(machine: &InterruptController) -> Vec<usize> {
    let took = |(vcpu, local): (usize, &LocalApic)| {
        let vector = local.acknowledge()?;
        let effect = local.end_of_interrupt();
        machine.perform(vcpu, effect);
        (vector == 0x40).then_some(vcpu)
    };
    machine.locals().iter().enumerate().filter_map(took).collect()
}

#[test]
fn shorthands_and_addresses_name_the_right_ones() {
    let machine = machine(4);
    for (destination, expected) in [
        (Destination::Oneself, vec![1]),
        (Destination::All, vec![0, 1, 2, 3]),
        (Destination::Others, vec![0, 2, 3]),
        (Destination::Physical(Address::Narrow(2)), vec![2]),
        (Destination::Physical(Address::Narrow(0xff)), vec![0, 1, 2, 3]),
        (Destination::Physical(Address::Narrow(9)), vec![]),
    ] {
        let taken = machine.deliver(&message(destination, DeliveryMode::Fixed), Some(1));
        assert_eq!(taken, !expected.is_empty());
        assert_eq!(takers(&machine), expected, "{destination:?}");
    }
}

#[test]
fn the_lowest_priority_is_asked_and_equals_take_turns() {
    let machine = machine(3);
    let all = message(Destination::All, DeliveryMode::LowestPriority);
    machine.locals()[0].set_task_priority(0x20);
    let mut counts = [0; 3];
    for _ in 0..10 {
        machine.deliver(&all, None);
        let who = takers(&machine);
        assert_eq!(who.len(), 1);
        counts[who[0]] += 1;
    }
    assert_eq!(counts[0], 0);
    assert!(counts[1] >= 3 && counts[2] >= 3, "{counts:?}");
}

#[test]
fn nmi_and_init_reach_the_handles() {
    let machine = machine(2);
    machine.deliver(&message(Destination::Others, DeliveryMode::Nmi), Some(0));
    machine.deliver(&message(Destination::Others, DeliveryMode::Init), Some(0));
    assert_eq!(machine.locals()[0].handle().pending(), Event::empty());
    assert_eq!(machine.locals()[1].handle().pending(), Event::NMI | Event::ATTENTION);
}

#[test]
fn a_level_line_interrupts_again_until_it_is_lowered() {
    let machine = machine(1);
    for (register, value) in [(0x10 + 2 * 5, 0x8040_u32), (0x10 + 2 * 5 + 1, 0)] {
        machine.io_write(0, &[register]);
        machine.io_write(0x10, &value.to_le_bytes());
    }
    let line = machine.line(5);
    line.raise();
    assert_eq!(takers(&machine), [0]);
    assert_eq!(takers(&machine), [0], "the end of interrupt asserted it anew");
    line.lower();
    assert_eq!(takers(&machine), [0], "this one was already requested");
    assert!(takers(&machine).is_empty());
}

#[test]
fn msis_arrive() {
    let machine = machine(2);
    assert!(machine.deliver_msi(MsiMessage { address: 0xfee0_1000, data: 0x40 }));
    assert_eq!(takers(&machine), [1]);
    assert!(!machine.deliver_msi(MsiMessage { address: 0xfee0_7000, data: 0x40 }));
}
