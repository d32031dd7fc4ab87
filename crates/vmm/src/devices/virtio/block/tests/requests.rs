//! What requests do, on both formats.

use super::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES,
};

const SIZE: u64 = 1 << 20;

#[test]
fn what_is_written_is_read_also_by_the_next_guest() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        let data = pattern(3 * 512, 7);
        let mut guest = Guest::boot(&path, "");
        let (head, tail) = data.split_at(700);
        let (status, _) = guest.request(OUT, 5, &[Part::Read(head), Part::Read(tail)]);
        assert_eq!(status, OK);
        let parts = [Part::Write(100), Part::Write(412), Part::Write(1024)];
        assert_eq!(guest.request(IN, 5, &parts), (OK, data.clone()));
        assert_eq!(guest.read(4, 512), [0; 512]);
        assert_eq!(guest.read(8, 512), [0; 512]);
        guest.write(SIZE / 512 - 1, &data[..512]);
        let mut guest = guest.restart();
        assert_eq!(guest.read(5, 1536), data);
        drop(guest);
        let mut guest = Guest::boot(&path, ",readonly");
        assert_eq!(guest.read(5, 1536), data);
        assert_eq!(guest.read(SIZE / 512 - 1, 512), data[..512]);
        if format == DiskFormat::Raw {
            assert_eq!(std::fs::read(&path).unwrap()[5 * 512..][..1536], data);
        }
    }
}

#[test]
fn header_and_data_may_be_cut_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let mut guest = Guest::boot(&path, "");
    let header = Header { kind: OUT.into(), sector: 2.into(), ..Header::default() };
    let mut whole = header.as_bytes().to_vec();
    whole.extend(pattern(512, 1));
    let (one, rest) = whole.split_at(3);
    let (two, three) = rest.split_at(20);
    let parts = [Part::Read(one), Part::Read(two), Part::Read(three), Part::Write(1)];
    let offered = guest.ring.offer(&parts);
    guest.ring.notify();
    guest.ring.wait_used();
    assert_eq!(guest.ring.answer(&offered), [OK]);
    // And the status at the end of the data's buffer.
    let header = Header { kind: IN.into(), sector: 2.into(), ..Header::default() };
    let offered = guest.ring.offer(&[Part::Read(header.as_bytes()), Part::Write(513)]);
    guest.ring.notify();
    assert_eq!(guest.ring.wait_used(), (offered.head, 513));
    let answer = guest.ring.answer(&offered);
    assert_eq!((&answer[..512], answer[512]), (&pattern(512, 1)[..], OK));
}

#[test]
fn the_serial_number_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let mut guest = Guest::boot(&path, ",serial=12345678901234567890");
    assert_eq!(
        guest.request(GET_ID, 0, &[Part::Write(20)]),
        (OK, b"12345678901234567890".to_vec())
    );
    assert_eq!(guest.request(GET_ID, 0, &[Part::Write(5)]), (OK, b"12345".to_vec()));
    drop(guest);
    let mut guest = Guest::boot(&path, "");
    assert_eq!(guest.request(GET_ID, 0, &[Part::Write(20)]), (OK, vec![0; 20]));
}

#[test]
fn zeroes_and_discards_touch_what_they_name() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        let mut guest = Guest::boot(&path, "");
        let data = pattern(64 << 10, 3);
        guest.write(0, &data);
        assert_eq!(guest.segments(WRITE_ZEROES, &[(9, 30, 0), (60, 30, 1)]), OK);
        let mut expected = data.clone();
        expected[9 * 512..39 * 512].fill(0);
        expected[60 * 512..90 * 512].fill(0);
        assert_eq!(guest.read(0, data.len()), expected);
        assert_eq!(guest.segments(DISCARD, &[(32, 1, 0), (96, 32, 0)]), OK);
        let now = guest.read(0, data.len());
        assert_eq!(now[..32 * 512], expected[..32 * 512]);
        assert_eq!(now[33 * 512..96 * 512], expected[33 * 512..96 * 512]);
        // Nothing is done of a request of which a part makes no sense.
        assert_eq!(guest.segments(WRITE_ZEROES, &[(0, 1, 0), (0, 1, 2)]), UNSUPPORTED);
        assert_eq!(guest.segments(WRITE_ZEROES, &[(0, 1, 0), (2047, 2, 0)]), IO_ERROR);
        assert_eq!(guest.segments(WRITE_ZEROES, &[(0, 1, 0), (u64::MAX, 1, 0)]), IO_ERROR);
        assert_eq!(guest.segments(WRITE_ZEROES, &[(0, u32::MAX, 0)]), IO_ERROR);
        assert_eq!(guest.segments(DISCARD, &[(0, 1, 1)]), UNSUPPORTED);
        assert_eq!(guest.segments(DISCARD, &[(0, 1, 0); 33]), IO_ERROR);
        assert_eq!(guest.segments(DISCARD, &[]), IO_ERROR);
        let odd = guest.request(DISCARD, 0, &[Part::Read(&[0; 17])]).0;
        assert_eq!(odd, IO_ERROR);
        assert_eq!(guest.read(0, 4096), data[..4096]);
    }
}

#[test]
fn discarding_gives_space_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
    let mut guest = Guest::boot(&path, "");
    guest.write(0, &pattern(512 << 10, 3));
    guest.flush();
    let full = blocks();
    assert_eq!(guest.segments(DISCARD, &[(0, 512, 0)]), OK);
    assert_eq!(guest.segments(WRITE_ZEROES, &[(512, 512, 1)]), OK);
    guest.flush();
    assert!(blocks() < full, "{} of {full} blocks are left", blocks());
}

#[test]
fn requests_that_make_no_sense_are_errors_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let mut guest = Guest::boot(&path, "");
    let sector = [1; 512];
    let end = SIZE / 512;
    for (kind, at, data, expected) in [
        (0xdead, 0, Part::Write(512), UNSUPPORTED),
        (2, 0, Part::Write(512), UNSUPPORTED),
        (IN, end, Part::Write(512), IO_ERROR),
        (IN, end - 1, Part::Write(1024), IO_ERROR),
        (IN, u64::MAX, Part::Write(512), IO_ERROR),
        (IN, u64::MAX / 512, Part::Write(512), IO_ERROR),
        (IN, 0, Part::Write(511), IO_ERROR),
        (OUT, end, Part::Read(&sector), IO_ERROR),
        (OUT, 0, Part::Read(&sector[1..]), IO_ERROR),
        (IN, 0, Part::Write(0), OK),
        (OUT, end, Part::Read(&[]), OK),
    ] {
        assert_eq!(guest.request(kind, at, &[data]).0, expected, "{kind} at {at}");
    }
    // A header that is too short.
    let offered = guest.ring.offer(&[Part::Read(&[0; 15]), Part::Write(513)]);
    guest.ring.notify();
    guest.ring.wait_used();
    assert_eq!(*guest.ring.answer(&offered).last().unwrap(), IO_ERROR);
    assert!(!guest.driver.signal.seen().needs_reset);
    assert_eq!(std::fs::read(&path).unwrap(), vec![0; SIZE as usize]);
}

#[test]
fn what_was_not_agreed_on_is_not_supported() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let mut guest = Guest::drive(open(&path, "").unwrap(), 0);
    assert_eq!(guest.request(FLUSH, 0, &[]).0, UNSUPPORTED);
    assert_eq!(guest.segments(DISCARD, &[(0, 1, 0)]), UNSUPPORTED);
    assert_eq!(guest.segments(WRITE_ZEROES, &[(0, 1, 0)]), UNSUPPORTED);
    guest.disk.write_config(32, &[1]);
    let mut writeback = [9];
    guest.disk.read_config(32, &mut writeback);
    assert_eq!(writeback, [0]);
}

#[test]
fn a_disk_to_be_read_is_not_written() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        let before = std::fs::read(&path).unwrap();
        let disk = open(&path, ",readonly").unwrap();
        assert_ne!(disk.features() & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(disk.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
        assert_eq!(disk.features() & 1 << VIRTIO_BLK_F_WRITE_ZEROES, 0);
        let mut guest = Guest::drive(disk, u64::MAX);
        assert_eq!(guest.request(OUT, 0, &[Part::Read(&[1; 512])]).0, IO_ERROR);
        assert_eq!(guest.segments(DISCARD, &[(0, 8, 0)]), IO_ERROR);
        assert_eq!(guest.segments(WRITE_ZEROES, &[(0, 8, 1)]), IO_ERROR);
        guest.flush();
        assert_eq!(guest.read(0, 512), [0; 512]);
        drop(guest);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}

#[test]
fn what_was_flushed_survives_a_crash() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        let mut guest = Guest::boot(&path, "");
        let data = pattern(64 << 10, 9);
        guest.write(100, &data);
        guest.flush();
        let mut after = Guest::boot(&as_after_a_crash(&path), "");
        assert_eq!(after.read(100, data.len()), data);
    }
}

#[test]
fn a_driver_that_does_not_flush_has_its_writes_flushed() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        let mut guest = Guest::drive(open(&path, "").unwrap(), 0);
        let data = pattern(64 << 10, 9);
        guest.write(100, &data);
        let mut after = Guest::boot(&as_after_a_crash(&path), "");
        assert_eq!(after.read(100, data.len()), data);
    }
    // And one that can, but chooses not to.
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Qcow2, SIZE);
    let mut guest = Guest::boot(&path, "");
    guest.disk.write_config(32, &[0]);
    guest.write(0, &[5; 4096]);
    let mut after = Guest::boot(&as_after_a_crash(&path), "");
    assert_eq!(after.read(0, 4096), [5; 4096]);
}

#[test]
fn the_configuration_space_tells_what_the_disk_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE + 100);
    let mut disk = Block::open(&config(&path, ""), io_threads(), 4).unwrap();
    assert_eq!(disk.queue_sizes(), [256; 4]);
    assert_eq!(disk.size(), SIZE);
    for feature in [VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_CONFIG_WCE] {
        assert_ne!(disk.features() & 1 << feature, 0);
    }
    let mut space = [0xff_u8; 64];
    disk.read_config(0, &mut space);
    let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4)), ((SIZE / 512) as u32, 0));
    assert_eq!(word(12), 254);
    assert_eq!(word(20), 512);
    assert_eq!((space[24], space[25]), (3, 0));
    assert_eq!((space[32], space[34], space[35]), (1, 4, 0));
    assert_eq!((word(36), word(40), word(48), word(52)), (1 << 21, 32, 1 << 21, 32));
    assert!(word(44) >= 1 && word(44).is_power_of_two());
    assert_eq!((space[56], word(60)), (1, 0));
    disk.write_config(32, &[0]);
    disk.write_config(0, &[9]);
    let mut now = [0xff_u8; 64];
    disk.read_config(0, &mut now);
    space[32] = 0;
    assert_eq!(now, space);
    disk.reset();
    disk.read_config(0, &mut now);
    assert_eq!(now[32], 1);
}

#[test]
fn many_requests_are_in_flight_and_each_is_answered_once() {
    for format in BOTH {
        let folder = tempfile::tempdir().unwrap();
        let path = new_image(folder.path(), format, SIZE);
        let mut guest = Guest::boot(&path, "");
        let writes: Vec<_> = (0..80_u8)
            .map(|n| guest.begin(OUT, u64::from(n) * 9, &[Part::Read(&[n; 512])]))
            .collect();
        guest.ring.notify();
        let mut heads: Vec<u16> = writes.iter().map(|_| guest.ring.wait_used().0).collect();
        heads.sort_unstable();
        let mut expected: Vec<u16> = writes.iter().map(|offered| offered.head).collect();
        expected.sort_unstable();
        assert_eq!(heads, expected);
        assert!(writes.iter().all(|offered| guest.ring.answer(offered) == [OK]));
        let reads: Vec<_> =
            (0..80_u64).map(|n| guest.begin(IN, n * 9, &[Part::Write(512)])).collect();
        guest.ring.notify();
        for _ in &reads {
            guest.ring.wait_used();
        }
        for (n, offered) in (0_u8..).zip(&reads) {
            let answer = guest.ring.answer(offered);
            assert_eq!((&answer[..512], answer[512]), (&[n; 512][..], OK));
        }
        assert!(guest.ring.take_used().is_none());
    }
}

#[test]
fn every_queue_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let mut disk = Block::open(&config(&path, ""), IoThreads::start(2).unwrap(), 3).unwrap();
    let driver = TestDriver::new(disk.features());
    let (mut rings, queues): (Vec<Ring>, Vec<_>) =
        [0, 2].map(|index| driver.ring(index, 16)).into_iter().unzip();
    disk.activate(driver.activation(queues)).unwrap();
    let header = Header { kind: OUT.into(), ..Header::default() };
    for ring in &mut rings {
        let parts = [Part::Read(header.as_bytes()), Part::Read(&[7; 512]), Part::Write(1)];
        let offered = ring.offer(&parts);
        ring.notify();
        ring.wait_used();
        assert_eq!(ring.answer(&offered), [OK]);
    }
    let seen = driver.signal.wait(|signals| signals.used.len() == 2).used;
    assert_eq!(seen, [0, 2]);
    let (_, queue) = driver.ring(2, 16);
    disk.reset();
    assert!(disk.activate(driver.activation(vec![queue])).is_err(), "without queue 0");
}
