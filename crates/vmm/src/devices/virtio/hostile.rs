//! Drivers that break the rules, for the tests of every core.
//!
//! [`all`] plays one hostile driver after the other against a device. After each it is
//! reset, must keep still, and must serve an honest driver as if nothing had been.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::testing::{INDIRECT, NEXT, Part, Ring, TestDriver, WRITE};
use super::{Activation, DeviceQueue, DriverSignal, VirtioDevice, feature};

/// A reset that takes longer hangs the guest's CPU.
const RESET: Duration = Duration::from_secs(2);
/// Long enough for a device that has not stopped to show it.
const STILL: Duration = Duration::from_millis(5);

/// One queue and a request that is right for it.
pub(crate) type Sample<'a> = (u16, Part<'a>);

/// Plays every hostile driver. `samples` has each queue of the device; `stir` makes it
/// look at those that it looks at only when it has something to say; `alive` serves an
/// honest driver, from activation to reset.
pub(crate) fn all(
    device: &mut dyn VirtioDevice,
    samples: &[Sample<'_>],
    stir: &dyn Fn(),
    alive: &dyn Fn(&mut dyn VirtioDevice),
) {
    alive(device);
    for (at, _) in samples.iter().enumerate() {
        for (name, crime) in CRIMES {
            let expected = format!("queue {}: {name}", samples[at].0);
            println!("{expected}");
            crime_is_reported(device, samples, at, *crime, stir);
            alive(device);
        }
        overlapping_rings(device, samples, at, stir);
        alive(device);
    }
    resets_in_flight(device, samples, stir);
    alive(device);
    features_never_offered(device, samples, stir);
    alive(device);
    missing_queues(device, samples);
    alive(device);
    configuration(device);
    alive(device);
}

fn set_up(driver: &TestDriver, samples: &[Sample<'_>]) -> (Vec<Ring>, Activation) {
    let (rings, queues) = samples.iter().map(|(index, _)| driver.ring(*index, 16)).unzip();
    (rings, driver.activation(queues))
}

/// What a driver does to a ring, whose request is made of parts with these flags.
type Crime = fn(&mut Ring, u16);

const CRIMES: &[(&str, Crime)] = &[
    ("a descriptor that follows itself", |ring, flags| {
        ring.set_descriptor(0, 0x1000, 16, NEXT | flags, 0);
        ring.publish(0);
    }),
    ("a loop of two", |ring, flags| {
        ring.set_descriptor(0, 0x1000, 16, NEXT | flags, 1);
        ring.set_descriptor(1, 0x1000, 16, NEXT | flags, 0);
        ring.publish(0);
    }),
    ("a chain that leaves its table", |ring, flags| {
        ring.set_descriptor(0, 0x1000, 16, NEXT | flags, 16);
        ring.publish(0);
    }),
    ("a head outside the table", |ring, _| ring.publish(0xfff0)),
    ("a buffer that ends past memory", |ring, flags| {
        ring.set_descriptor(0, (64 << 20) - 8, 16, flags, 0);
        ring.publish(0);
    }),
    ("a buffer of 4 GiB", |ring, flags| {
        ring.set_descriptor(0, 0x1000, u32::MAX, flags, 0);
        ring.publish(0);
    }),
    ("an address that wraps", |ring, flags| {
        ring.set_descriptor(0, u64::MAX - 7, 16, flags, 0);
        ring.publish(0);
    }),
    ("writable before readable", |ring, _| {
        ring.set_descriptor(0, 0x1000, 16, NEXT | WRITE, 1);
        ring.set_descriptor(1, 0x1000, 16, 0, 0);
        ring.publish(0);
    }),
    ("indirect in indirect", |ring, flags| {
        ring.set_descriptor(0, 0x2000, 16, INDIRECT, 0);
        ring.write_descriptor(0x2000, 0x3000, 16, INDIRECT, 0);
        ring.write_descriptor(0x3000, 0x4000, 16, flags, 0);
        ring.publish(0);
    }),
    ("an indirect table with half an entry", |ring, flags| {
        ring.set_descriptor(0, 0x2000, 24, INDIRECT, 0);
        ring.write_descriptor(0x2000, 0x3000, 16, NEXT | flags, 1);
        ring.publish(0);
    }),
    ("an empty indirect table", |ring, _| {
        ring.set_descriptor(0, 0x2000, 0, INDIRECT, 0);
        ring.publish(0);
    }),
    ("an indirect table past memory", |ring, _| {
        ring.set_descriptor(0, 1 << 40, 32, INDIRECT, 0);
        ring.publish(0);
    }),
    ("an indirect table that loops", |ring, flags| {
        ring.set_descriptor(0, 0x2000, 32, INDIRECT, 0);
        ring.write_descriptor(0x2000, 0x3000, 16, NEXT | flags, 1);
        ring.write_descriptor(0x2010, 0x3000, 16, NEXT | flags, 0);
        ring.publish(0);
    }),
    ("more available than there is room", |ring, _| ring.set_available_index(17)),
    ("an available index that went backwards", |ring, _| ring.set_available_index(u16::MAX)),
];

fn crime_is_reported(
    device: &mut dyn VirtioDevice,
    samples: &[Sample<'_>],
    at: usize,
    crime: Crime,
    stir: &dyn Fn(),
) {
    for features in [feature::INDIRECT_DESC, feature::INDIRECT_DESC | feature::EVENT_IDX] {
        let driver = TestDriver::new(features);
        let (mut rings, activation) = set_up(&driver, samples);
        device.activate(activation).unwrap();
        let flags = match samples[at].1 {
            Part::Read(_) => 0,
            Part::Write(_) => WRITE,
        };
        crime(&mut rings[at], flags);
        rings[at].notify();
        stir();
        driver.signal.wait(|signals| signals.needs_reset);
        // It has stopped: nothing is used any more, whatever the driver says.
        rings[at].notify();
        std::thread::sleep(STILL);
        assert_eq!(rings[at].take_used(), None);
        reset(device);
    }
}

fn reset(device: &mut dyn VirtioDevice) {
    let start = Instant::now();
    device.reset();
    assert!(start.elapsed() < RESET, "a reset takes {:?}", start.elapsed());
}

/// Rings that lie on each other: what the device writes as used is what it reads as
/// available, or as descriptors. It may do what it likes with such a driver, but not
/// hang, grow or die.
pub(crate) fn overlapping_rings(
    device: &mut dyn VirtioDevice,
    samples: &[Sample<'_>],
    at: usize,
    stir: &dyn Fn(),
) {
    for features in [0, feature::EVENT_IDX] {
        // In the last one asking not to be notified makes a request available, and asking to
        // be takes it back.
        for (available, used) in [
            (0x4000, 0x4000),
            (0x4000, 0x4000 - 4),
            (0, 0x4000),
            (0x4000, 0),
            (0, 0),
            (0x4000, 4),
            (0x4002, 0x4004),
        ] {
            let driver = TestDriver::new(features);
            let (mut rings, mut activation) = set_up(&driver, samples);
            let index = samples[at].0;
            let honest = activation.take_queue(index).unwrap();
            let ring = &mut rings[at];
            for _ in 0..8 {
                ring.offer(&[samples[at].1]);
            }
            let mut queue = Queue::new(16).unwrap();
            // The used ring starts on a multiple of 4, the available ring of 2.
            queue.set_desc_table_address(Some(ring.descriptors as u32), Some(0));
            queue.set_avail_ring_address(Some((ring.descriptors + available) as u32), Some(0));
            queue.set_used_ring_address(Some((ring.descriptors + used) as u32), Some(0));
            queue.set_event_idx(features != 0);
            queue.set_ready(true);
            let signal = std::sync::Arc::clone(&activation.signal);
            let kick = std::sync::Arc::clone(honest.kick());
            let queue = DeviceQueue::new(index, queue, driver.memory(), signal, kick).unwrap();
            let position = activation.queues.iter().position(|queue| queue.index() > index);
            activation.queues.insert(position.unwrap_or(activation.queues.len()), queue);
            device.activate(activation).unwrap();
            for _ in 0..4 {
                ring.notify();
                stir();
            }
            std::thread::sleep(STILL);
            reset(device);
        }
    }
}

/// All that a device may change of a guest's memory: rings and buffers of `rings`.
fn snapshot(driver: &TestDriver, rings: &[Ring]) -> Vec<u8> {
    let mut all = Vec::new();
    for ring in rings {
        let mut bytes = vec![0; 0x1_0000];
        driver.memory().read_slice(&mut bytes, GuestAddress(ring.descriptors)).unwrap();
        all.append(&mut bytes);
    }
    all
}

/// After a reset nothing moves, whatever was under way.
fn resets_in_flight(device: &mut dyn VirtioDevice, samples: &[Sample<'_>], stir: &dyn Fn()) {
    for round in 0..30_u64 {
        let driver = TestDriver::new(if round % 2 == 0 { feature::EVENT_IDX } else { 0 });
        let (mut rings, activation) = set_up(&driver, samples);
        device.activate(activation).unwrap();
        for _ in 0..15 {
            for (ring, (_, part)) in rings.iter_mut().zip(samples) {
                ring.offer(&[*part]);
                ring.notify();
            }
        }
        stir();
        std::thread::sleep(Duration::from_micros(round * 20));
        reset(device);
        let (before, signals) = (snapshot(&driver, &rings), driver.signal.seen());
        assert!(!signals.needs_reset, "an honest driver was refused");
        for ring in &rings {
            ring.notify();
        }
        stir();
        std::thread::sleep(STILL);
        assert!(snapshot(&driver, &rings) == before, "memory changes after a reset");
        assert_eq!(driver.signal.seen(), signals, "signals after a reset");
    }
}

/// A transport does not let these through, but a core does not count on it.
fn features_never_offered(device: &mut dyn VirtioDevice, samples: &[Sample<'_>], stir: &dyn Fn()) {
    for features in [u64::MAX, 0, !feature::VERSION_1] {
        let driver = TestDriver::new(0);
        let (mut rings, mut activation) = set_up(&driver, samples);
        activation.features = features;
        device.activate(activation).unwrap();
        for (ring, (_, part)) in rings.iter_mut().zip(samples) {
            ring.offer(&[*part]);
            ring.notify();
        }
        stir();
        std::thread::sleep(STILL);
        reset(device);
    }
}

fn missing_queues(device: &mut dyn VirtioDevice, samples: &[Sample<'_>]) {
    let driver = TestDriver::new(0);
    let refused = device.activate(driver.activation(Vec::new()));
    assert!(refused.is_err(), "no queues at all are enough?");
    reset(device);
    // Queues there are too many of, and numbered as no queue is, harm nobody.
    let (_rings, mut activation) = set_up(&driver, samples);
    activation.queues.push(driver.ring(40, 16).1);
    device.activate(activation).unwrap();
    reset(device);
    // A queue of size 0, or one that lies nowhere, is none: it never gets to a core.
    assert!(Queue::new(0).is_err());
    let mut nowhere = Queue::new(16).unwrap();
    nowhere.set_size(0);
    nowhere.set_desc_table_address(Some(0xffff_fff0), Some(0xffff_ffff));
    nowhere.set_ready(true);
    let signal = std::sync::Arc::clone(&driver.signal) as std::sync::Arc<dyn DriverSignal>;
    let kick = DeviceQueue::new_kick().unwrap();
    assert!(DeviceQueue::new(0, nowhere, driver.memory(), signal, kick).is_err());
    // Resetting what does not run is nothing.
    reset(device);
    reset(device);
}

/// The configuration space answers whatever is asked of it.
fn configuration(device: &mut dyn VirtioDevice) {
    for offset in (0..64).chain([u64::MAX - 3, u64::MAX, 1 << 32]) {
        for len in [0, 1, 2, 3, 4, 8, 64] {
            let mut data = vec![0xa5; len];
            device.write_config(offset, &data);
            device.read_config(offset, &mut data);
        }
    }
    let mut beyond = [0xff; 8];
    device.read_config(1 << 20, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}

/// The memory that the rings of [`set_up`] share is theirs alone.
#[test]
fn the_harness_sees_a_write() {
    let driver = TestDriver::new(0);
    let (ring, _queue) = driver.ring(1, 16);
    let rings = [ring];
    let before = snapshot(&driver, &rings);
    driver.memory().store(1_u16, GuestAddress(rings[0].used + 2), Ordering::SeqCst).unwrap();
    assert!(snapshot(&driver, &rings) != before);
}
