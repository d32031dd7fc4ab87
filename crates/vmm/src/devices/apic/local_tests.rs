//! What a local APIC does, register by register.

#![allow(unused_must_use, reason = "most writes here have no effect on others")]

use std::sync::{Arc, Mutex};

use softcpu::{Event, VcpuHandle};

use super::super::local::{DeadlineSink, LocalApicConfig, Startup};
use super::*;
use crate::clock::TscFrequency;

#[derive(Debug, Default)]
struct Armed(Mutex<Option<u64>>);

impl DeadlineSink for Armed {
    fn arm(&self, _: usize, deadline: Option<u64>) {
        *self.0.lock().unwrap() = deadline;
    }
}

fn apic() -> (LocalApic, Arc<Armed>) {
    let armed = Arc::new(Armed::default());
    let apic = LocalApic::new(LocalApicConfig {
        id: 0x21,
        vcpu: 0,
        phys_bits: 40,
        frequency: TscFrequency::from_hz(1_000_000_000),
        handle: VcpuHandle::new(),
        deadlines: armed.clone(),
    });
    (apic, armed)
}

fn enabled() -> LocalApic {
    let (apic, _) = apic();
    set(&apic, 0xf0, 0x1ff);
    apic
}

fn x2apic() -> LocalApic {
    let apic = enabled();
    assert!(apic.set_base(apic.base().raw() | 1 << 10));
    apic
}

fn set(apic: &LocalApic, offset: u64, value: u32) -> Effect {
    apic.mmio_write(offset, &value.to_le_bytes()).unwrap()
}

fn get(apic: &LocalApic, offset: u64) -> u32 {
    let mut data = [0; 4];
    assert!(apic.mmio_read(offset, &mut data));
    u32::from_le_bytes(data)
}

fn post(apic: &LocalApic, vector: u8) -> bool {
    apic.post(DeliveryMode::Fixed, vector, Trigger::Edge)
}

fn interrupted(apic: &LocalApic) -> bool {
    !apic.handle().take(Event::INTERRUPT).is_empty()
}

#[test]
fn vectors_are_taken_by_priority_class() {
    let apic = enabled();
    for vector in [0x31, 0x45, 0x42] {
        assert!(post(&apic, vector));
    }
    assert!(interrupted(&apic));
    assert_eq!(apic.acknowledge(), Some(0x45));
    assert!(!interrupted(&apic), "0x42 is of the class in service");
    assert_eq!(apic.acknowledge(), None);
    assert_eq!(get(&apic, 0xa0), 0x40);
    assert_eq!(apic.end_of_interrupt(), Effect::None);
    assert!(interrupted(&apic), "the end of interrupt lets 0x42 through");
    assert_eq!(apic.acknowledge(), Some(0x42));
    post(&apic, 0x50);
    assert!(interrupted(&apic));
    assert_eq!(apic.acknowledge(), Some(0x50), "a higher class nests");
    for expected in [0x42, 0x31] {
        set(&apic, 0xb0, 0);
        if expected == 0x31 {
            assert_eq!(apic.acknowledge(), Some(0x31));
        }
    }
    set(&apic, 0xb0, 0);
    assert_eq!((get(&apic, 0xa0), apic.acknowledge()), (0, None));
}

#[test]
fn task_priority_holds_back() {
    let apic = enabled();
    set(&apic, 0x80, 0x45);
    assert_eq!((get(&apic, 0xa0), apic.task_priority_class()), (0x45, 4));
    post(&apic, 0x4f);
    assert!(!interrupted(&apic));
    assert_eq!(apic.acknowledge(), None);
    apic.set_task_priority(0x30);
    assert!(interrupted(&apic));
    assert_eq!(apic.acknowledge(), Some(0x4f));
}

#[test]
fn levels_end_at_the_io_apic() {
    let apic = enabled();
    apic.post(DeliveryMode::Fixed, 0x61, Trigger::Level);
    assert_eq!(get(&apic, 0x180 + 0x30), 1 << 1);
    assert_eq!(apic.acknowledge(), Some(0x61));
    assert_eq!(set(&apic, 0xb0, 0), Effect::EndOfLevel(0x61));
    assert_eq!(set(&apic, 0xb0, 0), Effect::None);
}

#[test]
fn a_disabled_apic_takes_no_vectors_but_nmis() {
    let (apic, _) = apic();
    assert!(!post(&apic, 0x40));
    assert!(apic.post(DeliveryMode::Nmi, 0, Trigger::Edge));
    assert_eq!(apic.handle().take(Event::all()), Event::NMI);
    set(&apic, 0x320, 0x20);
    assert_eq!(get(&apic, 0x320), 0x1_0020, "masks cannot be cleared while disabled");
    set(&apic, 0xf0, 0x1ff);
    set(&apic, 0x320, 0x20);
    assert_eq!(get(&apic, 0x320), 0x20);
    set(&apic, 0xf0, 0xff);
    assert_eq!(get(&apic, 0x320), 0x1_0020);
}

#[test]
fn errors_are_latched_by_a_write() {
    let apic = enabled();
    set(&apic, 0x370, 0xfe);
    assert_eq!(set(&apic, 0x300, 0x4000 | 5), Effect::None, "a vector below 16 is not sent");
    assert_eq!(apic.acknowledge(), Some(0xfe));
    assert_eq!(get(&apic, 0x280), 0);
    set(&apic, 0x280, 0);
    assert_eq!(get(&apic, 0x280), 1 << 5);
    assert!(!post(&apic, 3));
    set(&apic, 0x280, 0);
    assert_eq!(get(&apic, 0x280), 1 << 6);
    set(&apic, 0x040, 0);
    set(&apic, 0x280, 0);
    assert_eq!(get(&apic, 0x280), 1 << 7);
    set(&apic, 0x280, 0);
    assert_eq!(get(&apic, 0x280), 0);
}

#[test]
fn an_illegal_error_vector_does_not_recurse() {
    let apic = enabled();
    set(&apic, 0x370, 0x00);
    set(&apic, 0x300, 0x4000);
    set(&apic, 0x280, 0);
    assert_eq!(get(&apic, 0x280), 1 << 5 | 1 << 6);
}

#[test]
fn commands_become_messages() {
    let apic = enabled();
    set(&apic, 0x310, 5 << 24);
    let Effect::Send(message) = set(&apic, 0x300, 0x0000_48fd) else { panic!("nothing sent") };
    assert_eq!(
        message.destination,
        Destination::Logical(super::super::message::Address::Narrow(5))
    );
    assert_eq!((message.mode, message.vector), (DeliveryMode::Fixed, 0xfd));
    assert_eq!(set(&apic, 0x300, 0x8500), Effect::None, "INIT de-assert");
}

#[test]
fn startup_messages_wait_for_the_thread() {
    let apic = enabled();
    apic.post(DeliveryMode::Init, 0, Trigger::Edge);
    apic.post(DeliveryMode::Startup, 0x9a, Trigger::Edge);
    assert_eq!(apic.handle().take(Event::all()), Event::ATTENTION);
    assert_eq!(apic.take_startup(), Startup { init: true, vector: Some(0x9a) });
    apic.post(DeliveryMode::Startup, 0x9b, Trigger::Edge);
    apic.post(DeliveryMode::Init, 0, Trigger::Edge);
    assert_eq!(
        apic.take_startup(),
        Startup { init: true, vector: None },
        "INIT discards an older startup"
    );
    assert_eq!(apic.take_startup(), Startup::default());
}

#[test]
fn logical_destinations() {
    use super::super::message::Address::{Narrow, Wide};
    let apic = enabled();
    set(&apic, 0xd0, 0x0400_0000);
    assert!(apic.is_logically(Narrow(0x0c)) && !apic.is_logically(Narrow(0x0b)));
    set(&apic, 0xd0, 0x2200_0000);
    set(&apic, 0xe0, 0);
    assert!(apic.is_logically(Narrow(0x23)), "cluster 2, member 1");
    assert!(!apic.is_logically(Narrow(0x33)) && !apic.is_logically(Narrow(0x21)));
    assert!(apic.is_logically(Narrow(0xff)));
    assert!(apic.is_physically(Narrow(0x21)) && apic.is_physically(Wide(u32::MAX)));
    assert!(!apic.is_physically(Wide(0xff)), "eight ones are everybody only in eight bits");

    let apic = x2apic();
    assert_eq!(apic.x2apic_read(0x80d), Ok(0x0002_0002), "identifier 0x21: cluster 2, member 1");
    assert!(apic.is_logically(Wide(0x0002_0006)) && !apic.is_logically(Wide(0x0001_0002)));
}

#[test]
fn the_interface_is_the_one_selected() {
    let apic = enabled();
    assert_eq!(get(&apic, 0x20), 0x2100_0000);
    assert_eq!(get(&apic, 0x30), 0x0005_0014);
    assert!(apic.x2apic_read(0x802).is_err());
    let apic = x2apic();
    assert!(!apic.mmio_read(0x20, &mut [0; 4]));
    assert_eq!(apic.mmio_write(0xb0, &[0; 4]), None);
    assert_eq!(apic.x2apic_read(0x802), Ok(0x21));
    for refused in [0x80b, 0x80e, 0x831, 0x83f, 0x804, 0x8ff] {
        assert!(apic.x2apic_read(refused).is_err(), "{refused:#x}");
    }
    for (refused, value) in
        [(0x80b, 1), (0x802, 0), (0x80d, 0), (0x808, 0x100), (0x828, 1), (0x832, 1 << 20)]
    {
        assert!(apic.x2apic_write(refused, value).is_err(), "{refused:#x}");
    }
    assert!(matches!(apic.x2apic_write(0x83f, 0x77), Ok(Effect::Send(_))));
    let sent = apic.x2apic_write(0x830, 0x0000_0005_0000_0041);
    assert!(matches!(sent, Ok(Effect::Send(message)) if message.vector == 0x41));
    assert_eq!(apic.x2apic_read(0x830), Ok(0x0000_0005_0000_0041));
}

#[test]
fn disabling_globally_resets() {
    let apic = x2apic();
    post(&apic, 0x40);
    assert!(apic.set_base(0xfee0_0000));
    assert!(!post(&apic, 0x41));
    assert!(apic.set_base(0xfee0_0800));
    assert_eq!((get(&apic, 0xf0), apic.acknowledge()), (0xff, None));
}

#[test]
fn the_timer_arms_and_fires() {
    let (apic, armed) = apic();
    set(&apic, 0xf0, 0x1ff);
    set(&apic, 0x320, 0x4_00ec);
    const LATER: u64 = u64::MAX - 1;
    apic.set_tsc_deadline(LATER, 0);
    assert_eq!((*armed.0.lock().unwrap(), apic.tsc_deadline()), (Some(LATER), LATER));
    apic.timer_expired(LATER - 1);
    assert_eq!(apic.acknowledge(), None);
    apic.timer_expired(LATER);
    assert_eq!((*armed.0.lock().unwrap(), apic.tsc_deadline()), (None, 0));
    assert_eq!(apic.acknowledge(), Some(0xec));
    set(&apic, 0xb0, 0);
    apic.set_tsc_deadline(1, 0);
    assert_eq!(*armed.0.lock().unwrap(), None, "passed before it was set: nobody need wait");
    assert_eq!((apic.acknowledge(), apic.tsc_deadline()), (Some(0xec), 0));
    set(&apic, 0xb0, 0);
    set(&apic, 0x320, 0x1_00ec);
    set(&apic, 0x380, 100);
    assert!(armed.0.lock().unwrap().is_some());
    apic.timer_expired(u64::MAX);
    assert_eq!(apic.acknowledge(), None, "masked");
    assert_eq!(get(&apic, 0x390), 0);
}

#[test]
fn posting_from_other_threads_loses_nothing() {
    let apic = Arc::new(enabled());
    let senders: Vec<_> = (0..3_u8)
        .map(|n| {
            let apic = Arc::clone(&apic);
            std::thread::spawn(move || {
                for vector in (0x20 + n..0xf0).step_by(3) {
                    while apic.requested.contains(vector) {
                        std::thread::yield_now();
                    }
                    post(&apic, vector);
                }
            })
        })
        .collect();
    let mut seen = std::collections::BTreeSet::new();
    let expected: std::collections::BTreeSet<u8> = (0x20..0xf0).collect();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while seen != expected && std::time::Instant::now() < until {
        // The CPU's contract: only look when asked to.
        let wanted = apic.handle().sleep(Event::INTERRUPT, Some(until));
        apic.handle().take(wanted);
        while let Some(vector) = apic.acknowledge() {
            seen.insert(vector);
            let _ = apic.end_of_interrupt();
        }
    }
    assert!(seen == expected, "missing {:?}", expected.difference(&seen));
    for sender in senders {
        sender.join().unwrap();
    }
}
