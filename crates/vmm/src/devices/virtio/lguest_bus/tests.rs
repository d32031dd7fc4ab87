//! Drivers as those kernels had them, against real cores.

use std::time::{Duration, Instant};

use lguest_abi::bus::entries;

use super::*;
use crate::devices::Recorder;
use crate::devices::virtio::{Entropy, IoThreads};
use crate::memory::{GuestRam, MIN_RAM};

const PAGE: u32 = 31 << 20;

struct Setup {
    ram: GuestRam,
    bus: LguestBus,
    recorder: Arc<Recorder>,
    _io: Arc<IoThreads>,
}

fn setup() -> Setup {
    let ram = GuestRam::new(MIN_RAM).unwrap();
    let io = IoThreads::start(1).unwrap();
    let recorder = Arc::new(Recorder::default());
    let cores: Vec<Box<dyn VirtioDevice>> =
        vec![Box::new(Entropy::new(Arc::clone(&io))), Box::new(Entropy::new(Arc::clone(&io)))];
    let sink = Arc::clone(&recorder);
    let lines = move |irq| InterruptLine::new(Arc::clone(&sink) as _, irq);
    let bus = LguestBus::new(cores, Arc::clone(ram.mmap()), PAGE, Form::Packed, lines).unwrap();
    Setup { ram, bus, recorder, _io: io }
}

impl Setup {
    fn page(&self) -> Vec<u8> {
        let mut page = vec![0; PAGE_BYTES];
        self.ram.mmap().read_slice(&mut page, GuestAddress(PAGE.into())).unwrap();
        page
    }

    fn put(&self, at: u32, bytes: &[u8]) {
        self.ram.mmap().write_slice(bytes, GuestAddress(at.into())).unwrap();
    }

    fn word(&self, at: u32) -> u32 {
        self.ram.mmap().read_obj(GuestAddress(at.into())).unwrap()
    }

    /// Asks the device with this ring for 64 random bytes at 0x10000, as request `n`.
    fn request(&self, queue: &VqConfig, n: u16) {
        let ring = queue.pfn << 12;
        let available = ring + u32::from(queue.num) * 16;
        self.put(ring, &[&0x1_0000_u64.to_le_bytes()[..], &[64, 0, 0, 0, 2, 0, 0, 0]].concat());
        self.put(available + 4 + u32::from(n) * 2, &[0, 0]);
        self.put(available + 2, &(n + 1).to_le_bytes());
        assert!(self.bus.notify(ring));
    }

    fn await_used(&self, queue: &VqConfig, count: u16) {
        let ring = queue.pfn << 12;
        let behind = ring + u32::from(queue.num) * 18 + 4;
        let used = behind.next_multiple_of(4096);
        let limit = Instant::now() + Duration::from_secs(5);
        while self.word(used) >> 16 != u32::from(count) {
            assert!(Instant::now() < limit, "nothing is used");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn devices_are_described_one_behind_the_other() {
    let setup = setup();
    let page = setup.page();
    let found: Vec<_> = entries(&page).collect();
    assert_eq!(found.len(), 2);
    let rings: Vec<VqConfig> = found.iter().map(|entry| entry.vq(0).unwrap()).collect();
    assert_eq!(rings[0].irq, 1);
    assert_eq!(rings[1].irq, 2);
    assert_eq!(rings[0].pfn, (PAGE >> 12) + 1);
    assert_eq!(rings[1].pfn, rings[0].pfn + VqConfig::ring_pages(rings[0].num));
    assert!(found.iter().all(|entry| entry.desc.kind == 4));
}

#[test]
fn a_kick_before_the_driver_is_ready_starts_the_device() {
    let setup = setup();
    let page = setup.page();
    let queue = entries(&page).nth(1).unwrap().vq(0).unwrap();
    setup.request(&queue, 0);
    setup.await_used(&queue, 1);
    assert_ne!(setup.word(0x1_0000), 0);
    let limit = Instant::now() + Duration::from_secs(5);
    while !setup.recorder.0.lock().unwrap().contains(&(2, true)) {
        assert!(Instant::now() < limit, "no interrupt");
    }
    // DRIVER_OK afterwards changes nothing.
    let entry = PAGE + entries(&page).nth(1).unwrap().at as u32;
    setup.put(entry + STATUS, &[7]);
    assert!(setup.bus.notify(entry));
    setup.request(&queue, 1);
    setup.await_used(&queue, 2);
    setup.bus.shut_down();
}

const STATUS: u32 = lguest_abi::bus::STATUS_AT as u32;

#[test]
fn a_reset_clears_rings_and_features_and_the_device_starts_again() {
    let setup = setup();
    let page = setup.page();
    let first = entries(&page).next().unwrap();
    let queue = first.vq(0).unwrap();
    let accepted = PAGE + first.desc.guest_features_at() as u32;
    setup.request(&queue, 0);
    setup.await_used(&queue, 1);
    setup.put(accepted, &[1; 4]);
    setup.put(PAGE + STATUS, &[0]);
    assert!(setup.bus.notify(PAGE));
    assert_eq!(setup.word(accepted), 0);
    setup.await_used(&queue, 0);
    setup.request(&queue, 0);
    setup.await_used(&queue, 1);
}

#[test]
fn other_addresses_are_nobodys() {
    let setup = setup();
    assert!(!setup.bus.notify(0x1_0000));
    assert!(!setup.bus.notify(PAGE + 0x5000_0000));
    // Within the page, but no descriptor.
    assert!(setup.bus.notify(PAGE + 1));
}

#[test]
fn rings_full_of_nonsense_stop_the_device_alone() {
    let setup = setup();
    let page = setup.page();
    let found: Vec<_> = entries(&page).map(|entry| entry.vq(0).unwrap()).collect();
    let (first, second) = (found[0], found[1]);
    setup.put(first.pfn << 12, &[0xff; 4096]);
    for _ in 0..10 {
        setup.bus.notify(first.pfn << 12);
    }
    setup.request(&second, 0);
    setup.await_used(&second, 1);
}
