//! The disk as its driver and its host see it. The guest is played by hand.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::fuzz::format_qcow2;
use super::request::{Header, RawSegment, Status};
use super::{Block, DiskConfig, DiskError, DiskFormat, QUEUE_SIZE};
use crate::devices::virtio::testing::{Offered, Part, Ring, TestDriver};
use crate::devices::virtio::{IoThreads, VirtioDevice};

mod host;
mod hostile;
mod images;
mod model;
mod requests;

const OK: u8 = Status::Ok as u8;
const IO_ERROR: u8 = Status::IoError as u8;
const UNSUPPORTED: u8 = Status::Unsupported as u8;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const BOTH: [DiskFormat; 2] = [DiskFormat::Raw, DiskFormat::Qcow2];

/// A new image of `size` bytes in `folder`.
fn new_image(folder: &Path, format: DiskFormat, size: u64) -> PathBuf {
    let path = folder.join(format!("disk.{format}"));
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    match format {
        DiskFormat::Raw => file.set_len(size).unwrap(),
        DiskFormat::Qcow2 => format_qcow2(file, size).unwrap(),
    }
    path
}

fn config(path: &Path, options: &str) -> DiskConfig {
    format!("{}{options}", path.display()).parse().unwrap()
}

fn try_open(path: &Path, options: &str) -> Result<Block, DiskError> {
    Block::open(&config(path, options), IoThreads::start(1).unwrap(), 1)
}

/// Opens a disk that nobody has in use. Other tests start processes, and until such a child
/// has become its program it holds what its parent had open, and locked, a moment before.
fn open(path: &Path, options: &str) -> Result<Block, DiskError> {
    let patience = Instant::now() + Duration::from_secs(20);
    loop {
        match try_open(path, options) {
            Err(error) if error.to_string().contains("in use") && Instant::now() < patience => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

fn refused(path: &Path, options: &str) -> String {
    let message = try_open(path, options).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// A guest with one disk.
struct Guest {
    disk: Block,
    driver: TestDriver,
    ring: Ring,
    features: u64,
}

impl Guest {
    fn boot(path: &Path, options: &str) -> Self {
        let disk = open(path, options).unwrap();
        let features = disk.features();
        Self::drive(disk, features)
    }

    /// A driver that takes these of the features.
    fn drive(mut disk: Block, features: u64) -> Self {
        let driver = TestDriver::new(features);
        let (ring, queue) = driver.ring(0, QUEUE_SIZE);
        disk.activate(driver.activation(vec![queue])).unwrap();
        Self { disk, driver, ring, features }
    }

    /// The driver resets the disk and starts anew.
    fn restart(self) -> Self {
        let Self { mut disk, features, .. } = self;
        disk.reset();
        Self::drive(disk, features)
    }

    fn begin(&mut self, kind: u32, sector: u64, data: &[Part<'_>]) -> Offered {
        let header = Header { kind: kind.into(), sector: sector.into(), ..Header::default() };
        let mut parts = vec![Part::Read(header.as_bytes())];
        parts.extend_from_slice(data);
        parts.push(Part::Write(1));
        let offered = self.ring.offer(&parts);
        // A status nobody answers with.
        let (status, _) = offered.writable.last().unwrap();
        let memory = self.driver.memory();
        vm_memory::Bytes::write_obj(memory.as_ref(), 0xee_u8, vm_memory::GuestAddress(*status))
            .unwrap();
        offered
    }

    /// One request: its status, and what was written to the guest before it.
    fn request(&mut self, kind: u32, sector: u64, data: &[Part<'_>]) -> (u8, Vec<u8>) {
        let offered = self.begin(kind, sector, data);
        self.ring.notify();
        let (head, written) = self.ring.wait_used();
        assert_eq!(head, offered.head);
        let mut answer = self.ring.answer(&offered);
        let status = answer.pop().unwrap();
        if status == OK {
            assert!(written as usize >= answer.len().min(20), "{written} bytes written");
        }
        (status, answer)
    }

    fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let (status, data) = self.request(IN, sector, &[Part::Write(len as u32)]);
        assert_eq!(status, OK);
        data
    }

    fn write(&mut self, sector: u64, data: &[u8]) {
        assert_eq!(self.request(OUT, sector, &[Part::Read(data)]).0, OK);
    }

    fn flush(&mut self) {
        assert_eq!(self.request(FLUSH, 0, &[]).0, OK);
    }

    fn segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let raw: Vec<RawSegment> = segments
            .iter()
            .map(|(sector, sectors, flags)| RawSegment {
                sector: (*sector).into(),
                sectors: (*sectors).into(),
                flags: (*flags).into(),
            })
            .collect();
        self.request(kind, 0, &[Part::Read(raw.as_bytes())]).0
    }
}

/// Bytes that differ from sector to sector.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n / 512) as u8 ^ (n as u8) ^ seed).collect()
}

/// An image in the state that a crash would leave it in now: what the kernel has.
fn as_after_a_crash(path: &Path) -> PathBuf {
    let copy = path.with_extension("crashed");
    std::fs::copy(path, &copy).unwrap();
    copy
}

fn io_threads() -> Arc<IoThreads> {
    IoThreads::start(1).unwrap()
}
