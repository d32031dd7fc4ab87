use super::*;
use crate::devices::apic::message::MsiMessage;
use crate::devices::pci::intx::IntxLines;
use crate::devices::virtio::DriverSignal;
use crate::devices::virtio::testing::{IdleDevice, Part, Ring, TestDriver};
use crate::devices::{InterruptLine, Recorder};

#[derive(Debug, Default)]
struct Messages(Mutex<Vec<MsiMessage>>);

impl MsiSink for Messages {
    fn send(&self, message: MsiMessage) {
        self.0.lock().unwrap().push(message);
    }
}

/// A function, and everything around it.
struct Rig {
    function: Arc<VirtioPci>,
    driver: TestDriver,
    queues: Arc<Mutex<Vec<DeviceQueue>>>,
    signal: Arc<Mutex<Option<Arc<dyn DriverSignal>>>>,
    line: Arc<Recorder>,
    messages: Arc<Messages>,
}

impl Rig {
    fn new() -> Self {
        let (line, messages) = (Arc::new(Recorder::default()), Arc::new(Messages::default()));
        let driver = TestDriver::new(0);
        let device = IdleDevice { config: *b"features", ..IdleDevice::default() };
        let (queues, signal) = (device.queues.clone(), device.signal.clone());
        let lines = IntxLines::new((16, InterruptLine::new(line.clone(), 16)), []);
        let place = PciPlace {
            slot: Slot(1),
            pin: lines.pin(Slot(1)),
            messages: Some(messages.clone()),
            kept_back: 0,
            memory: driver.memory(),
        };
        let function = VirtioPci::new(Box::new(device), place).unwrap();
        Self { function, driver, queues, signal, line, messages }
    }

    fn get<const N: usize>(&self, offset: u64) -> u64 {
        let mut data = [0; N];
        self.function.memory_read(BAR, offset, &mut data);
        data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn set<const N: usize>(&self, offset: u64, value: u64) {
        self.function.memory_write(BAR, offset, &value.to_le_bytes()[..N]);
    }

    fn config<const N: usize>(&self, offset: u16) -> u64 {
        let mut data = [0; N];
        self.function.config_read(offset, &mut data);
        data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// The capability with this identifier and, if it is virtio's, of this type.
    fn capability(&self, id: u64, kind: u64) -> u16 {
        let mut at = self.config::<1>(0x34) as u16;
        while self.config::<1>(at) != id || (id == 9 && self.config::<1>(at + 3) != kind) {
            at = self.config::<1>(at + 1) as u16;
            assert_ne!(at, 0, "there is no capability {id}, {kind}");
        }
        at
    }

    /// Accepts these features and sets the queues up, in a driver's order.
    fn start(&self, features: u64) -> Vec<Ring> {
        self.set::<1>(0x14, 1);
        self.set::<1>(0x14, 3);
        for half in 0..2 {
            self.set::<4>(8, half);
            self.set::<4>(12, features >> (32 * half) & 0xffff_ffff);
        }
        self.set::<1>(0x14, 11);
        assert_eq!(self.get::<1>(0x14), 11);
        let rings: Vec<_> = (0..2)
            .map(|index| {
                self.set::<2>(0x16, index);
                let (ring, _) = self.driver.ring(index as u16, 16);
                self.set::<2>(0x18, 16);
                self.set::<2>(0x1a, index + 1);
                for (field, address) in
                    [(0x20, ring.descriptors), (0x28, ring.available), (0x30, ring.used)]
                {
                    self.set::<4>(field, address & 0xffff_ffff);
                    self.set::<4>(field + 4, address >> 32);
                    assert_eq!(self.get::<8>(field), address);
                }
                self.set::<2>(0x1c, 1);
                ring
            })
            .collect();
        self.set::<1>(0x14, 15);
        rings
    }
}

const MODERN: u64 = 1 << 32;

#[test]
fn the_capabilities_lead_everywhere() {
    let rig = Rig::new();
    assert_eq!(rig.config::<4>(0), 0x1044_1af4);
    for (kind, part) in [(1, COMMON), (2, NOTIFY), (3, ISR), (4, DEVICE)] {
        let at = rig.capability(9, kind);
        assert_eq!(rig.config::<1>(at + 4), 0);
        assert_eq!(rig.config::<4>(at + 8), part.start);
        assert_eq!(rig.config::<4>(at + 12), part.end - part.start);
    }
    assert_eq!(rig.config::<4>(rig.capability(9, 2) + 16), 4);
    let msix = rig.capability(0x11, 0);
    assert_eq!(rig.config::<2>(msix + 2), 2, "three vectors");
    assert_eq!((rig.config::<4>(msix + 4), rig.config::<4>(msix + 8)), (0x4000, 0x6000));
    assert_eq!((rig.get::<8>(0x2000), rig.get::<2>(0x12)), (u64::from_le_bytes(*b"features"), 2));
}

#[test]
fn the_configuration_window_reads_and_writes_memory() {
    let rig = Rig::new();
    let at = rig.capability(9, 5);
    let access = |bar: u8, offset: u32, len: u32| {
        rig.function.config_write(at + 4, &[bar]);
        rig.function.config_write(at + 8, &offset.to_le_bytes());
        rig.function.config_write(at + 12, &len.to_le_bytes());
    };
    access(0, 0x2000, 4);
    assert_eq!(rig.config::<4>(at + 16), u64::from(u32::from_le_bytes(*b"feat")));
    rig.function.config_write(at + 16, b"heat");
    assert_eq!(rig.get::<4>(0x2000), u64::from(u32::from_le_bytes(*b"heat")));
    for (bar, offset, len) in [(1, 0x2000, 4), (0, 0xffff_fffc, 4), (0, 0x2001, 2), (0, 0x2000, 3)]
    {
        access(bar, offset, len);
        rig.function.config_write(at + 16, b"none");
        assert_eq!(rig.get::<4>(0x2000), u64::from(u32::from_le_bytes(*b"heat")));
    }
}

#[test]
fn features_not_offered_are_refused() {
    let rig = Rig::new();
    for (features, status) in [(MODERN | 1 << 5, 3), (0b101, 3), (MODERN | 0b100, 11)] {
        rig.set::<1>(0x14, 0);
        rig.set::<1>(0x14, 3);
        for half in 0..3 {
            rig.set::<4>(8, half);
            rig.set::<4>(12, features >> (32 * (half & 1)) & 0xffff_ffff);
        }
        rig.set::<1>(0x14, 11);
        assert_eq!(rig.get::<1>(0x14), status, "{features:#x}");
        rig.set::<1>(0x14, 4);
        assert_eq!(rig.signal.lock().unwrap().is_some(), status == 11);
    }
    for (half, expected) in [(0, 0x3000_0005), (1, 1), (2, 0)] {
        rig.set::<4>(0, half);
        assert_eq!(rig.get::<4>(4), expected);
    }
}

#[test]
fn queues_work_and_interrupt_by_messages() {
    let rig = Rig::new();
    let msix = rig.capability(0x11, 0);
    for vector in 0..3 {
        rig.set::<4>(0x4000 + vector * 16, 0xfee0_0000);
        rig.set::<4>(0x4008 + vector * 16, 0x50 + vector);
        rig.set::<4>(0x400c + vector * 16, 0);
    }
    rig.function.config_write(msix + 2, &[2, 0x80]);
    let mut rings = rig.start(MODERN);
    rig.set::<2>(0x10, 0);
    rig.set::<2>(0x16, 1);
    let offered = rings[1].offer(&[Part::Write(8)]);
    rig.set::<2>(0x3004, 1);
    let kick = Arc::clone(rig.queues.lock().unwrap()[1].kick());
    assert_eq!(kick.read().unwrap(), 1);
    rig.queues.lock().unwrap().remove(0);
    IdleDevice::serve(&rig.queues).unwrap();
    assert_eq!(rings[1].wait_used(), (offered.head, 0));
    let signal = rig.signal.lock().unwrap().clone().unwrap();
    let generation = rig.get::<1>(0x15);
    signal.config_changed();
    assert_ne!(rig.get::<1>(0x15), generation);
    let sent: Vec<u32> = rig.messages.0.lock().unwrap().iter().map(|sent| sent.data).collect();
    assert_eq!(sent, [0x52, 0x50]);
    assert!(rig.line.0.lock().unwrap().is_empty());
    rig.set::<2>(0x1a, 77);
    assert_eq!(rig.get::<2>(0x1a), 0xffff, "there is no such vector");
}

#[test]
fn the_line_is_asserted_until_the_status_is_read() {
    let rig = Rig::new();
    rig.start(MODERN);
    let signal = rig.signal.lock().unwrap().clone().unwrap();
    signal.queue_used(0);
    signal.config_changed();
    assert_eq!(rig.config::<2>(6) & 8, 8);
    rig.function.config_write(4, &[6, 4]);
    rig.function.config_write(4, &[6, 0]);
    assert_eq!((rig.get::<1>(0x1000), rig.get::<1>(0x1000)), (3, 0));
    let expected = [true, false, true, false].map(|asserted| (16, asserted));
    assert_eq!(*rig.line.0.lock().unwrap(), expected);
}

#[test]
fn what_needs_a_reset_says_so_until_it_is_reset() {
    let rig = Rig::new();
    let rings = rig.start(MODERN);
    let signal = rig.signal.lock().unwrap().clone().unwrap();
    rings[0].set_available_index(1000);
    assert!(IdleDevice::serve(&rig.queues).is_err());
    signal.needs_reset();
    assert_eq!(rig.get::<1>(0x14), 15 | 64);
    rig.set::<1>(0x14, 0);
    assert_eq!((rig.get::<1>(0x14), rig.get::<1>(0x1000)), (0, 0));
    assert!(rig.queues.lock().unwrap().is_empty());
    rig.start(MODERN);
    assert_eq!(rig.get::<1>(0x14), 15);
    // A queue outside of memory.
    rig.set::<1>(0x14, 0);
    rig.set::<1>(0x14, 3);
    rig.set::<4>(8, 1);
    rig.set::<4>(12, 1);
    rig.set::<1>(0x14, 11);
    rig.set::<8>(0x20, u64::MAX - 15);
    rig.set::<2>(0x1c, 1);
    rig.set::<1>(0x14, 15);
    assert_eq!(rig.get::<1>(0x14), 15 | 64);
}
