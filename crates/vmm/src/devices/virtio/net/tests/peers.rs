//! `unix=PATH`: cards joined to each other and to programs.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use super::super::header::{DATA_VALID, Header};
use super::super::packet::tests::frame;
use super::super::packet::{IpVersion, UDP};
use super::super::segment::tests::offload;
use super::super::{Net, NetConfig};
use super::guest::{Guest, OFFLOADS, RING, get, io, put};
use crate::devices::virtio::feature::EVENT_IDX;

/// A path that nobody else has, in a folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("lguest-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("lan")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn open(path: &Path) -> Result<Net, super::super::NetError> {
    let config: NetConfig = format!("unix={}", path.display()).parse().unwrap();
    Net::open(&config, io(), 1)
}

fn guest(path: &Path) -> Guest {
    let mut guest = Guest::new(open(path).unwrap(), OFFLOADS | EVENT_IDX);
    guest.give(RING, 4096);
    guest
}

/// Sends `count` numbered frames, some for segmentation, while receiving as many.
fn exchange(guest: &mut Guest, count: u32) {
    let mut next = [0_u32; 2];
    while next != [count; 2] {
        if next[0] < count {
            let n = next[0];
            let len = 4 + (n as usize * 37) % 1400;
            let mut payload = n.to_be_bytes().to_vec();
            payload.resize(len, n as u8);
            let version = if n % 2 == 0 { IpVersion::V4 } else { IpVersion::V6 };
            let mut bytes = frame(version, 0, UDP, (1, 2), &payload);
            let header = offload(&mut bytes, UDP, 0);
            guest.offer(&header, &bytes);
            next[0] += 1;
        }
        while next[1] < count
            && let Some((header, bytes)) = guest.poll()
        {
            let n = next[1];
            assert_eq!(header.flags, DATA_VALID);
            let payload = &bytes[bytes.len() - (4 + (n as usize * 37) % 1400)..];
            assert_eq!(payload[..4], n.to_be_bytes());
            assert!(payload[4..].iter().all(|byte| *byte == n as u8));
            next[1] += 1;
        }
    }
}

#[test]
fn two_guests_exchange_ten_thousand_frames_both_ways() {
    let folder = Folder::new("two");
    let path = folder.socket();
    let mut first = guest(&path);
    assert!(!first.link_is_up());
    let there = path.clone();
    let (done, both) = channel();
    let second = std::thread::spawn(move || {
        let mut second = guest(&there);
        assert!(second.link_is_up());
        exchange(&mut second, 10_000);
        done.send(()).unwrap();
        second
    });
    first.driver.signal.wait(|signals| signals.config_changes == 1);
    assert!(first.link_is_up());
    exchange(&mut first, 10_000);
    both.recv().unwrap();
    drop(second.join().unwrap());
    // The second is gone; a third may come.
    first.wait_link(false);
    let mut third = guest(&path);
    first.wait_link(true);
    third.send(&Header::default(), &[7; 60]);
    assert_eq!(first.receive().1, [7; 60]);
    // The first is gone; who is left listens for the next.
    first.send(&Header::default(), &[8; 60]);
    assert_eq!(third.receive().1, [8; 60]);
    drop(first);
    third.wait_link(false);
    let mut fourth = guest(&path);
    third.wait_link(true);
    fourth.send(&Header::default(), &[9; 60]);
    assert_eq!(third.receive().1, [9; 60]);
    drop(third);
    drop(fourth);
    assert!(!path.exists(), "whoever listens removes the socket");
}

#[test]
fn a_listener_has_one_peer_and_turns_others_away() {
    let folder = Folder::new("one");
    let mut guest = guest(&folder.socket());
    let mut peer = UnixStream::connect(folder.socket()).unwrap();
    put(&mut peer, &[1; 60]);
    assert_eq!(guest.receive().1, [1; 60]);
    let mut other = UnixStream::connect(folder.socket()).unwrap();
    assert_eq!(std::io::Read::read(&mut other, &mut [0]).unwrap(), 0);
    guest.send(&Header::default(), &[2; 60]);
    assert_eq!(get(&mut peer), [2; 60]);
}

#[test]
fn who_comes_when_another_leaves_is_served() {
    let folder = Folder::new("next");
    let mut guest = guest(&folder.socket());
    for n in 0..100 {
        let mut peer = UnixStream::connect(folder.socket()).unwrap();
        put(&mut peer, &[n; 60]);
        while guest.receive().1 != [n; 60] {}
        // It leaves, with something half said.
        std::io::Write::write_all(&mut peer, &[0, 0]).unwrap();
    }
}

#[test]
fn a_peer_that_goes_while_the_queue_is_full_frees_it() {
    let folder = Folder::new("full");
    let mut guest = guest(&folder.socket());
    for _ in 0..3 {
        let peer = UnixStream::connect(folder.socket()).unwrap();
        guest.wait_link(true);
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
}

#[test]
fn a_program_may_listen_and_a_peer_that_says_nothing_is_not_called_again() {
    let folder = Folder::new("program");
    let listener = UnixListener::bind(folder.socket()).unwrap();
    let mut guest = guest(&folder.socket());
    let (mut peer, _) = listener.accept().unwrap();
    guest.send(&Header::default(), &[2; 60]);
    assert_eq!(get(&mut peer), [2; 60]);
    drop(peer);
    guest.wait_link(false);
    listener.set_nonblocking(true).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(listener.accept().is_err());
    drop(guest);
    assert!(folder.socket().exists(), "it is the program's");
}

#[test]
fn a_socket_left_behind_is_replaced_and_anything_else_is_not() {
    let folder = Folder::new("stale");
    drop(UnixListener::bind(folder.socket()).unwrap());
    assert!(folder.socket().exists());
    drop(open(&folder.socket()).unwrap());
    assert!(!folder.socket().exists());
    fs::write(folder.socket(), "a file of the user's").unwrap();
    let error = open(&folder.socket()).unwrap_err().to_string();
    assert!(error.contains("lan") && error.contains("give another path"), "{error}");
    assert_eq!(fs::read(folder.socket()).unwrap(), b"a file of the user's");
    let error = open(&folder.0.join("no/lan")).unwrap_err().to_string();
    assert!(error.contains("give a folder"), "{error}");
}

#[test]
fn of_many_that_start_together_one_listens() {
    let folder = Folder::new("race");
    for _ in 0..20 {
        let path = folder.socket();
        let starts: Vec<_> = (0..2)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || guest(&path))
            })
            .collect();
        let guests: Vec<_> = starts.into_iter().map(|start| start.join().unwrap()).collect();
        guests.iter().for_each(|guest| guest.wait_link(true));
        drop(guests);
        assert!(!path.exists());
    }
}
