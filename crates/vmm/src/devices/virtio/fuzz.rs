//! Bodies of the fuzz targets for the device cores: bytes played as a driver.
//!
//! The cores' workers are driven by hand instead of by an I/O thread, so that one input
//! always does the same. Rings lie where the input says, on each other if it likes.

use std::io;
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes as _, GuestAddress};

use super::console::{Port, Worker as ConsoleWorker};
use super::entropy::Worker as EntropyWorker;
use super::testing::{Ring, TestDriver};
use super::{Activation, DeviceQueue, DriverSignal, feature};
use crate::devices::fuzz::Bytes;

const SIZE: u16 = 16;
/// Where rings begin that the input has not moved, in units of [`GRAIN`].
const APART: [u8; 3] = [0, 64, 128];
/// Steps in which the input places rings.
const GRAIN: u32 = 16;
/// What the input can change of a queue's surroundings, in bytes.
const REACH: u64 = 0xfff0;

/// The guest: two queues, and no scruples.
struct Guest {
    driver: TestDriver,
    rings: [Ring; 2],
    places: [[u8; 3]; 2],
    features: u8,
}

impl Guest {
    fn new() -> Self {
        let driver = TestDriver::new(0);
        let rings = [driver.ring(0, SIZE).0, driver.ring(1, SIZE).0];
        Self { driver, rings, places: [APART; 2], features: 1 }
    }

    /// A queue as the input has laid it out, if that makes one.
    fn queue(&self, ring: &Ring, [descriptors, available, used]: [u8; 3]) -> Option<DeviceQueue> {
        let index = u16::from(!std::ptr::eq(ring, self.rings.first()?));
        let base = u32::try_from(ring.descriptors).ok()?;
        let at = |place: u8| Some(base.saturating_add(u32::from(place).saturating_mul(GRAIN)));
        let mut queue = Queue::new(SIZE).ok()?;
        queue.set_desc_table_address(at(descriptors), Some(0));
        queue.set_avail_ring_address(at(available), Some(0));
        queue.set_used_ring_address(at(used), Some(0));
        queue.set_event_idx(self.features & 1 != 0);
        queue.set_ready(true);
        let signal = Arc::clone(&self.driver.signal) as Arc<dyn DriverSignal>;
        let kick = DeviceQueue::new_kick().ok()?;
        DeviceQueue::new(index, queue, self.driver.memory(), signal, kick).ok()
    }

    fn activation(&self) -> Activation {
        let queues = self.rings.iter().zip(self.places);
        let queues = queues.filter_map(|(ring, places)| self.queue(ring, places)).collect();
        let mut activation = self.driver.activation(queues);
        activation.features = feature::VERSION_1 | u64::from(self.features);
        activation
    }

    /// Plays one operation on the rings. `None`: the input has ended.
    fn play(&mut self, operation: u8, bytes: &mut Bytes<'_>) -> Option<()> {
        let which = usize::from(operation >> 7);
        let memory = self.driver.memory();
        let [_, available, _] = *self.places.get(which)?;
        let ring = self.rings.get_mut(which)?;
        // The available ring as the device sees it now.
        let offset = u64::from(available).saturating_mul(u64::from(GRAIN));
        ring.available = ring.descriptors.saturating_add(offset);
        match operation & 7 {
            0 => {
                let index = u16::from(bytes.byte()?) % SIZE;
                let (address, len) = (bytes.long()?, bytes.word()?);
                let (flags, next) = (bytes.byte()?, bytes.byte()?);
                ring.set_descriptor(index, address, len, flags.into(), next.into());
            }
            1 => ring.publish(bytes.byte()?.into()),
            3 => ring.set_available_index(u16::from_le_bytes(bytes.take()?)),
            4 => {
                let offset = u64::from(u16::from_le_bytes(bytes.take()?)).min(REACH);
                let at = GuestAddress(ring.descriptors.saturating_add(offset));
                memory.write_obj(bytes.long()?, at).ok()?;
            }
            _ => {
                let [descriptors, available, used, features] = bytes.take()?;
                *self.places.get_mut(which)? = [descriptors, available, used];
                // A driver that starts again counts from zero again.
                *ring = self.driver.ring(u16::from(operation >> 7), SIZE).0;
                self.features = features;
            }
        }
        Some(())
    }
}

const TURN: u8 = 2;
const RESET: u8 = 5;
const CONFIGURATION: u8 = 6;
const OUTSIDE: u8 = 7;

/// The entropy device, from a host that gives the same byte again and again.
pub fn fuzz_entropy(data: &[u8]) {
    fn same(bytes: &mut [u8]) -> io::Result<usize> {
        bytes.fill(0xa5);
        Ok(bytes.len())
    }
    let mut bytes = Bytes::new(data);
    let mut guest = Guest::new();
    let start = |guest: &Guest| {
        let mut activation = guest.activation();
        let queue = activation.take_queue(0)?;
        EntropyWorker::new(queue, activation.signal, same).ok()
    };
    let mut worker = start(&guest);
    while let Some(operation) = bytes.byte() {
        if operation & 7 == TURN {
            if let Some(worker) = &mut worker {
                worker.turn();
            }
        } else if guest.play(operation, &mut bytes).is_none() {
            return;
        } else if operation & 7 == RESET {
            worker = start(&guest);
        }
    }
}

/// The console: its queues, its configuration, and what happens outside.
pub fn fuzz_console(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let mut guest = Guest::new();
    let Ok(port) = Port::new() else { return };
    let (handle, input) = (port.handle(), port.handle().input());
    let mut typed = 0_usize;
    let mut worker = ConsoleWorker::new(port.clone(), guest.activation()).ok();
    while let Some(operation) = bytes.byte() {
        match operation & 7 {
            TURN => {
                if let Some(worker) = &mut worker {
                    worker.turn();
                }
            }
            CONFIGURATION => {
                let (Some(at), Some(value)) = (bytes.byte(), bytes.long()) else { return };
                let mut data = value.to_le_bytes();
                if at & 0x80 != 0 {
                    port.write_config(u64::from(at & 0x7f), &data);
                } else {
                    port.read_config(u64::from(at), &mut data);
                }
            }
            OUTSIDE => {
                let (Some(what), Some(value)) = (bytes.byte(), bytes.byte()) else { return };
                match what & 3 {
                    // A sender would wait for a reader that is not there.
                    0 if typed < 4000 => typed = typed.saturating_add(input.send(&[value])),
                    1 => handle.resize(value.into(), what.into()),
                    2 => {
                        port.take_output();
                    }
                    _ => {
                        if let Some(worker) = &mut worker {
                            worker.settled();
                        }
                    }
                }
            }
            _ => {
                if guest.play(operation, &mut bytes).is_none() {
                    return;
                }
                if operation & 7 == RESET {
                    worker = ConsoleWorker::new(port.clone(), guest.activation()).ok();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seeds must reach the devices, or mutating them is for nothing.
    #[test]
    fn an_honest_input_is_served() {
        let mut guest = Guest::new();
        let (entropy, console) = (guest.activation(), guest.activation());
        assert_eq!((entropy.queues.len(), console.queues.len()), (2, 2));
        let operations = [0_u8, 0]
            .into_iter()
            .chain(0x100_0000_u64.to_le_bytes())
            .chain(16_u32.to_le_bytes())
            .chain([super::super::testing::WRITE as u8, 0]);
        let operations: Vec<u8> = operations.collect();
        assert!(guest.play(operations[0], &mut Bytes::new(&operations[1..])).is_some());
        assert!(guest.play(1, &mut Bytes::new(&[0])).is_some());
        let mut queue = guest.activation().take_queue(0).unwrap();
        assert_eq!(queue.pop().unwrap().unwrap().writable(), 16);
        let nothing = guest.play(1, &mut Bytes::new(&[]));
        assert!(nothing.is_none());
    }
}
