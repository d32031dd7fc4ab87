//! Disks and network cards driven by a guest: over the bus in the words of the old drivers,
//! and what V6 does before any driver, over PCI.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use lguest_abi::bus::{status, tagged};
use lguest_abi::{Band, Call, Paging, Phys, pci};
use vmm::devices::virtio::VirtioDevice;
use vmm::devices::virtio::block::Block;
use vmm::devices::virtio::net::Net;
use vmm::machine::{Machine, MachineConfig, Outcome};

use super::guest::*;

/// RAM's end, where the descriptor page is.
const PAGE: u32 = 32 << 20;
/// Entries of every queue of disks and cards.
const NUM: u32 = 256;
/// Pages of such a ring.
const RING_PAGES: u32 = 3;
const SECTOR: usize = 512;
/// Descriptor flags.
const NEXT: u32 = 1;
const WRITE: u32 = 2;

/// One of the first device's rings.
#[derive(Clone, Copy)]
struct Ring {
    at: u32,
    /// How often it was used; descriptors are taken in their order.
    count: u16,
    next: u32,
}

impl Ring {
    fn new(n: u32) -> Self {
        Self { at: PAGE + 0x1000 + n * RING_PAGES * 0x1000, count: 0, next: 0 }
    }

    /// Makes a chain of `parts` (address, length, flags) available, without a word.
    fn offer(&mut self, guest: &mut Guest, parts: &[(u32, u32, u32)]) {
        let head = self.next;
        for (n, (at, len, flags)) in parts.iter().enumerate() {
            let descriptor = self.at + self.next * 16;
            let more = if n + 1 < parts.len() { NEXT | (self.next + 1) << 16 } else { 0 };
            for (offset, word) in [(0, *at), (4, 0), (8, *len), (12, flags | more)] {
                guest.store(descriptor + offset, word);
            }
            self.next += 1;
        }
        let available = self.at + NUM * 16;
        let slot = available + 4 + u32::from(self.count) * 2;
        guest.raw(&[0x66, 0xc7, 0x05]); // mov word ptr [slot], head
        guest.raw(&[slot.to_le_bytes().as_slice(), &(head as u16).to_le_bytes()].concat());
        self.count += 1;
        guest.store(available, u32::from(self.count) << 16);
    }

    fn kick(&self, guest: &mut Guest) {
        guest.call(Call::Notify { address: Phys(self.at) });
    }

    fn await_used(&self, guest: &mut Guest) {
        let used = (self.at + NUM * 18 + 4).next_multiple_of(4096);
        guest.wait_for_upper_half(used, self.count);
    }
}

fn linear(band: Band) -> Guest {
    let mut guest = Guest::bare(band, Paging::TwoLevel);
    guest.linear = true;
    guest.call(Call::Init { data: Phys(DATA) });
    guest.mov(Reg::Esp, STACK);
    guest
}

/// A kernel of 2.6.24, which says its version. Nobody has mapped what is above RAM: it does.
fn first() -> Guest {
    let mut guest = Guest::new(Band::V1a, Paging::TwoLevel);
    guest.version = Some("2.6.24");
    let table = 0x90_0000;
    for n in 0..16 {
        guest.store(table + 4 * n, (PAGE + 0x1000 * n) | 7);
    }
    guest.load(Reg::Eax, guest.field(guest.band.layout().offsets().pgdir.unwrap()));
    guest.raw(&[0xc7, 0x40, (PAGE >> 22) as u8 * 4]); // mov dword ptr [eax + ...], table
    guest.raw(&(table | 7).to_le_bytes());
    guest
}

/// The driver is ready, and accepts these features; `queues` is how many the device has.
fn ready(guest: &mut Guest, queues: u32, features: u32) {
    let accepted = PAGE + 5 + queues * 8 + 4;
    guest.store(accepted, features);
    for status in [0x3_u8, 0x7] {
        guest.raw(&[0xc6, 0x05]);
        guest.raw(&(PAGE + 4).to_le_bytes());
        guest.raw(&[status]);
        guest.call(Call::Notify { address: Phys(PAGE) });
    }
    assert_eq!(status::DRIVER_OK, 4);
}

fn with(config: MachineConfig, device: Box<dyn VirtioDevice>) -> Machine {
    Machine::new(MachineConfig { devices: vec![device], ..config }).unwrap()
}

/// A block request for one sector, its data at VARS + 0x200.
fn request(guest: &mut Guest, ring: &mut Ring, kind: u32, sector: u32) {
    // The first kernels had more of a header.
    let len = if guest.band == Band::V1a { tagged::BLOCK_HEADER_BYTES as u32 } else { 16 };
    let (header, state, data) = (VARS + 0x100, VARS + 0x180, VARS + 0x200);
    for (n, word) in [kind, 0, sector, 0].into_iter().enumerate() {
        guest.store(header + 4 * n as u32, word);
    }
    guest.store(state, 0xff);
    let direction = if kind == 0 { WRITE } else { 0 };
    let parts = [(header, len, 0), (data, SECTOR as u32, direction), (state, 1, WRITE)];
    // A flush has no data.
    let parts = if kind == 4 { vec![parts[0], parts[2]] } else { parts.to_vec() };
    ring.offer(guest, &parts);
    ring.kick(guest);
    ring.await_used(guest);
    guest.expect(state, 0, "the request succeeds");
}

#[test]
fn a_disk_is_read_and_written() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let old: Vec<u8> = (0..8 * SECTOR).map(|n| (n / 7) as u8).collect();
    file.write_all(&old).unwrap();
    let mut guest = linear(Band::V5);
    guest.expect(PAGE, 0x2404_0102, "a disk of one queue, with features and configuration");
    guest.expect(PAGE + 5, 0x0001_0100, "256 entries, line 1");
    guest.expect(PAGE + 5 + 8 + 8, 8, "sectors");
    let mut ring = Ring::new(0);
    // Probed before the driver is ready, as partitions are looked for.
    let word = |at: usize| u32::from_le_bytes(old[at..at + 4].try_into().unwrap());
    request(&mut guest, &mut ring, 0, 3);
    guest.expect(VARS + 0x200, word(3 * SECTOR), "what the disk has");
    guest.expect(VARS + 0x200 + 508, word(4 * SECTOR - 4), "to its end");
    guest.call(Call::Notify { address: Phys(PAGE) });
    // A reset forgets all that.
    let mut ring = Ring::new(0);
    ready(&mut guest, 1, 1 << 9);
    for n in 0..SECTOR as u32 / 4 {
        guest.store(VARS + 0x200 + 4 * n, 0x0101_0101 * (n & 0xff));
    }
    request(&mut guest, &mut ring, 1, 5);
    request(&mut guest, &mut ring, 4, 0);
    guest.done();
    only_sector_5_is_new(guest, file, &old);
}

/// Runs a guest that writes sector 5 of the disk in `file`, which was `old`, and nothing else.
fn only_sector_5_is_new(guest: Guest, mut file: tempfile::NamedTempFile, old: &[u8]) {
    let (config, console) = guest.config(20.0);
    let disk = file.path().to_str().unwrap().parse().unwrap();
    let block = Block::open(&disk, config.io.clone(), 1).unwrap();
    let outcome = with(config, Box::new(block)).run().unwrap();
    assert_eq!(outcome, Outcome::PoweredOff, "{}", console.text());
    let mut now = Vec::new();
    file.as_file_mut().seek(SeekFrom::Start(0)).unwrap();
    file.as_file_mut().read_to_end(&mut now).unwrap();
    let new: Vec<u8> = (0..SECTOR).map(|n| (n / 4) as u8).collect();
    assert_eq!(now[5 * SECTOR..6 * SECTOR], new);
    assert_eq!((&now[..5 * SECTOR], &now[6 * SECTOR..]), (&old[..5 * SECTOR], &old[6 * SECTOR..]));
}

#[test]
fn a_disk_of_the_first_descriptors_is_read_and_written() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let old: Vec<u8> = (0..8 * SECTOR).map(|n| (n / 5) as u8).collect();
    file.write_all(&old).unwrap();
    let mut guest = first();
    guest.expect(PAGE, 0x0200_1a02, "a disk of 26 bytes, a queue the first");
    guest.expect(PAGE + 4, 0x0101_0008, "in 8 bytes: 256 entries, line 1");
    guest.expect(PAGE + 8, 0x0020_0100, "frame 0x2001");
    guest.expect(PAGE + 12, 0x0808_4100, "the capacity");
    guest.expect(PAGE + 15, 8, "in sectors");
    guest.expect(PAGE + 21, 0x0443_0000, "segments in a request");
    guest.expect(PAGE + 29, 0x0200_1403, "no features, and the console behind it");
    // What it has read it marks, and says nothing about it.
    for at in [3, 13, 23] {
        guest.raw(&[0x80, 0x0d]); // or byte ptr [...], USED
        guest.raw(&(PAGE + at).to_le_bytes());
        guest.raw(&[tagged::USED]);
    }
    let mut ring = Ring::new(0);
    let word = |at: usize| u32::from_le_bytes(old[at..at + 4].try_into().unwrap());
    request(&mut guest, &mut ring, 0, 3);
    guest.expect(VARS + 0x200, word(3 * SECTOR), "what the disk has");
    guest.expect(VARS + 0x200 + 508, word(4 * SECTOR - 4), "to its end");
    guest.raw(&[0xc6, 0x05]); // mov byte ptr [...], DRIVER_OK and what comes before
    guest.raw(&(PAGE + tagged::STATUS_AT as u32).to_le_bytes());
    guest.raw(&[7]);
    for n in 0..SECTOR as u32 / 4 {
        guest.store(VARS + 0x200 + 4 * n, 0x0101_0101 * (n & 0xff));
    }
    request(&mut guest, &mut ring, 1, 5);
    guest.done();
    only_sector_5_is_new(guest, file, &old);
}

/// Sends 60 bytes and waits for as many, with a header of `header` bytes in front and
/// accepting `features`, if the kernel says what it accepts.
fn exchange(mut guest: Guest, header: u32, features: Option<u32>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut frame = [0; 64];
        stream.read_exact(&mut frame).unwrap();
        // The guest's frame goes back, but for its first word.
        frame[4..8].copy_from_slice(b"back");
        stream.write_all(&frame).unwrap();
        // Until the other end is gone.
        let _ = stream.read(&mut frame);
        frame
    });
    match features {
        Some(_) => guest.expect(PAGE, 0x0804_0201, "a card of two queues, features, an address"),
        None => {
            guest.expect(PAGE, 0x0200_1c01, "a card of 28 bytes, a queue the first");
            guest.expect(PAGE + 11, 0x0802_0000, "then another");
            guest.expect(PAGE + 21, 0x0641_0000, "then its address");
        }
    }
    let (mut receive, mut transmit) = (Ring::new(0), Ring::new(1));
    let (input, output) = (VARS + 0x400, VARS + 0x200);
    // Buffers are given while probing, before the features are written: they must not be
    // taken to be of another form.
    receive.offer(&mut guest, &[(input, 128, WRITE)]);
    receive.kick(&mut guest);
    if let Some(features) = features {
        ready(&mut guest, 2, features);
    }
    for n in 0..15 {
        guest.store(output + header + 4 * n, 0x6060_6060 + n);
    }
    transmit.offer(&mut guest, &[(output, header, 0), (output + header, 60, 0)]);
    transmit.kick(&mut guest);
    receive.await_used(&mut guest);
    guest.expect(input + header, u32::from_le_bytes(*b"back"), "what the peer changed");
    guest.expect(input + header + 56, 0x6060_6060 + 14, "what it sent back");
    guest.done();
    let (config, console) = guest.config(20.0);
    let card = format!("unix={}", path.display()).parse().unwrap();
    let net = Net::open(&card, config.io.clone(), 1).unwrap();
    let outcome = with(config, Box::new(net)).run().unwrap();
    assert_eq!(outcome, Outcome::PoweredOff, "header of {header}: {}", console.text());
    peer.join().unwrap();
}

#[test]
fn frames_come_and_go_in_the_form_the_driver_accepts() {
    exchange(linear(Band::V5), 10, Some(1 << 5));
    exchange(linear(Band::V5), 12, Some(1 << 5 | 1 << 15));
    exchange(first(), tagged::NET_HEADER_BYTES as u32, None);
}

/// `out dx, eax` to a port.
fn output(guest: &mut Guest, port: u16, value: u32) {
    guest.mov(Reg::Edx, port.into());
    guest.mov(Reg::Eax, value);
    guest.raw(&[0xef]);
}

/// Reads a register of configuration space into a variable.
fn config_read(guest: &mut Guest, slot: u8, register: u8, to: u32) {
    output(guest, pci::CONFIG_ADDRESS, 1 << 31 | u32::from(slot) << 11 | u32::from(register));
    guest.mov(Reg::Edx, pci::CONFIG_DATA.into());
    guest.raw(&[0xed]);
    guest.save(to, Reg::Eax);
}

fn config_write(guest: &mut Guest, slot: u8, register: u8, value: u32) {
    output(guest, pci::CONFIG_ADDRESS, 1 << 31 | u32::from(slot) << 11 | u32::from(register));
    output(guest, pci::CONFIG_DATA, value);
}

#[test]
fn the_last_band_finds_its_devices_on_pci() {
    let mut guest = linear(Band::V6);
    guest.version = Some("4.9.0");
    let slot = pci::CONSOLE_SLOT;
    // Is there configuration mechanism #1?
    output(&mut guest, pci::CONFIG_ADDRESS, 1 << 31);
    guest.raw(&[0xed]);
    guest.save(VARS, Reg::Eax);
    guest.expect(VARS, 1 << 31, "the address port keeps what was written");
    config_read(&mut guest, pci::BRIDGE_SLOT, 8, VARS);
    guest.expect(VARS, 0x0600_0000, "a host bridge");
    config_read(&mut guest, slot, 0, VARS);
    guest.expect(VARS, 0x1043_1af4, "the console is in slot 1");
    config_read(&mut guest, 9, 0, VARS);
    guest.expect(VARS, u32::MAX, "slot 9 is empty");
    config_read(&mut guest, slot, 0x3c, VARS);
    guest.expect(VARS, 0x0101, "its line is 1");
    // Its registers: two queues, as the upper half of the word at 16 says.
    config_write(&mut guest, slot, 4, 2);
    config_read(&mut guest, slot, 0x10, VARS);
    guest.load(Reg::Eax, VARS);
    guest.raw(&[0x24, 0xf0]); // and al, 0xf0
    guest.raw(&[0x0f, 0xb7, 0x48, 0x12]); // movzx ecx, word ptr [eax + 18]
    guest.save(VARS, Reg::Ecx);
    guest.expect(VARS, 2, "queues");
    // The early console: a window into the same registers, the fifth capability; each is 16
    // bytes long but that of notifications, which is of 20.
    for (register, value) in [(0x88, 0), (0x8c, 0x2000 + 8), (0x90, 4)] {
        config_write(&mut guest, slot, register, value);
    }
    for byte in b"early\n" {
        config_write(&mut guest, slot, 0x94, u32::from(*byte));
    }
    guest.done();
    let (outcome, console) = guest.run();
    assert_eq!((outcome, console.as_str()), (Outcome::PoweredOff, "early\n"));
}
