//! Against the real thing: passt, and a tap interface, where this host has them.

use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use super::super::backends::tap::TapBackend;
use super::super::header::Header;
use super::super::packet::{TCP, Transport, word};
use super::super::{Net, NetConfig, NetError};
use super::guest::{Guest, MAC, OFFLOADS, RING, io};

fn guest(config: &str) -> Result<Guest, NetError> {
    let config: NetConfig = format!("{config},mac={MAC}").parse().unwrap();
    let mut guest = Guest::new(Net::open(&config, io(), 1)?, OFFLOADS);
    guest.give(RING, 4096);
    Ok(guest)
}

fn arp_request(target: [u8; 4]) -> Vec<u8> {
    let mut arp = [&[0xff; 6][..], &MAC.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC.0].concat();
    arp.extend([0; 4]);
    arp.extend([0; 6]);
    arp.extend(target);
    arp
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Says what is not tried here, past the test harness, which would keep it to itself.
fn skipped(why: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

#[test]
fn passt_answers_and_forwards() {
    let (tcp, udp) = (free_port(), free_port());
    let mut guest = match guest(&format!("user,fwd=tcp:{tcp}:22,fwd=udp:{udp}:53")) {
        Err(error @ NetError::PasstMissing) => return skipped(error),
        other => other.unwrap(),
    };
    assert!(guest.link_is_up());
    guest.send(&Header::default(), &arp_request([198, 51, 100, 1]));
    let reply = loop {
        let (_, frame) = guest.receive();
        if word(&frame, 12) == Some(0x0806) {
            break frame;
        }
    };
    assert_eq!((&reply[..6], word(&reply, 20)), (&MAC.0[..], Some(2)));
    assert_eq!(reply[28..32], [198, 51, 100, 1]);
    // A connection to the forwarded port knocks at the guest's.
    let _caller = TcpStream::connect(("127.0.0.1", tcp)).unwrap();
    let knock = loop {
        let (header, frame) = guest.receive();
        if frame.get(23) == Some(&TCP) && word(&frame, 12) == Some(0x0800) {
            assert!(Transport::find(&frame).unwrap().checksum_is_good());
            assert_eq!(header.flags, super::super::header::DATA_VALID);
            break frame;
        }
    };
    assert_eq!((word(&knock, 36), knock[47]), (Some(22), 2), "a SYN to port 22");
    let caller = UdpSocket::bind("127.0.0.1:0").unwrap();
    caller.send_to(b"question", ("127.0.0.1", udp)).unwrap();
    let question = loop {
        let (_, frame) = guest.receive();
        if frame.ends_with(b"question") {
            break frame;
        }
    };
    assert_eq!(word(&question, 36), Some(53));
}

/// A tap interface of this test's own, if this host lets us have one.
fn tap(name: &str, queues: u16) -> Option<Vec<TapBackend>> {
    match TapBackend::open(name, queues) {
        Ok(all) => Some(all),
        Err(NetError::Tap { error, operation, .. })
            if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOENT | libc::EACCES)) =>
        {
            skipped(format_args!("no tap interface for this user ({operation}: {error})"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|status| status.success())
}

#[test]
fn a_tap_interface_carries_pings() {
    const NAME: &str = "lgtest0";
    let Some(queues) = tap(NAME, 1) else { return };
    if !(ip(&format!("addr add 10.99.77.1/24 dev {NAME}")) && ip(&format!("link set {NAME} up"))) {
        return skipped(format_args!("ip cannot set up {NAME}: apt install iproute2"));
    }
    let backends = queues.into_iter().map(|queue| Box::new(queue) as Box<_>).collect();
    let mut guest = Guest::new(Net::new(backends, MAC, io(), 1), OFFLOADS);
    guest.give(RING, 4096);
    guest.send(&Header::default(), &arp_request([10, 99, 77, 1]));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(Instant::now() < deadline, "the host does not answer");
        let (_, frame) = guest.receive();
        if word(&frame, 12) == Some(0x0806) && word(&frame, 20) == Some(2) {
            assert_eq!(frame[28..32], [10, 99, 77, 1]);
            break;
        }
    }
}

#[test]
fn a_tap_interface_has_as_many_queues_as_asked_for() {
    let Some(queues) = tap("lgtest1", 4) else { return };
    assert_eq!(queues.len(), 4);
    // Who comes later finds it busy.
    let error = TapBackend::open("lo", 1).unwrap_err().to_string();
    assert!(error.contains("--net tap=lo") && error.contains("ip "), "{error}");
}
