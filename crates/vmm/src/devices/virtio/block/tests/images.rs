//! Images: what is found in them, what lies behind them, and what is refused.

use super::*;
use crate::devices::virtio::block::host_file::{Access, HostFile};
use crate::devices::virtio::block::lock::Purpose;
use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;

const SIZE: u64 = 256 << 10;

/// A qcow2 image over another.
fn overlay(path: &Path, behind: &str, format: &str) {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    let access = Access { purpose: Purpose::Write, direct: false };
    let file = HostFile::from_file(file, path, access).unwrap();
    Qcow2::<HostFile>::create_builder(file)
        .size(SIZE)
        .backing(behind.to_owned(), format.to_owned())
        .create()
        .unwrap();
}

#[test]
fn an_overlay_reads_what_lies_behind_and_leaves_it_alone() {
    let folder = tempfile::tempdir().unwrap();
    let base = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let content = pattern(SIZE as usize, 5);
    std::fs::write(&base, &content).unwrap();
    let middle = folder.path().join("middle.qcow2");
    overlay(&middle, "disk.raw", "raw");
    let top = folder.path().join("top.qcow2");
    overlay(&top, "middle.qcow2", "qcow2");
    let mut guest = Guest::boot(&top, "");
    assert_eq!(guest.read(0, SIZE as usize), content);
    guest.write(9, &[1; 1024]);
    assert_eq!(guest.segments(WRITE_ZEROES, &[(20, 5, 1)]), OK);
    // What lies behind is in use, by readers.
    assert!(refused(&base, "").contains("in use by another guest"));
    assert!(refused(&middle, "").contains("in use by another guest"));
    drop(open(&base, ",readonly").unwrap());
    let mut expected = content.clone();
    expected[9 * 512..11 * 512].fill(1);
    expected[20 * 512..25 * 512].fill(0);
    drop(guest);
    assert_eq!(Guest::boot(&top, "").read(0, SIZE as usize), expected);
    assert_eq!(std::fs::read(&base).unwrap(), content);
}

#[test]
fn an_image_cannot_name_just_any_file() {
    let folder = tempfile::tempdir().unwrap();
    let overlay = |name: &str, behind: &str, format: &str| {
        let path = folder.path().join(name);
        overlay(&path, behind, format);
        refused(&path, ",readonly")
    };
    assert!(overlay("a", "/etc/shadow", "raw").contains("not beside it or below"));
    assert!(overlay("b", "../secret", "raw").contains("qemu-img rebase"));
    assert!(overlay("c", "d", "").contains("raw or qcow2"));
    assert!(overlay("e", "e", "qcow2").contains("behind itself"));
    assert!(overlay("f", "nothing", "raw").contains("no such disk image"));
}

#[test]
fn a_disk_found_to_be_raw_stays_raw() {
    let folder = tempfile::tempdir().unwrap();
    let path = new_image(folder.path(), DiskFormat::Raw, SIZE);
    let mut evil = pattern(4096, 0);
    evil[..4].copy_from_slice(b"QFI\xfb");
    let mut guest = Guest::boot(&path, "");
    assert_eq!(guest.request(OUT, 0, &[Part::Read(&evil)]).0, IO_ERROR);
    let (a, b) = evil.split_at(2);
    assert_eq!(guest.request(OUT, 0, &[Part::Read(a), Part::Read(b)]).0, IO_ERROR);
    assert_eq!(guest.read(0, 4096), [0; 4096]);
    guest.write(1, &evil);
    assert_eq!(guest.read(1, 4096), evil);
    evil[0] = b'R';
    let (a, b) = evil.split_at(700);
    assert_eq!(guest.request(OUT, 0, &[Part::Read(a), Part::Read(b)]).0, OK);
    assert_eq!(guest.read(0, 4096), evil);
    drop(guest);
    evil[0] = b'Q';
    let mut guest = Guest::boot(&path, ",format=raw");
    guest.write(0, &evil);
    drop(guest);
    assert_eq!(std::fs::read(&path).unwrap()[..4096], evil);
}

#[test]
fn what_is_no_image_names_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    assert!(refused(&folder.path().join("none"), "").contains("truncate -s 8G"));
    assert!(refused(folder.path(), "").contains("neither a file nor a block device"));
    assert!(refused(Path::new("/dev/null"), "").contains("neither a file nor a block device"));
    assert!(refused(&file("empty", b""), "").contains("the disk is empty"));
    assert!(refused(&file("short", &[1; 511]), "").contains("the disk is empty"));
    let damaged = file("damaged", &[b"QFI\xfb\0\0\0\x03".as_slice(), &[0xff; 4096]].concat());
    assert!(refused(&damaged, "").contains("qemu-img check"));
    assert!(open(&damaged, ",format=raw").is_ok());
    assert!(refused(&file("raw", &[1; 4096]), ",format=qcow2").contains("format=raw"));
}

#[test]
fn images_full_of_noise_are_refused_or_served() {
    let folder = tempfile::tempdir().unwrap();
    let good = std::fs::read(new_image(folder.path(), DiskFormat::Qcow2, SIZE)).unwrap();
    let path = folder.path().join("noise");
    for at in (4..112).chain((4096..good.len()).step_by(97)) {
        for noise in [0x01, 0x80, 0xff] {
            let mut image = good.clone();
            image[at] ^= noise;
            std::fs::write(&path, &image).unwrap();
            // A size of exabytes is no error, but this disk is not that large.
            let Ok(disk) = open(&path, "") else { continue };
            let features = disk.features();
            let mut guest = Guest::drive(disk, features);
            let (status, _) = guest.request(OUT, 3, &[Part::Read(&[1; 1024])]);
            assert_ne!(status, 0xee);
            let (status, _) = guest.request(IN, 2, &[Part::Write(2048)]);
            assert_ne!(status, 0xee);
        }
    }
}

#[test]
fn past_the_page_cache_alignment_is_taken_care_of() {
    // Not every file system can: then that is what is said.
    for format in BOTH {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = new_image(folder.path(), format, SIZE);
        let disk = match open(&path, ",direct") {
            Ok(disk) => disk,
            Err(error) => {
                assert!(error.to_string().contains("leave out ,direct"), "{error}");
                continue;
            }
        };
        let features = disk.features();
        let mut guest = Guest::drive(disk, features);
        let data = pattern(8 * 512, 1);
        // Neither the pieces nor the sectors are multiples of anything large.
        let (head, tail) = data.split_at(77);
        assert_eq!(guest.request(OUT, 3, &[Part::Read(head), Part::Read(tail)]).0, OK);
        let parts = [Part::Write(1), Part::Write(1535), Part::Write(2560)];
        assert_eq!(guest.request(IN, 3, &parts), (OK, data.clone()));
        assert_eq!(guest.segments(WRITE_ZEROES, &[(4, 1, 0)]), OK);
        drop(guest);
        let mut expected = data;
        expected[512..1024].fill(0);
        assert_eq!(Guest::boot(&path, "").read(3, 8 * 512), expected);
    }
}
