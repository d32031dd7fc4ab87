//! A guest with a network card, and the peer at the other end of its cable.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::super::backends::passt::PasstBackend;
use super::super::header::{HEADER_LEN, Header};
use super::super::{MacAddress, Net, feature};
use crate::devices::virtio::testing::{Ring, TestDriver, WRITE};
use crate::devices::virtio::{IoThreads, VirtioDevice};

pub(super) const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
pub(super) const OFFLOADS: u64 = feature::CSUM
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::MRG_RXBUF
    | feature::GUEST_CSUM;

/// Buffers in a ring.
pub(super) const RING: u16 = 64;
const TX_SLOT: u64 = 66_000;
const TX_SLOTS: u16 = 32;

pub(super) struct Guest {
    pub driver: TestDriver,
    pub net: Net,
    pub rx: Ring,
    pub tx: Ring,
    rx_buffers: Vec<(u64, u32)>,
    tx_slots: Vec<u64>,
    free: VecDeque<u16>,
}

pub(super) fn io() -> Arc<IoThreads> {
    IoThreads::start(2).unwrap()
}

/// A card on one end of a socket.
pub(super) fn card(pairs: u16) -> (Net, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let backend = PasstBackend::over(ours).unwrap();
    (Net::new(vec![Box::new(backend)], MAC, io(), pairs), theirs)
}

impl Guest {
    /// Activates `net` with one pair and no control queue.
    pub(super) fn new(mut net: Net, features: u64) -> Self {
        let driver = TestDriver::new(features);
        let ((mut tx, tx_queue), (rx, rx_queue)) = (driver.ring(1, RING), driver.ring(0, RING));
        let tx_slots = (0..TX_SLOTS).map(|_| tx.buffer(TX_SLOT)).collect();
        net.activate(driver.activation(vec![rx_queue, tx_queue])).unwrap();
        let free = (0..TX_SLOTS).collect();
        Self { driver, net, rx, tx, rx_buffers: Vec::new(), tx_slots, free }
    }

    pub(super) fn over_socket(features: u64) -> (Self, UnixStream) {
        let (net, peer) = card(1);
        (Self::new(net, features), peer)
    }

    /// Resets the card and starts anew, with rings as fresh as after a reboot.
    pub(super) fn again(self, features: u64) -> Self {
        let mut net = self.net;
        net.reset();
        Self::new(net, features)
    }

    /// Gives the card `count` buffers of `len` bytes.
    pub(super) fn give(&mut self, count: u16, len: u32) {
        for _ in 0..count {
            let index = self.rx_buffers.len() as u16;
            let at = self.rx.buffer(len.into());
            self.rx_buffers.push((at, len));
            self.rx.set_descriptor(index, at, len, WRITE, 0);
            self.rx.publish(index);
        }
        self.rx.notify();
    }

    /// Puts a frame into the transmit queue and leaves it there.
    pub(super) fn offer(&mut self, header: &Header, frame: &[u8]) {
        while let Some((head, _)) = self.tx.take_used() {
            self.free.push_back(head);
        }
        let slot = self.free.pop_front().unwrap_or_else(|| self.tx.wait_used().0);
        let at = self.tx_slots[slot as usize];
        let memory = self.driver.memory();
        memory.write_slice(header.as_bytes(), GuestAddress(at)).unwrap();
        memory.write_slice(frame, GuestAddress(at + HEADER_LEN as u64)).unwrap();
        self.tx.set_descriptor(slot, at, (HEADER_LEN + frame.len()) as u32, 0, 0);
        self.tx.publish(slot);
        self.tx.notify();
    }

    /// Sends a frame and waits until the card has taken it.
    pub(super) fn send(&mut self, header: &Header, frame: &[u8]) {
        self.offer(header, frame);
        let (head, written) = self.tx.wait_used();
        assert_eq!(written, 0);
        self.free.push_back(head);
    }

    /// Takes a received frame if there is one, and gives its buffers back.
    pub(super) fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let first = self.rx.take_used()?;
        let memory = self.driver.memory();
        let mut all = Vec::new();
        let mut used = vec![first];
        let mut header = None;
        let mut n = 0;
        while let Some((head, written)) = used.get(n).copied() {
            let (at, len) = self.rx_buffers[head as usize];
            assert!(written <= len);
            let start = all.len();
            all.resize(start + written as usize, 0);
            memory.read_slice(&mut all[start..], GuestAddress(at)).unwrap();
            if n == 0 {
                let read = Header::read_from_prefix(&all).unwrap().0;
                for _ in 1..read.num_buffers.get() {
                    // All of a frame must be there at once.
                    used.push(self.rx.take_used().unwrap());
                }
                header = Some(read);
            }
            n += 1;
        }
        for (head, _) in &used {
            self.rx.publish(*head);
        }
        self.rx.notify();
        Some((header.unwrap(), all.split_off(HEADER_LEN)))
    }

    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        for _ in 0..200_000 {
            if let Some(frame) = self.poll() {
                return frame;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        panic!("nothing is received; {:?}", self.driver.signal.seen());
    }

    pub(super) fn link_is_up(&self) -> bool {
        let mut status = [0; 2];
        self.net.read_config(6, &mut status);
        status[0] & 1 != 0
    }

    pub(super) fn wait_link(&self, up: bool) {
        for _ in 0..200_000 {
            if self.link_is_up() == up {
                return;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        panic!("the link should be up: {up}");
    }
}

pub(super) fn put(peer: &mut impl Write, frame: &[u8]) {
    let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
    bytes.extend(frame);
    peer.write_all(&bytes).unwrap();
}

pub(super) fn get(peer: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    peer.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}
