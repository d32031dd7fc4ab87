//! The control queue, and several queue pairs.

use std::time::Duration;

use super::super::feature;
use super::super::packet::tests::frame;
use super::super::packet::{IpVersion, TCP};
use super::guest::{MAC, card, get, put};
use crate::devices::virtio::testing::{Part, Ring, TestDriver};
use crate::devices::virtio::{ActivateError, VirtioDevice};

const CONTROL: u64 = feature::CTRL_VQ
    | feature::CTRL_RX
    | feature::CTRL_RX_EXTRA
    | feature::CTRL_MAC_ADDR
    | feature::MQ;

fn command(control: &mut Ring, bytes: &[u8]) -> u8 {
    let (head, data) = bytes.split_at(2);
    let parts = [Part::Read(head), Part::Read(data), Part::Write(1)];
    let offered = control.offer(&parts);
    control.notify();
    assert_eq!(control.wait_used(), (offered.head, 1));
    control.answer(&offered)[0]
}

fn received(ring: &mut Ring, offered: &crate::devices::virtio::testing::Offered) -> Vec<u8> {
    let (head, len) = ring.wait_used();
    assert_eq!(head, offered.head);
    ring.answer(offered)[12..len as usize].to_vec()
}

fn to(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = mac.to_vec();
    frame.resize(60, mac[5]);
    frame
}

#[test]
fn the_driver_chooses_what_it_receives_and_who_it_is() {
    let (mut net, mut peer) = card(1);
    let driver = TestDriver::new(CONTROL & !feature::MQ);
    let ((mut rx, q0), (_tx, q1), (mut control, q2)) =
        (driver.ring(0, 64), driver.ring(1, 64), driver.ring(2, 64));
    net.activate(driver.activation(vec![q0, q1, q2])).unwrap();
    let (other, group) = ([2, 0, 0, 0, 0, 9], [1, 0, 0, 0, 0, 7]);
    let mut expect = |peer: &mut _, frames: &[[u8; 6]], passes: &[bool]| {
        for mac in frames {
            put(peer, &to(*mac));
        }
        // A broadcast ends each round.
        put(peer, &to([0xff; 6]));
        let wanted = frames.iter().zip(passes).filter(|(_, passes)| **passes);
        let wanted: Vec<_> = wanted.map(|(mac, _)| *mac).chain([[0xff; 6]]).collect();
        for mac in wanted {
            let offered = rx.offer(&[Part::Write(1600)]);
            rx.notify();
            assert_eq!(received(&mut rx, &offered), to(mac));
        }
    };
    let all = [MAC.0, other, group];
    expect(&mut peer, &all, &[true; 3]);
    assert_eq!(command(&mut control, &[0, 0, 0]), 0);
    expect(&mut peer, &all, &[true, false, false]);
    let table = [&[1, 0, 1, 0, 0, 0][..], &other, &[1, 0, 0, 0], &group].concat();
    assert_eq!(command(&mut control, &table), 0);
    expect(&mut peer, &all, &[true; 3]);
    assert_eq!(command(&mut control, &[0, 3, 1]), 0);
    expect(&mut peer, &all, &[true, true, false]);
    assert_eq!(command(&mut control, &[&[1, 1][..], &[2, 0, 0, 0, 0, 5]].concat()), 0);
    expect(&mut peer, &all, &[false, true, false]);
    let mut config = [0; 6];
    net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 5]);
    // What is no command is refused and changes nothing.
    for bad in [
        &[0, 0][..],
        &[0, 0, 2],
        &[0, 6, 1],
        &[1, 1, 1, 0, 0, 0, 0, 5],
        &[1, 1, 2, 0],
        &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        &[1, 0, 0, 0, 0, 0],
        &[4, 0, 1, 0],
        &[9, 9, 9],
    ] {
        assert_eq!(command(&mut control, bad), 1, "{bad:?}");
    }
    expect(&mut peer, &all, &[false, true, false]);
    net.reset();
    net.read_config(0, &mut config);
    assert_eq!(config, MAC.0);
}

#[test]
fn a_command_without_room_for_an_answer_needs_a_reset() {
    for parts in [&[Part::Read(&[0, 0, 0])][..], &[Part::Read(&[0]), Part::Write(1)]] {
        let (mut net, _peer) = card(1);
        let driver = TestDriver::new(CONTROL & !feature::MQ);
        let ((_rx, q0), (_tx, q1), (mut control, q2)) =
            (driver.ring(0, 64), driver.ring(1, 64), driver.ring(2, 64));
        net.activate(driver.activation(vec![q0, q1, q2])).unwrap();
        control.offer(parts);
        control.notify();
        driver.signal.wait(|signals| signals.needs_reset);
    }
}

#[test]
fn answers_come_to_the_pair_that_asked() {
    let (mut net, mut peer) = card(2);
    let driver = TestDriver::new(CONTROL);
    let mut rings = Vec::new();
    let mut queues = Vec::new();
    for index in 0..5 {
        let (ring, queue) = driver.ring(index, 64);
        rings.push(ring);
        queues.push(queue);
    }
    net.activate(driver.activation(queues)).unwrap();
    let there = frame(IpVersion::V4, 0, TCP, (1000, 80), b"?");
    let mut back = frame(IpVersion::V4, 0, TCP, (80, 1000), b"!");
    back[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
    for pairs in [0_u16, 3, 0xffff] {
        let [low, high] = pairs.to_le_bytes();
        assert_eq!(command(&mut rings[4], &[4, 0, low, high]), 1);
    }
    let offered = [rings[0].offer(&[Part::Write(1600)]), rings[2].offer(&[Part::Write(1600)])];
    rings[3].offer(&[Part::Read(&[0; 12]), Part::Read(&there)]);
    rings[3].notify();
    assert_eq!(get(&mut peer), there);
    // The second pair is not in use yet.
    put(&mut peer, &back);
    rings[0].notify();
    assert_eq!(received(&mut rings[0], &offered[0]), back);
    assert_eq!(command(&mut rings[4], &[4, 0, 2, 0]), 0);
    put(&mut peer, &back);
    assert_eq!(received(&mut rings[2], &offered[1]), back);
    std::thread::sleep(Duration::from_millis(5));
    assert!(rings[0].take_used().is_none());
}

#[test]
fn a_driver_without_the_first_pair_is_refused() {
    let (mut net, _peer) = card(1);
    let driver = TestDriver::new(0);
    let (_rx, queue) = driver.ring(0, 64);
    let error = net.activate(driver.activation(vec![queue])).unwrap_err();
    assert!(matches!(error, ActivateError::MissingQueue(1)));
    let error = net.activate(driver.activation(vec![])).unwrap_err();
    assert!(matches!(error, ActivateError::MissingQueue(0)));
}
