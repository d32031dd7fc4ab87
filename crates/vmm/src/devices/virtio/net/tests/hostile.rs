//! Drivers and peers that break the rules.

use std::io::Write;

use super::super::backends::MAX_FRAME;
use super::super::feature;
use super::super::header::Header;
use super::guest::{Guest, OFFLOADS, card, get, put};
use crate::devices::virtio::testing::{NEXT, Part, WRITE};
use crate::devices::virtio::{VirtioDevice, hostile};

/// The driver does something wrong, is told to reset the card, and with that all is well.
fn breaks(features: u64, wrong: impl FnOnce(&mut Guest)) {
    let (mut guest, mut peer) = Guest::over_socket(features);
    wrong(&mut guest);
    guest.rx.notify();
    guest.tx.notify();
    put(&mut peer, &[1; 60]);
    guest.driver.signal.wait(|signals| signals.needs_reset);
    // Until then nothing more happens.
    let used = guest.driver.signal.seen().used.len();
    guest.tx.notify();
    guest.rx.notify();
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(guest.driver.signal.seen().used.len(), used);
    let mut guest = guest.again(features);
    guest.send(&Header::default(), &[2; 60]);
    assert_eq!(get(&mut peer), [2; 60]);
    assert!(!guest.driver.signal.seen().needs_reset);
}

#[test]
fn requests_that_make_no_sense_need_a_reset() {
    breaks(0, |guest| drop(guest.tx.offer(&[Part::Read(&[0; 11])])));
    breaks(0, |guest| drop(guest.tx.offer(&[Part::Read(&[0; 100]), Part::Write(4)])));
    breaks(0, |guest| {
        drop(guest.tx.offer(&[Part::Read(&[0; 12]), Part::Read(&vec![0; MAX_FRAME + 1])]));
    });
    breaks(0, |guest| drop(guest.rx.offer(&[Part::Write(11)])));
    breaks(0, |guest| drop(guest.rx.offer(&[Part::Read(&[0; 20]), Part::Write(2000)])));
    breaks(feature::MRG_RXBUF, |guest| drop(guest.rx.offer(&[Part::Write(0)])));
    breaks(0, |guest| guest.tx.set_available_index(999));
    breaks(0, |guest| guest.rx.set_available_index(999));
    breaks(0, |guest| {
        guest.tx.set_descriptor(0, 0x1000, 60, NEXT, 0);
        guest.tx.publish(0);
    });
    breaks(0, |guest| {
        guest.rx.set_descriptor(0, u64::MAX - 5, 2000, WRITE, 0);
        guest.rx.publish(0);
    });
}

#[test]
fn rings_on_each_other_hang_nothing() {
    let (mut net, peer) = card(1);
    let samples = [(0, Part::Write(2000)), (1, Part::Read(&[0; 72]))];
    let stir = || put(&mut &peer, &[1; 60]);
    for at in [0, 1] {
        hostile::overlapping_rings(&mut net, &samples, at, &stir);
    }
    let (mut guest, mut peer) = (Guest::new(net, 0), peer);
    guest.give(4, 2000);
    put(&mut peer, &[7; 60]);
    while guest.receive().1 != [7; 60] {}
}

#[test]
fn offloads_that_were_not_agreed_on_need_a_reset() {
    let ask = |flags: u8, gso: u8| {
        let mut request = vec![flags, gso];
        request.resize(100, 0);
        request
    };
    for (features, request) in [
        (0, ask(1, 0)),
        (feature::CSUM | feature::HOST_TSO4, ask(1, 4)),
        (feature::CSUM, ask(1, 1)),
        (OFFLOADS, ask(1, 1 | 0x80)),
        (u64::MAX >> 8 & OFFLOADS, ask(1, 5)),
    ] {
        breaks(features, |guest| drop(guest.tx.offer(&[Part::Read(&request)])));
    }
}

#[test]
fn offloads_that_do_not_fit_the_frame_cost_only_the_frame() {
    let (mut guest, mut peer) = Guest::over_socket(OFFLOADS);
    let base = Header { flags: 1, ..Header::default() };
    let senseless = [
        Header { csum_start: 0xffff.into(), ..base },
        Header { csum_offset: 0xffff.into(), ..base },
        Header { gso_type: 1, gso_size: 1.into(), ..base },
        Header { gso_type: 1, gso_size: 1000.into(), csum_start: 34.into(), ..base },
        Header { gso_type: 4, gso_size: 1000.into(), csum_start: 54.into(), ..base },
        Header { gso_type: 1, gso_size: 1000.into(), flags: 0, ..base },
    ];
    for header in senseless {
        guest.send(&header, &[3; 60]);
    }
    guest.send(&Header::default(), &[4; 60]);
    assert_eq!(get(&mut peer), [4; 60]);
    assert!(!guest.driver.signal.seen().needs_reset);
}

#[test]
fn runts_from_a_peer_are_ignored() {
    let (mut guest, mut peer) = Guest::over_socket(0);
    guest.give(4, 2000);
    for len in [0, 1, 13] {
        put(&mut peer, &vec![1; len]);
    }
    put(&mut peer, &[2; 14]);
    assert_eq!(guest.receive().1, [2; 14]);
    put(&mut peer, &[2; MAX_FRAME]);
    put(&mut peer, &[3; 14]);
    assert_eq!(guest.receive().1, [3; 14]);
    assert!(guest.link_is_up());
}

/// The peer does something, and the card is unplugged; the guest goes on.
fn unplugs(
    act: impl FnOnce(std::os::unix::net::UnixStream) -> Option<std::os::unix::net::UnixStream>,
) {
    let (mut guest, mut peer) = Guest::over_socket(0);
    guest.give(4, 2000);
    put(&mut peer, &[1; 60]);
    assert_eq!(guest.receive().1, [1; 60]);
    let peer = act(peer);
    guest.wait_link(false);
    guest.driver.signal.wait(|signals| signals.config_changes == 1);
    for _ in 0..100 {
        guest.send(&Header::default(), &[2; 1514]);
    }
    assert!(!guest.driver.signal.seen().needs_reset);
    // It stays so over a reset.
    let mut guest = guest.again(0);
    assert!(!guest.link_is_up());
    guest.send(&Header::default(), &[2; 1514]);
    guest.net.reset();
    drop(peer);
}

#[test]
fn peers_that_go_or_get_out_of_step_are_an_unplugged_cable() {
    unplugs(|_| None);
    unplugs(|mut peer| {
        peer.write_all(&[0, 0, 0, 60, 1, 2, 3]).unwrap();
        None
    });
    unplugs(|mut peer| {
        peer.write_all(&(MAX_FRAME as u32 + 1).to_be_bytes()).unwrap();
        Some(peer)
    });
    unplugs(|mut peer| {
        peer.write_all(&[0xff; 100]).unwrap();
        Some(peer)
    });
}

#[test]
fn a_peer_that_goes_while_the_queue_is_full_frees_it() {
    let (mut guest, peer) = Guest::over_socket(0);
    for _ in 0..31 {
        guest.offer(&Header::default(), &[2; 60_000]);
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    drop(peer);
    for _ in 0..40 {
        guest.offer(&Header::default(), &[2; 60_000]);
    }
    guest.wait_link(false);
}
