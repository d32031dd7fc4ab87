//! The console against drivers, honest and not.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::*;
use crate::devices::virtio::testing::{Part, Ring, TestDriver};
use crate::devices::virtio::{feature, hostile};

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A terminal that takes nothing until it is let go.
struct Stuck(Receiver<()>, Sink);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Once whoever holds the other end has dropped it, it is never stuck again.
        let _ = self.0.recv();
        self.1.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A reader that has gone.
struct Gone;

impl Write for Gone {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn console(output: impl Write + Send + 'static) -> Console {
    Console::new(IoThreads::start(1).unwrap(), Box::new(output)).unwrap()
}

fn stuck() -> (Console, Sender<()>, Sink) {
    let ((go, wait), sink) = (channel(), Sink::default());
    (console(Stuck(wait, sink.clone())), go, sink)
}

fn start(driver: &TestDriver, device: &mut dyn VirtioDevice) -> (Ring, Ring) {
    let (receive, receive_queue) = driver.ring(RECEIVE, 64);
    let (transmit, transmit_queue) = driver.ring(TRANSMIT, 64);
    device.activate(driver.activation(vec![receive_queue, transmit_queue])).unwrap();
    (receive, transmit)
}

#[test]
fn what_the_guest_prints_comes_out_in_order() {
    for features in [0, feature::EVENT_IDX] {
        let (driver, sink) = (TestDriver::new(features), Sink::default());
        let mut device = console(sink.clone());
        let (_, mut transmit) = start(&driver, &mut device);
        let mut sent = Vec::new();
        for n in 0..200_u8 {
            let line = vec![n; usize::from(n) * 17 + 1];
            let (a, b) = line.split_at(line.len() / 3);
            sent.extend(&line);
            let offered = transmit.offer(&[Part::Read(a), Part::Read(b)]);
            transmit.notify();
            assert_eq!(transmit.wait_used(), (offered.head, 0));
        }
        device.handle().drain(10 * SECOND);
        assert!(sink.bytes() == sent);
        assert!(!driver.signal.seen().used.is_empty());
    }
}

#[test]
fn a_stuck_terminal_holds_the_guest_but_no_other_device() {
    let (driver, (mut device, go, sink)) = (TestDriver::new(feature::EVENT_IDX), stuck());
    let (_, mut transmit) = start(&driver, &mut device);
    let piece: Vec<u8> = (0..60_000_u32).map(|n| (n % 249) as u8).collect();
    let (mut sent, mut answered) = (0, 0);
    while sent < 6 {
        transmit.offer(&[Part::Read(&piece)]);
        transmit.notify();
        sent += 1;
    }
    std::thread::sleep(Duration::from_millis(100));
    while transmit.take_used().is_some() {
        answered += 1;
    }
    assert!(answered < sent, "{answered} buffers were taken that went nowhere");
    // The only I/O thread serves another console meanwhile, and a reset does not wait.
    let mut other = Console::new(Arc::clone(&device.io), Box::new(io::sink())).unwrap();
    let other_driver = TestDriver::new(0);
    let (_, mut line) = start(&other_driver, &mut other);
    line.offer(&[Part::Read(b"still here")]);
    line.notify();
    line.wait_used();
    // Let go, everything comes out.
    drop(go);
    while answered < sent {
        transmit.wait_used();
        answered += 1;
    }
    device.handle().drain(10 * SECOND);
    assert!(sink.bytes() == piece.repeat(sent));
}

#[test]
fn a_reset_does_not_wait_for_a_stuck_terminal() {
    let (driver, (mut device, go, _)) = (TestDriver::new(0), stuck());
    let (_, mut transmit) = start(&driver, &mut device);
    for _ in 0..6 {
        transmit.offer(&[Part::Read(&[b'x'; 60_000])]);
    }
    transmit.notify();
    std::thread::sleep(Duration::from_millis(20));
    let begin = Instant::now();
    device.reset();
    device.handle().drain(Duration::from_millis(20));
    assert!(begin.elapsed() < SECOND);
    while transmit.take_used().is_some() {}
    drop(go);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(transmit.take_used(), None, "the device is at work after its reset");
}

#[test]
fn output_that_nobody_takes_does_not_hold_the_guest() {
    let (driver, mut device) = (TestDriver::new(0), console(Gone));
    let (_, mut transmit) = start(&driver, &mut device);
    for _ in 0..10 {
        transmit.offer(&[Part::Read(&[b'x'; 60_000])]);
        transmit.notify();
        transmit.wait_used();
    }
    device.handle().drain(10 * SECOND);
    assert!(!driver.signal.seen().needs_reset);
}

#[test]
fn an_emergency_needs_no_driver_and_waits_for_nobody() {
    let sink = Sink::default();
    let mut device = console(sink.clone());
    for byte in *b"oops" {
        device.write_config(EMERGENCY, &u32::from(byte).to_le_bytes());
    }
    device.write_config(EMERGENCY, &[]);
    device.write_config(0, b"no");
    device.handle().drain(10 * SECOND);
    assert_eq!(sink.bytes(), b"oops");
    let (mut device, _go, _) = stuck();
    for _ in 0..3 * output::BUFFER {
        device.write_config(EMERGENCY, b"x");
    }
}

fn receive(ring: &mut Ring, want: usize) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < want {
        let offered = ring.offer(&[Part::Write(100), Part::Write(50)]);
        ring.notify();
        let (head, len) = ring.wait_used();
        assert_eq!(head, offered.head);
        assert!(len > 0 && len <= 150);
        got.extend(&ring.answer(&offered)[..len as usize]);
    }
    got
}

#[test]
fn more_input_than_fits_arrives_complete_and_in_order() {
    for features in [0, feature::EVENT_IDX] {
        let (driver, mut device) = (TestDriver::new(features), console(io::sink()));
        let input = device.input();
        let sent: Vec<u8> = (0..3 * input::QUEUE + 17).map(|n| (n % 251) as u8).collect();
        let copy = sent.clone();
        // From before there is a driver.
        let sender = std::thread::spawn(move || input.send(&copy));
        std::thread::sleep(Duration::from_millis(10));
        let (mut ring, _transmit) = start(&driver, &mut device);
        let got = receive(&mut ring, sent.len());
        assert_eq!(sender.join().unwrap(), sent.len());
        assert!(got == sent);
        // And a key by itself, later, into a buffer that lay there.
        let offered = ring.offer(&[Part::Write(64)]);
        ring.notify();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(device.input().send(b"k"), 1);
        assert_eq!(ring.wait_used(), (offered.head, 1));
        assert_eq!(ring.answer(&offered)[0], b'k');
    }
}

#[test]
fn input_waits_until_a_driver_that_still_prints_its_log_is_quiet() {
    let (driver, mut device) = (TestDriver::new(SIZE), console(io::sink()));
    device.handle().resize(80, 25);
    device.input().send(b"early");
    let (mut receive, mut transmit) = start(&driver, &mut device);
    let offered = receive.offer(&[Part::Write(64)]);
    receive.notify();
    let begin = Instant::now();
    let mut last = begin;
    while begin.elapsed() < 2 * worker::QUIET {
        transmit.offer(&[Part::Read(b"log")]);
        transmit.notify();
        transmit.wait_used();
        // On a busy host this thread may have slept so long that the device was right.
        if last.elapsed() < worker::QUIET / 2 {
            assert_eq!(receive.take_used(), None);
            assert_eq!(driver.signal.seen().config_changes, 0);
        }
        last = Instant::now();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(receive.wait_used(), (offered.head, 5));
    assert_eq!(&receive.answer(&offered)[..5], b"early");
    driver.signal.wait(|signals| signals.config_changes == 1);
}

#[test]
fn input_survives_a_reset() {
    let (driver, mut device) = (TestDriver::new(0), console(io::sink()));
    start(&driver, &mut device);
    device.input().send(b"kept");
    device.reset();
    let (mut ring, _transmit) = start(&driver, &mut device);
    assert_eq!(receive(&mut ring, 4), b"kept");
}

#[test]
fn closing_ends_a_waiting_sender_and_so_does_the_devices_end() {
    for by_drop in [false, true] {
        let device = console(io::sink());
        let input = device.input();
        let sender = std::thread::spawn(move || input.send(&[7; 2 * input::QUEUE]));
        std::thread::sleep(Duration::from_millis(10));
        let input = device.input();
        if by_drop {
            drop(device);
        } else {
            input.close();
        }
        assert!(sender.join().unwrap() < 2 * input::QUEUE);
        assert_eq!(input.send(b"late"), 0);
    }
}

#[test]
fn the_driver_hears_of_a_new_size_and_only_of_a_new_one() {
    let driver = TestDriver::new(SIZE);
    let mut device = console(io::sink());
    let handle = device.handle();
    handle.resize(132, 43);
    let (_receive, _transmit) = start(&driver, &mut device);
    driver.signal.wait(|signals| signals.config_changes == 1);
    let size = |device: &Console| {
        let mut size = [0; 4];
        device.read_config(0, &mut size);
        (u16::from_le_bytes([size[0], size[1]]), u16::from_le_bytes([size[2], size[3]]))
    };
    assert_eq!(size(&device), (132, 43));
    handle.resize(132, 43);
    handle.resize(200, 50);
    driver.signal.wait(|signals| signals.config_changes == 2);
    assert_eq!(size(&device), (200, 50));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.signal.seen().config_changes, 2);
    let mut rest = [0xff; 12];
    device.read_config(4, &mut rest);
    assert_eq!(rest, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_driver_that_did_not_ask_for_the_size_is_not_told() {
    let driver = TestDriver::new(0);
    let mut device = console(io::sink());
    let (_receive, _transmit) = start(&driver, &mut device);
    device.handle().resize(1, 1);
    std::thread::sleep(worker::QUIET * 2);
    device.handle().resize(2, 2);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.signal.seen().config_changes, 0);
}

/// Serves an honest driver.
fn alive(device: &mut dyn VirtioDevice) {
    let driver = TestDriver::new(feature::EVENT_IDX);
    let (_receive, mut transmit) = start(&driver, device);
    let offered = transmit.offer(&[Part::Read(b"alive")]);
    transmit.notify();
    assert_eq!(transmit.wait_used(), (offered.head, 0));
    device.reset();
}

#[test]
fn buffers_of_the_wrong_kind_are_refused() {
    let mut device = console(io::sink());
    for (queue, parts) in [
        (0, &[Part::Read(b"x")][..]),
        (0, &[Part::Read(b"x"), Part::Write(8)]),
        (1, &[Part::Write(8)]),
        (1, &[Part::Read(b"x"), Part::Write(8)]),
    ] {
        let driver = TestDriver::new(0);
        let (mut receive, mut transmit) = start(&driver, &mut device);
        device.input().send(b"k");
        let ring = if queue == 0 { &mut receive } else { &mut transmit };
        ring.offer(parts);
        ring.notify();
        driver.signal.wait(|signals| signals.needs_reset);
        assert_eq!(ring.take_used(), None);
        device.reset();
        alive(&mut device);
    }
}

#[test]
fn hostile_drivers_are_survived() {
    let mut device = console(io::sink());
    let input = device.input();
    // Never so much that the sender has to wait.
    let stir = move || {
        if input.peek(100).len() < 100 {
            input.send(b"stir");
        }
    };
    let samples = [(RECEIVE, Part::Write(64)), (TRANSMIT, Part::Read(b"some text"))];
    hostile::all(&mut device, &samples, &stir, &alive);
}
