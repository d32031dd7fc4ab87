//! Body of the fuzz target for the disk: hostile rings, served one after the other.
//!
//! The image is in memory and there are no threads, so the same bytes do the same. The
//! first byte says what image it is and what was negotiated; then come operations on guest
//! memory and on the queue. Whatever they are, this returns.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use rustix::fs::MemfdFlags;
use vm_memory::{Bytes as _, GuestAddress};

use super::host_file::{Access, HostFile};
use super::image::Image;
use super::lock::Purpose;
use super::pool::{Job, Pool};
use super::request::{Header, RawSegment};
use super::served_queue::{Served, ServedQueue};
use super::{Block, DiskConfig, DiskFormat};
use crate::devices::fuzz::Bytes;
use crate::devices::virtio::testing::{Ring, TestDriver};
use crate::devices::virtio::{DriverSignal, IoThreads, VirtioDevice, feature};

/// Where buffers and indirect tables are, a page each.
const BUFFERS: u64 = 0x80_0000;
/// The size of the disk in bytes.
const SIZE: u64 = 1 << 17;
const RING: u16 = 16;

/// A disk wants I/O threads, but here none ever runs anything: queues are served in place.
static IDLE: LazyLock<Option<Arc<IoThreads>>> = LazyLock::new(|| IoThreads::start(1).ok());

/// Bytes as a driver's doings.
pub fn fuzz_block(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let Some(setup) = bytes.byte() else { return };
    let Some(mut disk) = disk(setup) else { return };
    let mut features = disk.features();
    if setup & 0x10 != 0 {
        features |= feature::EVENT_IDX;
    }
    if setup & 0x20 != 0 {
        features &= !(1 << virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH);
    }
    let driver = TestDriver::new(features);
    let (mut ring, queue) = driver.ring(0, RING);
    let signal = Arc::clone(&driver.signal) as Arc<dyn DriverSignal>;
    let queue = ServedQueue::new(queue, signal);
    let service = disk.service(features);
    while let Some(operation) = bytes.byte() {
        let played = match operation & 15 {
            0 | 1 => serve(&queue, &service),
            2 => config(&mut bytes, &mut disk, operation),
            _ => play(&mut bytes, &driver, &mut ring, operation),
        };
        if played.is_none() {
            break;
        }
    }
    serve(&queue, &service);
}

fn serve(queue: &Arc<ServedQueue>, service: &Arc<super::Service>) -> Option<()> {
    let mut taken = Vec::new();
    queue.take(&mut taken);
    for chain in taken {
        if let Some(written) = service.serve_at_once(&chain) {
            queue.complete([Served { chain, written }]);
            continue;
        }
        Job { chain, service: Arc::clone(service), queue: Arc::clone(queue) }.run();
    }
    Some(())
}

fn config(bytes: &mut Bytes<'_>, disk: &mut Block, operation: u8) -> Option<()> {
    let offset = u64::from(bytes.byte()?);
    let mut data = [operation; 8];
    let data = data.get_mut(..usize::from(operation >> 5).saturating_add(1))?;
    disk.write_config(offset, data);
    disk.read_config(offset, data);
    Some(())
}

fn page(number: u8) -> u64 {
    BUFFERS.saturating_add(u64::from(number & 31) << 12)
}

/// A descriptor's fields: sane ones in few bytes, any in more.
fn descriptor(bytes: &mut Bytes<'_>) -> Option<(u64, u32, u16, u16)> {
    let (at, flags) = (bytes.byte()?, bytes.byte()?);
    let address = if at & 0x80 == 0 { page(at) } else { u64::from_le_bytes(bytes.take()?) };
    let len = match flags >> 4 {
        0 => 16,
        1 => 1,
        2 => 512,
        3 => 4096,
        4 => 20,
        5 => 32,
        6 => 513,
        _ => bytes.word()?,
    };
    Some((address, len, u16::from(flags & 7), u16::from(bytes.byte()?)))
}

fn play(bytes: &mut Bytes<'_>, driver: &TestDriver, ring: &mut Ring, operation: u8) -> Option<()> {
    let memory = driver.memory();
    match operation & 15 {
        3..=6 => {
            let (address, len, flags, next) = descriptor(bytes)?;
            ring.set_descriptor(u16::from(operation >> 4), address, len, flags, next);
        }
        7 => {
            let table = page(bytes.byte()?).saturating_add(u64::from(operation & 0xf0));
            let (address, len, flags, next) = descriptor(bytes)?;
            ring.write_descriptor(table, address, len, flags, next);
        }
        8 | 9 => {
            let at = page(bytes.byte()?);
            let header = Header {
                kind: u32::from(bytes.byte()?).into(),
                sector: u64::from(u16::from_le_bytes(bytes.take()?)).into(),
                ..Header::default()
            };
            memory.write_obj(header.kind.get(), GuestAddress(at)).ok()?;
            memory.write_obj(header.sector.get(), GuestAddress(at.saturating_add(8))).ok()?;
        }
        10 => {
            let at = page(bytes.byte()?);
            let at = at.saturating_add(u64::from(operation & 0xf0));
            let segment = RawSegment {
                sector: u64::from(bytes.byte()?).into(),
                sectors: u32::from(u16::from_le_bytes(bytes.take()?)).into(),
                flags: u32::from(operation >> 4).into(),
            };
            let words = [
                (0, segment.sector.get() as u32),
                (8, segment.sectors.get()),
                (12, segment.flags.get()),
            ];
            for (offset, word) in words {
                memory.write_obj(word, GuestAddress(at.saturating_add(offset))).ok()?;
            }
        }
        11 => {
            let at = page(bytes.byte()?).saturating_add(u64::from(operation >> 4));
            memory.write_obj(bytes.long()?, GuestAddress(at)).ok()?;
        }
        12 | 13 => ring.publish(u16::from(operation >> 4)),
        14 => ring.set_available_index(u16::from_le_bytes(bytes.take()?)),
        _ => ring.set_used_event(u16::from_le_bytes(bytes.take()?)),
    }
    Some(())
}

/// A disk in memory: raw as found, raw as told, qcow2, or raw to be read only.
fn disk(setup: u8) -> Option<Block> {
    let file = File::from(rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC).ok()?);
    let path = Path::new("fuzz.img");
    let readonly = setup & 3 == 3;
    let format = match setup & 3 {
        1 => Some(DiskFormat::Raw),
        2 => Some(DiskFormat::Qcow2),
        _ => None,
    };
    if format == Some(DiskFormat::Qcow2) {
        format_qcow2(file.try_clone().ok()?, SIZE)?;
    } else {
        file.set_len(SIZE).ok()?;
    }
    let config =
        DiskConfig { path: path.to_owned(), readonly, format, serial: None, direct: false };
    let purpose = if readonly { Purpose::Read } else { Purpose::Write };
    let file = HostFile::from_file(file, path, Access { purpose, direct: false }).ok()?;
    let image = Image::from_file(file, &config).ok()?;
    let (io, nobody) = (IDLE.clone()?, Pool::default());
    Some(Block::new(image, Some("fuzz".to_owned()), io, nobody, 2))
}

/// Makes an empty qcow2 image of `file`.
pub(super) fn format_qcow2(file: File, size: u64) -> Option<()> {
    let access = Access { purpose: Purpose::Write, direct: false };
    let file = HostFile::from_file(file, Path::new("new.qcow2"), access).ok()?;
    Qcow2::<HostFile>::create_builder(file).size(size).cluster_size(4096).create().ok()
}
