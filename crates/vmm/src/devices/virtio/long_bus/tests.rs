//! A driver's side of the bus, against real cores.

use std::mem::offset_of;
use std::time::{Duration, Instant};

use lguest_abi::long::bus::{Device, VERSION_1, status};

use super::*;
use crate::devices::Recorder;
use crate::devices::virtio::{Entropy, IoThreads};
use crate::memory::{GuestRam, MIN_RAM};

const RAM_END: u64 = 31 << 20;
const RING: u64 = 0x10_0000;
const BUFFER: u64 = 0x20_0000;
const READY: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;

struct Setup {
    ram: GuestRam,
    bus: LongBus,
    recorder: Arc<Recorder>,
    _io: Arc<IoThreads>,
}

fn setup() -> Setup {
    let ram = GuestRam::new(MIN_RAM).unwrap();
    let io = IoThreads::start(1).unwrap();
    let recorder = Arc::new(Recorder::default());
    let cores: Vec<Box<dyn VirtioDevice>> =
        vec![Box::new(Entropy::new(Arc::clone(&io))), Box::new(Entropy::new(Arc::clone(&io)))];
    assert_eq!(bytes(&cores).unwrap(), 4096);
    let sink = Arc::clone(&recorder);
    let lines = move |irq| InterruptLine::new(Arc::clone(&sink) as _, irq);
    let bus = LongBus::new(cores, Arc::clone(ram.mmap()), RAM_END, lines).unwrap();
    Setup { ram, bus, recorder, _io: io }
}

impl Setup {
    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.mmap().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    fn block(&self, device: u16) -> Device {
        let mut bytes = [0; BLOCK_BYTES];
        let at = RAM_END + device_at(device).unwrap() as u64;
        self.ram.mmap().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        Device::read(&bytes).unwrap()
    }

    fn change(&self, device: u16, change: impl FnOnce(&mut Device)) {
        let mut block = self.block(device);
        change(&mut block);
        let mut bytes = [0; BLOCK_BYTES];
        block.write(&mut bytes).unwrap();
        self.put(RAM_END + device_at(device).unwrap() as u64, &bytes);
    }

    /// How often IRQ `irq` was raised.
    fn edges(&self, irq: u8) -> usize {
        self.recorder.0.lock().unwrap().iter().filter(|edge| **edge == (irq, true)).count()
    }

    fn status(&self, device: u16) -> u8 {
        self.block(device).status as u8
    }

    /// Offers the queue as a driver should, with one change.
    fn start(&self, change: impl FnOnce(&mut Device)) -> u8 {
        self.change(0, |block| {
            block.guest_features = VERSION_1;
            let queue = &mut block.queue[0];
            (queue.size, queue.enable) = (8, 1);
            (queue.desc, queue.driver, queue.device) = (RING, RING + 0x1000, RING + 0x2000);
            change(block);
        });
        self.bus.set_status(0, READY).unwrap();
        self.bus.set_status(0, READY | status::DRIVER_OK).unwrap();
        self.status(0)
    }

    /// Asks for 64 random bytes as request `n`, counted from 0, and waits for them.
    fn request(&self, n: u16) {
        self.put(RING, &[&BUFFER.to_le_bytes()[..], &[64, 0, 0, 0, 2, 0, 0, 0]].concat());
        self.put(RING + 0x1004 + u64::from(n) * 2, &[0, 0]);
        self.put(RING + 0x1002, &(n + 1).to_le_bytes());
        self.bus.notify(0, 0).unwrap();
        let limit = Instant::now() + Duration::from_secs(10);
        let used = || -> u16 { self.ram.mmap().read_obj(GuestAddress(RING + 0x2002)).unwrap() };
        while used() != n + 1 {
            assert!(Instant::now() < limit, "nothing is used");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn blocks_tell_what_there_is() {
    let setup = setup();
    let mut bytes = [0; BLOCK_BYTES];
    setup.ram.mmap().read_slice(&mut bytes, GuestAddress(RAM_END)).unwrap();
    let header = Header::read(&bytes).unwrap();
    assert_eq!((header.magic, header.devices, header.block), (MAGIC, 2, 512));
    let (first, second) = (setup.block(0), setup.block(1));
    assert_eq!((first.kind, first.queues, first.config_len), (4, 1, 0));
    assert_eq!((first.config_irq, first.queue[0].irq), (1, 2));
    assert_eq!((second.config_irq, second.queue[0].irq), (3, 4));
    assert!(first.host_features & VERSION_1 != 0 && first.queue[0].max >= 8);
}

#[test]
fn a_device_works_from_driver_ok_to_reset_and_again() {
    let setup = setup();
    for _ in 0..2 {
        setup.bus.notify(0, 0).unwrap(); // before DRIVER_OK: ignored
        assert_eq!(setup.start(|_| ()), READY | status::DRIVER_OK);
        setup.request(0);
        setup.request(1);
        assert!(setup.edges(2) > 0, "an interrupt of the queue's");
        setup.bus.set_status(0, 0).unwrap();
        assert_eq!(setup.status(0), 0);
        setup.put(RING, &[0; 0x3000]);
    }
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let setup = setup();
    setup.change(0, |block| block.guest_features = VERSION_1 | 1 << 60);
    setup.bus.set_status(0, READY).unwrap();
    assert_eq!(setup.status(0), READY & !status::FEATURES_OK);
    setup.bus.set_status(0, 0).unwrap();
    setup.change(0, |block| block.guest_features = 0);
    setup.bus.set_status(0, READY).unwrap();
    assert_eq!(setup.status(0), READY & !status::FEATURES_OK, "version 1 is a must");
}

#[test]
fn rings_that_are_none_put_the_device_into_need_of_a_reset() {
    type Change = fn(&mut Device);
    let broken: [Change; 8] = [
        |block| block.queue[0].size = 3,
        |block| block.queue[0].size = 0,
        |block| block.queue[0].size = 0x8000,
        |block| block.queue[0].desc += 8,
        |block| block.queue[0].driver += 1,
        |block| block.queue[0].device = RAM_END - 8,
        |block| block.queue[0].device = u64::MAX - 3,
        |block| block.guest_features = 0, // no FEATURES_OK, then DRIVER_OK
    ];
    for change in broken {
        let setup = setup();
        let status = setup.start(change);
        assert_ne!(status & status::NEEDS_RESET, 0);
        assert_eq!(setup.edges(1), 1, "by the configuration's interrupt");
        setup.bus.notify(0, 0).unwrap();
        setup.bus.set_status(0, 0).unwrap();
        assert_eq!(setup.start(|_| ()), READY | status::DRIVER_OK, "well again");
        setup.request(0);
    }
}

#[test]
fn what_is_not_there_cannot_be_named() {
    let bus = setup().bus;
    assert_eq!(bus.notify(2, 0), Err(NoSuch::Device(2)));
    assert_eq!(bus.set_status(u16::MAX, 1), Err(NoSuch::Device(u16::MAX)));
    let queue = NoSuch::Queue { device: 1, queue: 1 };
    assert_eq!(bus.notify(1, 1), Err(queue));
    assert_eq!(queue.to_string(), "device 1 has no queue 1");
}

#[test]
fn the_hosts_own_fields_are_only_copies() {
    let setup = setup();
    assert_eq!(setup.start(|_| ()), READY | status::DRIVER_OK);
    setup.change(0, |block| {
        block.status = 0;
        block.queue[0].max = 1;
        block.kind = 99;
    });
    setup.request(0);
    let again = READY | status::DRIVER_OK;
    setup.bus.set_status(0, again).unwrap();
    assert_eq!(setup.status(0), again);
    assert_eq!(offset_of!(Device, status), 24);
}
