//! Frames there and back again.

use vm_memory::{Bytes, GuestAddress};

use super::super::header::{DATA_VALID, Header};
use super::super::packet::tests::frame;
use super::super::packet::{IpVersion, TCP, Transport, UDP};
use super::super::segment::Segments;
use super::super::segment::tests::offload;
use super::super::{Net, feature};
use super::guest::{Guest, OFFLOADS, RING, get, put};
use crate::devices::virtio::feature::EVENT_IDX;
use crate::devices::virtio::testing::{Part, TestDriver, WRITE};
use crate::devices::virtio::{DeviceKind, VirtioDevice};

#[test]
fn the_configuration_space_says_what_the_card_is() {
    let (net, _peer) = super::guest::card(4);
    assert_eq!((net.kind(), net.queue_sizes().len()), (DeviceKind::Net, 9));
    let mut config = [0; 14];
    net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 2, 1, 0, 4, 0, 0xf0, 0xff, 0, 0]);
    assert_eq!(net.features() & feature::MQ, feature::MQ);
    assert_eq!(super::guest::card(1).0.features() & feature::MQ, 0);
}

#[test]
fn frames_leave_as_they_are_or_with_their_checksum_filled_in() {
    for events in [0, EVENT_IDX] {
        let (mut guest, mut peer) = Guest::over_socket(OFFLOADS | events);
        let datagram = frame(IpVersion::V4, 0, UDP, (1, 2), b"hello");
        guest.send(&Header::default(), &datagram);
        assert_eq!(get(&mut peer), datagram);
        let mut unfinished = datagram.clone();
        let header = offload(&mut unfinished, UDP, 0);
        guest.send(&header, &unfinished);
        assert_eq!(get(&mut peer), datagram);
        // A runt goes nowhere, but its buffer comes back.
        guest.send(&Header::default(), &[1; 13]);
        guest.send(&Header::default(), &datagram);
        assert_eq!(get(&mut peer), datagram);
        assert!(!guest.driver.signal.seen().needs_reset);
    }
}

#[test]
fn a_frame_may_be_in_many_pieces() {
    let (mut guest, mut peer) = Guest::over_socket(OFFLOADS);
    let datagram = frame(IpVersion::V6, 1, UDP, (1, 2), &[7; 1000]);
    let header = [0; 12];
    let (a, b) = datagram.split_at(3);
    guest.tx.offer(&[
        Part::Read(&header[..5]),
        Part::Read(&[&header[5..], a].concat()),
        Part::Read(b),
    ]);
    guest.tx.notify();
    assert_eq!(get(&mut peer), datagram);
}

#[test]
fn drivers_from_before_virtio_1_have_a_header_without_a_count() {
    let (mut net, mut peer) = super::guest::card(1);
    let driver = TestDriver::new(0);
    let ((mut tx, tx_queue), (mut rx, rx_queue)) = (driver.ring(1, RING), driver.ring(0, RING));
    let mut activation = driver.activation(vec![rx_queue, tx_queue]);
    activation.features = feature::CSUM;
    net.activate(activation).unwrap();
    let datagram = frame(IpVersion::V4, 0, UDP, (1, 2), b"hello");
    tx.offer(&[Part::Read(&[0; 10]), Part::Read(&datagram)]);
    tx.notify();
    assert_eq!(get(&mut peer), datagram);
    let at = rx.buffer(2000);
    rx.set_descriptor(0, at, 2000, WRITE, 0);
    rx.publish(0);
    rx.notify();
    put(&mut peer, &datagram);
    let (_, written) = rx.wait_used();
    let mut bytes = vec![0; written as usize];
    driver.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
    assert_eq!(bytes[10..], datagram[..]);
}

#[test]
fn large_segments_arrive_as_many_small_ones() {
    let (mut guest, mut peer) = Guest::over_socket(OFFLOADS);
    for version in [IpVersion::V4, IpVersion::V6] {
        let payload: Vec<u8> = (0..60_000_u32).map(|n| ((n * 7) >> 3) as u8).collect();
        let mut large = frame(version, 0, TCP, (1, 2), &payload);
        let header = offload(&mut large, TCP, 1448);
        guest.send(&header, &large);
        let headers = large.len() - payload.len();
        let mut whole: Vec<u8> = Vec::new();
        while whole.len() < payload.len() {
            let segment = get(&mut peer);
            assert!(segment.len() <= 1448 + headers);
            assert!(Transport::find(&segment).unwrap().checksum_is_good());
            whole.extend(&segment[headers..]);
        }
        assert_eq!(whole, payload);
    }
}

#[test]
fn frames_arrive_and_say_whether_their_checksum_is_good() {
    let (mut guest, mut peer) = Guest::over_socket(OFFLOADS);
    guest.give(8, 2048);
    let good = frame(IpVersion::V4, 0, TCP, (1, 2), b"hello");
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    for (sent, flags) in [(&good, DATA_VALID), (&bad, 0)] {
        put(&mut peer, sent);
        let (header, received) = guest.receive();
        assert_eq!((header.flags, header.num_buffers.get()), (flags, 1));
        assert_eq!(&received, sent);
    }
    guest.driver.signal.wait(|signals| signals.used.contains(&0));
    // A driver that did not ask for it is told nothing.
    let mut guest = guest.again(0);
    guest.give(8, 2048);
    put(&mut peer, &good);
    let (header, received) = guest.receive();
    assert_eq!((header.flags, header.num_buffers.get(), received), (0, 1, good));
}

#[test]
fn segments_arrive_as_one_if_the_driver_takes_large_ones() {
    let large_ones = feature::GUEST_TSO4 | feature::GUEST_TSO6;
    let (mut guest, mut peer) = Guest::over_socket(OFFLOADS | large_ones);
    let payload = [7; 14_000];
    let mut large = frame(IpVersion::V6, 0, TCP, (1, 2), &payload);
    let header = offload(&mut large, TCP, 1400);
    let mut all = Vec::new();
    let segments = Segments::new(&header, &large).unwrap().unwrap();
    segments.write(&mut all, |all, len| all.extend((len as u32).to_be_bytes())).unwrap();
    let small = frame(IpVersion::V6, 0, UDP, (1, 2), b"hello");
    for _ in 0..5 {
        peer_write(&mut peer, &all);
        put(&mut peer, &small);
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    guest.give(RING, 1500);
    for _ in 0..5 {
        let (told, received) = guest.receive();
        assert_eq!((told.flags, told.gso_size, received), (1, header.gso_size, large.clone()));
        assert_eq!((told.num_buffers.get(), told.gso_type), (10, 4));
        assert_eq!(guest.receive().1, small);
    }
}

#[test]
fn a_large_frame_stretches_over_buffers_if_the_driver_can_merge_them() {
    let (mut guest, mut peer) = Guest::over_socket(OFFLOADS);
    guest.give(RING, 1500);
    let large = frame(IpVersion::V6, 0, TCP, (1, 2), &[3; 65_000]);
    let small = frame(IpVersion::V6, 0, TCP, (1, 2), &[4; 10]);
    for _ in 0..20 {
        put(&mut peer, &large);
        put(&mut peer, &small);
        let (header, received) = guest.receive();
        assert_eq!((header.num_buffers.get(), received), (44, large.clone()));
        assert_eq!(guest.receive().1, small);
    }
    let mut guest = guest.again(0);
    guest.give(4, 1500);
    put(&mut peer, &large);
    put(&mut peer, &small);
    assert_eq!(guest.receive().1, small, "the large one fits nowhere and is dropped");
}

#[test]
fn frames_wait_for_buffers_and_come_in_order() {
    for events in [0, EVENT_IDX] {
        let (mut guest, mut peer) = Guest::over_socket(feature::MRG_RXBUF | events);
        for n in 0..100_u8 {
            put(&mut peer, &[n; 200]);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(guest.poll().is_none());
        // Three buffers of this size for each frame, and at first only two of them.
        guest.give(2, 100);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(guest.poll().is_none());
        guest.give(2, 100);
        for n in 0..100 {
            assert_eq!(guest.receive().1, [n; 200]);
        }
        assert!(!guest.driver.signal.seen().needs_reset);
    }
}

#[test]
fn frames_wait_for_a_peer_that_is_slow() {
    let (mut guest, mut peer) = Guest::over_socket(0);
    let reader = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        for n in 0..500_u32 {
            assert_eq!(get(&mut peer), vec![n as u8; 9000]);
        }
        peer
    });
    // 4.5 MB: more than a socket and our buffer hold, so that the queue fills up.
    for n in 0..500_u32 {
        guest.offer(&Header::default(), &[n as u8; 9000]);
    }
    drop(reader.join().unwrap());
}

#[test]
fn a_reset_leaves_the_stream_in_step() {
    let (mut guest, mut peer) = Guest::over_socket(0);
    // Half a frame has come in, and of what goes out some is half written.
    peer_write(&mut peer, &[0, 0, 0, 100, 1, 1]);
    for _ in 0..31 {
        guest.offer(&Header::default(), &[5; 60_000]);
    }
    std::thread::sleep(std::time::Duration::from_millis(50));
    let mut guest = guest.again(0);
    guest.give(1, 2048);
    let reader = std::thread::spawn(move || {
        loop {
            let frame = get(&mut peer);
            match frame.len() {
                60_000 => assert_eq!(frame, vec![5; 60_000]),
                len => break assert_eq!((len, frame[0]), (70, 6)),
            }
        }
        peer_write(&mut peer, &[1; 98]);
        peer
    });
    guest.send(&Header::default(), &[6; 70]);
    assert_eq!(guest.receive().1, [1; 100]);
    drop(reader.join().unwrap());
}

fn peer_write(peer: &mut std::os::unix::net::UnixStream, bytes: &[u8]) {
    std::io::Write::write_all(peer, bytes).unwrap();
}

#[test]
fn a_card_that_was_reset_is_quiet_and_can_start_again() {
    let (guest, mut peer) = Guest::over_socket(0);
    let mut net: Net = guest.net;
    for _ in 0..3 {
        net.reset();
        let mut guest = Guest::new(net, EVENT_IDX);
        guest.give(2, 2000);
        put(&mut peer, &[9; 60]);
        assert_eq!(guest.receive().1, [9; 60]);
        guest.send(&Header::default(), &[8; 60]);
        assert_eq!(get(&mut peer), [8; 60]);
        net = guest.net;
    }
}
