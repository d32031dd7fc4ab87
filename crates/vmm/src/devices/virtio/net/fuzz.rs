//! Body of the fuzz target for the network card: a hostile driver and a hostile peer.
//!
//! The input decides which features were agreed on, what lies in the rings, and what the
//! peer writes, by turns. The worker is driven by hand, on this thread: nothing in it may
//! panic, hang or grow without bounds.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use event_manager::EventSet;
use vm_memory::{Bytes, GuestAddress};

use super::super::DeviceQueue;
use super::super::testing::{Ring, TestDriver};
use super::QUEUE_SIZE;
use super::backends::Backend;
use super::backends::passt::PasstBackend;
use super::control::Control;
use super::mac::MacAddress;
use super::rx::RxQueue;
use super::shared::{Face, Shared};
use super::tx::TxQueue;
use super::worker::{Pair, Worker};

/// Descriptors of each ring; few, so that they meet.
const RING: u16 = 8;
/// Where all buffers are, so that they overlap: with each other, and with the rings.
const BUFFERS: u64 = 0x10_0000;
const _: () = assert!(RING <= QUEUE_SIZE, "a ring that the card could have");

/// Takes numbers off the front of the input.
struct Input<'d>(&'d [u8]);

impl<'d> Input<'d> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take().map(u8::from_le_bytes)
    }

    /// A length, and so many bytes or what is left.
    fn bytes(&mut self) -> Option<&'d [u8]> {
        let len = usize::from(self.byte()?).min(self.0.len());
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }
}

struct Scene {
    driver: TestDriver,
    rings: [Ring; 3],
    worker: Worker,
    control: Control,
    backend: PasstBackend,
    peer: UnixStream,
}

impl Scene {
    fn new(features: u64) -> Option<Self> {
        let driver = TestDriver::new(features);
        let (ours, peer) = UnixStream::pair().ok()?;
        peer.set_nonblocking(true).ok()?;
        let mut backend = PasstBackend::over(ours).ok()?;
        backend.start(features, true);
        let activation = driver.activation(Vec::new());
        let face = Arc::new(Face::new(true, MacAddress([2; 6])));
        let shared = Arc::new(Shared::new(features, activation.signal, face));
        let (rx, rx_queue) = driver.ring(0, RING);
        let (tx, tx_queue) = driver.ring(1, RING);
        let (control, control_queue): (_, DeviceQueue) = driver.ring(2, RING);
        let features = features | super::super::feature::VERSION_1;
        let kicks = vec![Arc::clone(rx_queue.kick())];
        let pair =
            Pair { rx: RxQueue::new(rx_queue, features), tx: TxQueue::new(tx_queue, features) };
        // Its own is never asked: `serve` is handed one.
        let (idle, _) = UnixStream::pair().ok()?;
        let idle: Box<dyn Backend> = Box::new(PasstBackend::over(idle).ok()?);
        let worker = Worker::new(Arc::new(Mutex::new(idle)), vec![pair], Arc::clone(&shared));
        let commands = Control::new(control_queue, shared, Vec::new(), kicks);
        Some(Self { driver, rings: [rx, tx, control], worker, control: commands, backend, peer })
    }

    /// One thing that driver or peer does; `None`: the input is at its end.
    fn act(&mut self, input: &mut Input<'_>, sink: &mut [u8]) -> Option<()> {
        let what = input.byte()?;
        let [ring, ..] = &mut self.rings;
        let ring = match what >> 4 & 3 {
            0 => ring,
            n => self.rings.get_mut(usize::from(n).saturating_sub(1))?,
        };
        match what & 7 {
            0 => {
                let [index, at, flags, next] = input.take()?;
                let len = u16::from_le_bytes(input.take()?);
                // One bit takes it out of RAM.
                let far = u64::from(what & 0x80) << 32;
                let at = BUFFERS.saturating_add(u64::from(at) << 8).saturating_add(far);
                ring.set_descriptor(
                    u16::from(index) % RING,
                    at,
                    len.into(),
                    u16::from(flags & 7),
                    u16::from(next & 15),
                );
            }
            1 => ring.publish(u16::from(input.byte()? & 15)),
            2 => ring.set_available_index(u16::from_le_bytes(input.take()?)),
            3 => {
                let at = BUFFERS.saturating_add(u64::from(input.byte()?) << 8);
                let bytes = input.bytes()?;
                self.driver.memory().write_slice(bytes, GuestAddress(at)).ok()?;
            }
            4 => {
                // A frame of the peer's, honest about its length or not.
                let bytes = input.bytes()?;
                let said = (bytes.len() as u32) ^ u32::from(what >> 6 == 3);
                let _ = self.peer.write_all(&said.to_be_bytes());
                let _ = self.peer.write_all(bytes);
            }
            5 => drop(self.peer.write_all(input.bytes()?)),
            6 => drop(self.peer.read(sink)),
            _ => {
                self.backend.event(0, EventSet::IN | EventSet::OUT);
                if self.worker.serve(&mut self.backend).and(self.control.serve()).is_err() {
                    return None;
                }
            }
        }
        Some(())
    }
}

/// A card with one pair and a control queue.
pub fn fuzz_net(data: &[u8]) {
    let mut input = Input(data);
    let Some(features) = input.take().map(u32::from_le_bytes) else { return };
    let Some(mut scene) = Scene::new(features.into()) else { return };
    let mut sink = vec![0; 0x1_0000];
    while scene.act(&mut input, &mut sink).is_some() {}
    let _ = scene.worker.serve(&mut scene.backend).and(scene.control.serve());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn play(seed: &[u8]) -> Scene {
        let (features, rest) = seed.split_first_chunk().unwrap();
        let mut scene = Scene::new(u32::from_le_bytes(*features).into()).unwrap();
        let mut input = Input(rest);
        while scene.act(&mut input, &mut []).is_some() {}
        scene
    }

    #[test]
    fn the_seeds_reach_what_they_are_for() {
        let mut sent = play(include_bytes!("../../../../fuzz_corpus/devices/virtio_net/tso"));
        let mut bytes = vec![0; 1000];
        // Three segments of 50, 50 and 20 bytes, with headers and lengths.
        assert_eq!(sent.peer.read(&mut bytes).unwrap(), 3 * (4 + 54) + 120);
        assert!(sent.rings[1].take_used().is_some());
        let mut merged =
            play(include_bytes!("../../../../fuzz_corpus/devices/virtio_net/rx_merge"));
        let used = std::iter::from_fn(|| merged.rings[0].take_used()).count();
        assert_eq!(used, (12 + 54 + 120_usize).div_ceil(40));
        let mut whole = play(include_bytes!("../../../../fuzz_corpus/devices/virtio_net/merge"));
        assert_eq!(whole.rings[0].take_used(), Some((0, 12 + 54 + 240)));
        let mut told = play(include_bytes!("../../../../fuzz_corpus/devices/virtio_net/control"));
        assert_eq!(std::iter::from_fn(|| told.rings[2].take_used()).count(), 2);
    }
}
