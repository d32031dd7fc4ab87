//! A driver in a test's hands: rings laid out in guest memory by hand, honest or not.
//!
//! Not part of the public interface; public only so that integration tests and fuzz
//! targets can use it. A test makes a [`TestDriver`], takes a [`Ring`] and the
//! [`DeviceQueue`] at its other end, activates a core with the latter, and plays the
//! guest with the former. What the core signals is recorded.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::arithmetic_side_effects,
    missing_docs,
    reason = "support for tests, where a panic is how a wrong assumption is reported"
)]

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{DeviceQueue, QueueError};
use super::{
    ActivateError, Activation, DeviceKind, DriverSignal, VirtioDevice, feature, read_config_bytes,
};
use crate::memory::{GuestMemory, GuestRam};

/// Descriptor flags (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// RAM of a test's guest: rings at the bottom, buffers above.
const RAM: u64 = 64 << 20;
const FIRST_RING: u64 = 0x10_0000;
const RING_SPACE: u64 = 0x1_0000;
const FIRST_BUFFER: u64 = 0x100_0000;
const PATIENCE: Duration = Duration::from_secs(20);

/// What a core told its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// How often each queue was signalled: queue numbers, in order.
    pub used: Vec<u16>,
    pub config_changes: usize,
    pub needs_reset: bool,
}

/// Records what a core signals.
#[derive(Debug, Default)]
pub struct RecordedSignal {
    signals: Mutex<Signals>,
    changed: Condvar,
}

impl RecordedSignal {
    pub fn seen(&self) -> Signals {
        self.signals.lock().unwrap().clone()
    }

    /// Waits until `done` of what was signalled; panics if that takes too long.
    pub fn wait(&self, mut done: impl FnMut(&Signals) -> bool) -> Signals {
        let guard = self.signals.lock().unwrap();
        let (guard, timeout) =
            self.changed.wait_timeout_while(guard, PATIENCE, |signals| !done(signals)).unwrap();
        assert!(!timeout.timed_out(), "the device does not signal: {guard:?}");
        guard.clone()
    }

    fn record(&self, change: impl FnOnce(&mut Signals)) {
        change(&mut self.signals.lock().unwrap());
        self.changed.notify_all();
    }
}

impl DriverSignal for RecordedSignal {
    fn queue_used(&self, queue: u16) {
        self.record(|signals| signals.used.push(queue));
    }

    fn config_changed(&self) {
        self.record(|signals| signals.config_changes += 1);
    }

    fn needs_reset(&self) {
        self.record(|signals| signals.needs_reset = true);
    }
}

/// The guest: its memory, and what it was signalled.
#[derive(Debug)]
pub struct TestDriver {
    pub ram: GuestRam,
    pub signal: Arc<RecordedSignal>,
    features: u64,
}

impl TestDriver {
    /// A driver that agreed on `features`, beside VERSION_1.
    pub fn new(features: u64) -> Self {
        let ram = GuestRam::new(RAM).unwrap();
        Self { ram, signal: Arc::default(), features: features | feature::VERSION_1 }
    }

    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(self.ram.mmap())
    }

    /// Lays out queue number `index` and gives both ends of it.
    pub fn ring(&self, index: u16, size: u16) -> (Ring, DeviceQueue) {
        let base = FIRST_RING + u64::from(index) * RING_SPACE;
        let ring = Ring {
            memory: self.memory(),
            kick: DeviceQueue::new_kick().unwrap(),
            size,
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x8000,
            next_descriptor: 0,
            next_available: 0,
            next_used: 0,
            next_buffer: FIRST_BUFFER + u64::from(index) * 0x40_0000,
        };
        let zeroes = vec![0_u8; RING_SPACE as usize];
        ring.memory.write_slice(&zeroes, GuestAddress(base)).unwrap();
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.set_desc_table_address(Some(ring.descriptors as u32), Some(0));
        queue.set_avail_ring_address(Some(ring.available as u32), Some(0));
        queue.set_used_ring_address(Some(ring.used as u32), Some(0));
        queue.set_event_idx(self.features & feature::EVENT_IDX != 0);
        queue.set_ready(true);
        let signal = Arc::clone(&self.signal) as Arc<dyn DriverSignal>;
        let queue =
            DeviceQueue::new(index, queue, self.memory(), signal, Arc::clone(&ring.kick)).unwrap();
        (ring, queue)
    }

    /// What a core is activated with.
    pub fn activation(&self, queues: Vec<DeviceQueue>) -> Activation {
        let signal = Arc::clone(&self.signal) as Arc<dyn DriverSignal>;
        Activation { features: self.features, memory: self.memory(), queues, signal }
    }
}

/// A device that does nothing with its queues but give each request back when asked to.
#[derive(Debug, Default)]
pub struct IdleDevice {
    pub queues: Arc<Mutex<Vec<DeviceQueue>>>,
    pub signal: Arc<Mutex<Option<Arc<dyn DriverSignal>>>>,
    pub config: [u8; 8],
}

impl VirtioDevice for IdleDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0b101
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 16]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            if let Some(place) = self.config.get_mut(at as usize) {
                *place = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        *self.signal.lock().unwrap() = Some(activation.signal);
        *self.queues.lock().unwrap() = activation.queues;
        Ok(())
    }

    fn reset(&mut self) {
        self.queues.lock().unwrap().clear();
        *self.signal.lock().unwrap() = None;
    }
}

impl IdleDevice {
    /// Gives back whatever is in the queues.
    pub fn serve(queues: &Mutex<Vec<DeviceQueue>>) -> Result<(), QueueError> {
        for queue in queues.lock().unwrap().iter_mut() {
            while let Some(chain) = queue.pop()? {
                queue.push(chain.head(), 0)?;
            }
            queue.notify()?;
        }
        Ok(())
    }
}

/// A part of a request.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// Bytes for the device to read.
    Read(&'a [u8]),
    /// Room for so many bytes that it writes.
    Write(u32),
}

/// The driver's end of a queue.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    kick: Arc<EventFd>,
    size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
    next_buffer: u64,
}

/// A request under way: its head, and where the writable parts are.
#[derive(Clone, Debug)]
pub struct Offered {
    pub head: u16,
    pub writable: Vec<(u64, u32)>,
}

impl Ring {
    /// Writes descriptor number `index` as given, wrong or not.
    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.descriptors + u64::from(index) * 16;
        self.write_descriptor(at, address, len, flags, next);
    }

    /// Writes a descriptor anywhere: for indirect tables.
    pub fn write_descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Fresh guest memory for a buffer.
    pub fn buffer(&mut self, len: u64) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += len.next_multiple_of(64);
        at
    }

    /// Makes `head` available, without telling the device.
    pub fn publish(&mut self, head: u16) {
        let slot = self.available + 4 + u64::from(self.next_available % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    /// Writes the available ring's index as given, wrong or not.
    pub fn set_available_index(&self, index: u16) {
        let at = GuestAddress(self.available + 2);
        self.memory.store(index, at, std::sync::atomic::Ordering::SeqCst).unwrap();
    }

    /// Writes the available ring's `used_event` (virtio 1.2, 2.7.7.1).
    pub fn set_used_event(&self, index: u16) {
        let at = self.available + 4 + u64::from(self.size) * 2;
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Tells the device.
    pub fn notify(&self) {
        self.kick.write(1).unwrap();
    }

    /// Lays out a request, in descriptors of its own, and makes it available.
    pub fn offer(&mut self, parts: &[Part<'_>]) -> Offered {
        let head = self.next_descriptor;
        let mut writable = Vec::new();
        for (n, part) in parts.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = if n + 1 < parts.len() { NEXT } else { 0 };
            let (len, flags) = match part {
                Part::Read(bytes) => (bytes.len() as u32, more),
                Part::Write(len) => (*len, more | WRITE),
            };
            let at = self.buffer(len.into());
            match part {
                Part::Read(bytes) => self.memory.write_slice(bytes, GuestAddress(at)).unwrap(),
                Part::Write(len) => writable.push((at, *len)),
            }
            self.set_descriptor(index, at, len, flags, self.next_descriptor);
        }
        self.publish(head);
        Offered { head, writable }
    }

    /// The next used request, if there is one: its head and how much was written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let index = GuestAddress(self.used + 2);
        let index: u16 = self.memory.load(index, std::sync::atomic::Ordering::SeqCst).unwrap();
        if index == self.next_used {
            return None;
        }
        let at = self.used + 4 + u64::from(self.next_used % self.size) * 8;
        self.next_used = self.next_used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head as u16, len))
    }

    /// Waits for the next used request.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "the device does not answer");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// What stands in a request's writable parts.
    pub fn answer(&self, offered: &Offered) -> Vec<u8> {
        let mut all = Vec::new();
        for (at, len) in &offered.writable {
            let start = all.len();
            all.resize(start + *len as usize, 0);
            self.memory.read_slice(all.get_mut(start..).unwrap(), GuestAddress(*at)).unwrap();
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{ChainError, QueueError};
    use std::io::{Read, Write};

    fn chain_error(lay: impl FnOnce(&mut Ring)) -> ChainError {
        let driver = TestDriver::new(feature::INDIRECT_DESC);
        let (mut ring, mut queue) = driver.ring(0, 8);
        lay(&mut ring);
        ring.publish(0);
        match queue.pop() {
            Err(QueueError::Chain { queue: 0, error }) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_come_out_whole_and_go_back() {
        for features in [0, feature::EVENT_IDX] {
            let driver = TestDriver::new(features);
            let (mut ring, mut queue) = driver.ring(3, 8);
            let offered = ring.offer(&[
                Part::Read(b"he"),
                Part::Read(b"llo"),
                Part::Write(4),
                Part::Write(8),
            ]);
            let chain = queue.pop().unwrap().unwrap();
            assert_eq!((chain.head(), chain.readable(), chain.writable()), (0, 5, 12));
            assert!(queue.pop().unwrap().is_none());
            let mut text = String::new();
            chain.reader().unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
            chain.writer().unwrap().write_all(b"answer").unwrap();
            let lens = |skip, len| -> Vec<usize> {
                chain.slices(true, skip, len).unwrap().iter().map(|slice| slice.len()).collect()
            };
            assert_eq!((lens(0, 12), lens(3, 2), lens(4, 1)), (vec![4, 8], vec![1, 1], vec![1]));
            assert!(chain.slices(true, 3, 10).is_err());
            queue.push(chain.head(), 6).unwrap();
            queue.notify().unwrap();
            assert_eq!(driver.signal.seen().used, [3]);
            assert_eq!(ring.wait_used(), (0, 6));
            assert_eq!(&ring.answer(&offered)[..6], b"answer");
        }
    }

    #[test]
    fn a_driver_that_wants_no_interrupt_gets_none() {
        let driver = TestDriver::new(0);
        let (mut ring, mut queue) = driver.ring(0, 8);
        driver.memory().write_obj(1_u16, GuestAddress(ring.available)).unwrap();
        let offered = ring.offer(&[Part::Write(1)]);
        queue.push(offered.head, 0).unwrap();
        queue.notify().unwrap();
        assert!(driver.signal.seen().used.is_empty());
        let driver = TestDriver::new(feature::EVENT_IDX);
        let (mut ring, mut queue) = driver.ring(0, 8);
        ring.set_used_event(1);
        for expected in [0, 1] {
            let offered = ring.offer(&[Part::Write(1)]);
            queue.push(offered.head, 0).unwrap();
            queue.notify().unwrap();
            assert_eq!(driver.signal.seen().used.len(), expected);
        }
    }

    #[test]
    fn requests_given_back_together_appear_together() {
        for (features, event, signals) in
            [(0, 0, 1), (feature::EVENT_IDX, 1, 1), (feature::EVENT_IDX, 3, 0)]
        {
            let driver = TestDriver::new(features);
            let (mut ring, mut queue) = driver.ring(0, 4);
            if features != 0 {
                ring.set_used_event(event);
            }
            let heads: Vec<_> = (0..3).map(|_| ring.offer(&[Part::Write(1)]).head).collect();
            queue.push_together(&[]).unwrap();
            queue.push_together(&[(heads[0], 1), (heads[1], 2), (heads[2], 3)]).unwrap();
            queue.notify().unwrap();
            assert_eq!(driver.signal.seen().used.len(), signals);
            let used: Vec<_> = (0..3).map(|_| ring.take_used().unwrap()).collect();
            assert_eq!(used, [(heads[0], 1), (heads[1], 2), (heads[2], 3)]);
            assert!(ring.take_used().is_none());
            assert!(queue.push_together(&[(0, 0), (9, 0)]).is_err());
        }
    }

    #[test]
    fn chains_that_break_the_rules_are_refused_whole() {
        let endless = ChainError::Endless;
        assert_eq!(chain_error(|ring| ring.set_descriptor(0, 0x1000, 16, NEXT, 0)), endless);
        assert_eq!(chain_error(|ring| ring.set_descriptor(0, 0x1000, 16, NEXT, 8)), endless);
        let order = chain_error(|ring| {
            ring.set_descriptor(0, 0x1000, 16, NEXT | WRITE, 1);
            ring.set_descriptor(1, 0x1000, 16, 0, 0);
        });
        assert_eq!(order, ChainError::Order);
        let not_ram = chain_error(|ring| ring.set_descriptor(0, RAM - 8, 16, WRITE, 0));
        assert_eq!(not_ram, ChainError::NotRam(RAM - 8));
        let wraps = chain_error(|ring| ring.set_descriptor(0, u64::MAX - 8, 16, WRITE, 0));
        assert_eq!(wraps, ChainError::NotRam(u64::MAX - 8));
        let nested = chain_error(|ring| {
            ring.set_descriptor(0, 0x2000, 16, INDIRECT, 0);
            ring.write_descriptor(0x2000, 0x3000, 16, INDIRECT, 0);
            ring.write_descriptor(0x3000, 0x4000, 16, 0, 0);
        });
        assert_eq!(nested, endless);
        let odd = chain_error(|ring| ring.set_descriptor(0, 0x2000, 17, INDIRECT, 0));
        assert_eq!(odd, endless);
        let huge = chain_error(|ring| {
            for n in 0..8 {
                ring.set_descriptor(n, 0, RAM as u32, NEXT, (n + 1) % 8);
            }
        });
        assert_eq!(huge, endless);
    }

    #[test]
    fn a_ring_that_makes_no_sense_is_an_error() {
        let driver = TestDriver::new(0);
        let (ring, mut queue) = driver.ring(0, 8);
        ring.set_available_index(9);
        assert!(matches!(queue.pop(), Err(QueueError::Ring { queue: 0, .. })));
    }
}
