//! Networks of stock kernels: guests joined to each other, and to the host by passt.
//!
//! Nothing here needs a network beyond this host. passt must be on the PATH; `cargo verify`
//! fetches it where it is not installed.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};
use support::{Finished, Run, Running, disk, tiny};

const CLOUD: &str = "debian12-cloud";
/// What a guest sends.
const SENT: usize = 8 << 20;

/// What came is what the other one sent.
#[track_caller]
fn assert_same(received: &str, sent: &str) {
    assert!(received.starts_with(&format!("{SENT} bytes ")), "{received}");
    assert_eq!(received, sent);
}

fn assert_exchange(one: &Finished, other: &Finished) {
    assert_same(one.after("init: received "), other.after("init: sending "));
}

/// Pings, and a transfer each way, one after the other.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn two_guests_on_a_socket() {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("socket");
    let guest = |words: &str| {
        Run::with_modules(CLOUD, "net").append(words).option("--net", "unix=", &socket, "")
    };
    let one = guest("lguest.ip=10.9.0.1/24 lguest.receive=5000 lguest.send=10.9.0.2:5001")
        .arguments(&["--cpus", "2", "--io", "threads=2"])
        .start();
    one.wait_for("init: listening on 5000");
    let other = guest(
        "lguest.ip=10.9.0.2/24 lguest.ping=10.9.0.1 lguest.send=10.9.0.1:5000 lguest.receive=5001",
    )
    .finish();
    let one = one.finish();
    for mut guest in [one.clone(), other.clone()] {
        // One of them sees the other leave.
        if !guest.messages.is_empty() {
            guest.assert_one_line_of_log("the peer is gone, the link is down");
            guest.messages.clear();
        }
        guest.assert_good();
    }
    other.assert_console("3 packets received, 0% packet loss");
    assert_exchange(&one, &other);
    assert_exchange(&other, &one);
    assert!(!socket.exists(), "the socket stays behind");
}

#[track_caller]
fn require_passt() {
    let there = Command::new("passt").arg("--version").output();
    assert!(there.is_ok(), "passt is missing: apt install passt, or let cargo verify fetch it");
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// An address by DHCP, a transfer into the guest by a forwarded port, and one from it to a
/// server on the host, which it sees at its gateway's address.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn the_hosts_network_by_passt() {
    require_passt();
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let to_host = server.local_addr().unwrap().port();
    let served = thread::spawn(move || {
        let (mut connection, _) = server.accept().unwrap();
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let to_guest = free_port();
    let guest = Run::with_modules(CLOUD, "net")
        .append("lguest.ip=dhcp lguest.receive=5000")
        .append(&format!("lguest.send=gateway:{to_host}"))
        .arguments(&["--net", &format!("user,fwd=tcp:{to_guest}:5000")])
        .start();
    guest.wait_for("init: listening on 5000");
    let sent: Vec<u8> =
        (0..SENT as u32 / 4).flat_map(|n| n.wrapping_mul(n).to_le_bytes()).collect();
    send_when_listening(&guest, to_guest, &sent);
    let guest = guest.finish();
    guest.assert_good();
    guest.assert_console("lease of ");
    assert_same(guest.after("init: received "), &format!("{SENT} bytes {}", disk::checksum(&sent)));
    let received = served.join().unwrap();
    let received = format!("{} bytes {}", received.len(), disk::checksum(&received));
    assert_same(&received, guest.after("init: sending "));
}

/// Sends over a forwarded port. passt accepts a connection before the guest has; the guest
/// says that it is about to listen a moment before it does, so an attempt may be in vain.
fn send_when_listening(guest: &Running, port: u16, bytes: &[u8]) {
    let start = Instant::now();
    loop {
        let sent = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .and_then(|mut connection| connection.write_all(bytes));
        match sent {
            Ok(()) => return,
            Err(error) => assert!(
                start.elapsed() < Duration::from_secs(60),
                "{error}; the guest: {}",
                guest.console()
            ),
        }
        thread::sleep(Duration::from_millis(500));
    }
}

/// The children of a process that are passt.
fn passts_of(pid: u32) -> Vec<u32> {
    let is_one = |entry: fs::DirEntry| -> Option<u32> {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (head, tail) = stat.rsplit_once(')')?;
        let parent: u32 = tail.split_whitespace().nth(1)?.parse().ok()?;
        let (own, name) = head.split_once(" (")?;
        (parent == pid && name.starts_with("passt")).then(|| own.parse().ok())?
    };
    fs::read_dir("/proc").unwrap().filter_map(|entry| is_one(entry.ok()?)).collect()
}

/// passt has a socket of lguest's, and lguest's end of that goes with it, however it goes.
#[test]
#[ignore = "needs passt; run by cargo verify"]
fn a_kill_leaves_no_passt_behind() {
    require_passt();
    let place = tempfile::tempdir().unwrap();
    let kernel = tiny::kernel(place.path(), tiny::ECHO);
    let run = Run::bare().path("--kernel", &kernel).arguments(&["--mem", "32M", "--net", "user"]);
    let mut running = run.start_with(std::process::Stdio::piped());
    running.type_in(b"ready");
    running.wait_for("ready");
    let passts = passts_of(running.pid());
    assert_eq!(passts.len(), 1, "{passts:?}");
    running.kill();
    let start = Instant::now();
    let lives = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // One that nobody has waited for is gone all the same.
        stat.rsplit_once(')').is_some_and(|(_, tail)| !tail.trim_start().starts_with('Z'))
    };
    while passts.iter().any(lives) {
        assert!(start.elapsed() < Duration::from_secs(10), "passt {passts:?} is still there");
        thread::sleep(Duration::from_millis(20));
    }
}
