//! Drivers that break the rules, or stop in the middle.

use super::*;
use crate::devices::virtio::testing::{INDIRECT, NEXT, WRITE};
use crate::devices::virtio::{feature, hostile};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const SIZE: u64 = 1 << 20;

/// Lays out a broken request.
type Lay = fn(&mut Ring);

fn guest(folder: &Path) -> Guest {
    let path = new_image(folder, DiskFormat::Raw, SIZE);
    let disk = open(&path, "").unwrap();
    let features = disk.features() | feature::INDIRECT_DESC;
    Guest::drive(disk, features)
}

#[test]
fn broken_rings_need_a_reset_and_then_all_is_well() {
    let lay: [(&str, Lay); 9] = [
        ("a loop", |ring| {
            ring.set_descriptor(0, 0x10000, 16, NEXT, 1);
            ring.set_descriptor(1, 0x10000, 16, NEXT, 0);
            ring.publish(0);
        }),
        ("beyond memory", |ring| {
            ring.set_descriptor(0, 0x10000, 16, NEXT, 1);
            ring.set_descriptor(1, (64 << 20) - 100, 512, NEXT | WRITE, 2);
            ring.set_descriptor(2, 0x10000, 1, WRITE, 0);
            ring.publish(0);
        }),
        ("around the end of the address space", |ring| {
            ring.set_descriptor(0, u64::MAX - 7, 16, WRITE, 0);
            ring.publish(0);
        }),
        ("no place for the status", |ring| {
            ring.set_descriptor(0, 0x10000, 16, 0, 0);
            ring.publish(0);
        }),
        ("nothing at all", |ring| {
            ring.set_descriptor(0, 0x10000, 0, 0, 0);
            ring.publish(0);
        }),
        ("a readable part at the end", |ring| {
            ring.set_descriptor(0, 0x10000, 16, NEXT | WRITE, 1);
            ring.set_descriptor(1, 0x10000, 16, 0, 0);
            ring.publish(0);
        }),
        ("indirect in indirect", |ring| {
            ring.set_descriptor(0, 0x20000, 32, INDIRECT, 0);
            ring.write_descriptor(0x20000, 0x30000, 16, INDIRECT, 0);
            ring.write_descriptor(0x30000, 0x10000, 16, WRITE, 0);
            ring.publish(0);
        }),
        ("a head that is no descriptor", |ring| ring.publish(300)),
        ("an index from nowhere", |ring| ring.set_available_index(1000)),
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest(folder.path());
    for (what, lay) in lay {
        lay(&mut guest.ring);
        guest.ring.notify();
        guest.driver.signal.wait(|signals| signals.needs_reset);
        // It stays so, whatever comes.
        guest.begin(IN, 0, &[Part::Write(512)]);
        guest.ring.notify();
        std::thread::sleep(Duration::from_millis(5));
        assert!(guest.ring.take_used().is_none(), "{what}");
        guest = guest.restart();
        assert_eq!(guest.read(0, 512), [0; 512], "{what}");
    }
}

#[test]
fn rings_on_each_other_hang_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let mut disk = open(&path, "").unwrap();
    hostile::overlapping_rings(&mut disk, &[(0, Part::Write(512))], 0, &|| ());
    let features = disk.features();
    assert_eq!(Guest::drive(disk, features).read(0, 512), [0; 512]);
}

#[test]
fn a_used_ring_that_is_overrun_does_not_go_on_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest(folder.path());
    // Nothing comes back while this is held, and one request is offered again and again.
    let image = Arc::clone(&guest.disk.image);
    let held = image.hold();
    let offered = guest.begin(IN, 0, &[Part::Write(512)]);
    for _ in 0..4 {
        for _ in 0..200 {
            guest.ring.publish(offered.head);
        }
        guest.ring.notify();
        std::thread::sleep(Duration::from_millis(20));
    }
    guest.driver.signal.wait(|signals| signals.needs_reset);
    drop(held);
    let mut guest = guest.restart();
    assert_eq!(guest.read(0, 512), [0; 512]);
}

#[test]
fn a_reset_in_mid_flight_waits_and_then_nothing_moves() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest(folder.path());
    guest.write(0, &[0x77; 512]);
    let image = Arc::clone(&guest.disk.image);
    for _ in 0..5 {
        let held = image.hold();
        let offered: Vec<Offered> =
            (0..40).map(|_| guest.begin(IN, 0, &[Part::Write(512)])).collect();
        guest.ring.notify();
        // More than there are workers: when some wait in line, all workers are at it.
        let jobs = Arc::clone(guest.disk.pool.jobs());
        while jobs.waiting() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(guest.ring.take_used().is_none());
        std::thread::scope(|scope| {
            let reset = scope.spawn(|| guest.disk.reset());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!reset.is_finished(), "requests are in flight");
            drop(held);
            reset.join().unwrap();
        });
        let everything = || {
            let mut all = vec![0; 64 << 20];
            guest.driver.memory().read_slice(&mut all, GuestAddress(0)).unwrap();
            all
        };
        let then = everything();
        let signals = guest.driver.signal.seen();
        guest.ring.notify();
        std::thread::sleep(Duration::from_millis(30));
        assert!(everything() == then, "guest memory changes after a reset");
        assert_eq!(guest.driver.signal.seen(), signals);
        // Each request is either finished or untouched.
        for offered in &offered {
            let answer = guest.ring.answer(offered);
            let done = (vec![0x77; 512], OK);
            let given_up = (vec![0; 512], 0xee);
            let answer = (answer[..512].to_vec(), answer[512]);
            assert!(answer == done || answer == given_up);
        }
        guest = guest.restart();
    }
    assert_eq!(guest.read(0, 512), [0x77; 512]);
}

#[test]
fn memory_taken_away_by_the_driver_is_its_own_loss() {
    let folder = tempfile::tempdir().unwrap();
    let mut guest = guest(folder.path());
    let image = Arc::clone(&guest.disk.image);
    let held = image.hold();
    // The chain is changed while the request waits: more data than the disk has, outside
    // RAM, or nothing.
    let offered = guest.begin(IN, 0, &[Part::Write(512)]);
    guest.ring.notify();
    std::thread::sleep(Duration::from_millis(20));
    guest.ring.set_descriptor(offered.head, u64::MAX, 16, NEXT, offered.head);
    drop(held);
    std::thread::sleep(Duration::from_millis(20));
    let mut guest = guest.restart();
    assert_eq!(guest.read(0, 512), [0; 512]);
}

#[test]
fn the_end_of_the_threads_is_the_end_of_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let io = io_threads();
    let mut disk = Block::open(&config(&path, ""), Arc::clone(&io), 1).unwrap();
    let driver = TestDriver::new(disk.features());
    let (_ring, queue) = driver.ring(0, 16);
    disk.activate(driver.activation(vec![queue])).unwrap();
    io.stop();
    disk.reset();
    let (_ring, queue) = driver.ring(0, 16);
    assert!(disk.activate(driver.activation(vec![queue])).is_err());
}
