//! Disks of stock kernels, and what is on the images afterwards.
//!
//! The guest's side is `guests/init/devices`; it says what it wrote, and the host looks
//! whether that is there. What the device does request by request is tested beside its code.

#[allow(dead_code, reason = "each of the test programs uses a part of it")]
mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use support::{Finished, Run, after, disk, pty::OnTerminal, skipped};
use vmm::devices::virtio::IoThreads;
use vmm::devices::virtio::block::Block;
use vmm::loader::disk_boot::ImageRead;

const MIB: u64 = 1 << 20;
const CLOUD: &str = "debian12-cloud";

fn with_disk(run: Run, image: &Path, options: &str) -> Run {
    run.option("--disk", "", image, options)
}

/// What the guest says it left on a blank disk is there.
#[track_caller]
fn assert_pattern(finished: &Finished, name: &str, bytes: &[u8]) {
    let said = finished.after(&format!("init: /dev/{name} holds "));
    assert_eq!(said, format!("{} in 4194304 bytes at 1048576", disk::checksum(bytes)));
}

/// Where the guest's pattern lies on an image that is raw.
fn pattern(image: &Path) -> Vec<u8> {
    disk::part(image, MIB, 4 << 20)
}

/// A raw image of what is on a qcow2 one.
fn unpacked(image: &Path) -> std::path::PathBuf {
    let config = format!("{},readonly", image.display()).parse().unwrap();
    let block = Block::open(&config, Arc::clone(&IoThreads::start(1).unwrap()), 1).unwrap();
    let mut bytes = vec![0; usize::try_from(block.size()).unwrap()];
    block.contents().read_at(0, &mut bytes).unwrap();
    let raw = image.with_extension("raw");
    File::create(&raw).unwrap().write_all(&bytes).unwrap();
    raw
}

/// A blank disk and one with ext4, in a run of `kernel` with these words more.
fn blank_and_ext4(kernel: &str, words: &[&str], append: &str) -> Finished {
    let place = tempfile::tempdir().unwrap();
    let blank = disk::raw(&place.path().join("blank.img"), 16 * MIB);
    let ext4 = disk::ext4(&place.path().join("ext4.img"), 64 * MIB);
    let run = Run::with_modules(kernel, "disk").append(append).arguments(words);
    let finished = with_disk(with_disk(run, &blank, ",serial=blank"), &ext4, "").finish();
    finished.assert_good();
    assert_eq!(finished.after("init: /dev/vda has "), "32768 sectors, serial blank");
    assert_pattern(&finished, "vda", &pattern(&blank));
    finished.assert_console("init: PASS vdb-again");
    disk::fsck(&ext4, 0);
    finished
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn raw_images() {
    blank_and_ext4(CLOUD, &[], "");
}

/// As many queues as vCPUs, handled by two threads.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn raw_images_with_two_vcpus_and_two_io_threads() {
    let finished = blank_and_ext4(CLOUD, &["--cpus", "2", "--io", "threads=2"], "");
    finished.assert_console("2/0/0 default/read/poll queues");
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn raw_images_without_message_signalled_interrupts() {
    blank_and_ext4(CLOUD, &["--cpus", "2"], "pci=nomsi");
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn raw_images_of_a_newer_debian() {
    blank_and_ext4("debian-newer", &["--cpus", "2"], "");
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn raw_images_of_the_generic_kernel() {
    blank_and_ext4("debian12-generic", &[], "");
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_readonly_image_and_one_past_the_page_cache() {
    let place = tempfile::tempdir().unwrap();
    let readonly = disk::raw(&place.path().join("readonly.img"), 16 * MIB);
    let direct = disk::ext4(&place.path().join("direct.img"), 64 * MIB);
    let before = fs::read(&readonly).unwrap();
    let run = with_disk(Run::with_modules(CLOUD, "disk"), &readonly, ",readonly");
    // A temporary folder in memory does not know of it.
    let options = if opens_direct(&direct) { ",direct" } else { "" };
    let finished = with_disk(run, &direct, options).finish();
    finished.assert_good();
    finished.assert_console("init: PASS vda-readonly");
    assert!(fs::read(&readonly).unwrap() == before, "somebody wrote to it");
    disk::fsck(&direct, 0);
}

fn opens_direct(path: &Path) -> bool {
    use rustix::fs::{Mode, OFlags};
    let opened = rustix::fs::open(path, OFlags::RDWR | OFlags::DIRECT, Mode::empty());
    if let Err(error) = &opened {
        skipped(format_args!(",direct in {}: {error}", path.display()));
    }
    opened.is_ok()
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn qcow2_images_blank_and_over_another() {
    let place = tempfile::tempdir().unwrap();
    let blank = disk::qcow2(&place.path().join("blank.qcow2"), 16 * MIB, None);
    let base = disk::ext4(&place.path().join("base.img"), 64 * MIB);
    let top = disk::qcow2(&place.path().join("top.qcow2"), 64 * MIB, Some("base.img"));
    let before = fs::read(&base).unwrap();
    let run = with_disk(Run::with_modules(CLOUD, "disk"), &blank, "");
    let finished = with_disk(run, &top, ",format=qcow2").finish();
    finished.assert_good();
    assert_pattern(&finished, "vda", &pattern(&unpacked(&blank)));
    finished.assert_console("init: PASS vdb-again");
    assert!(fs::read(&base).unwrap() == before, "somebody wrote to what lies behind");
    disk::fsck(&unpacked(&top), 0);
    check_qcow2(&top);
    check_qcow2(&blank);
}

/// A second opinion on a qcow2 image, where the host has one.
fn check_qcow2(image: &Path) {
    match Command::new("qemu-img").args(["check", "-q"]).arg(image).output() {
        // 3: clusters that nobody uses, which costs space and nothing else.
        Ok(output) => assert!(
            matches!(output.status.code(), Some(0 | 3)),
            "{}: {}",
            image.display(),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => skipped(format_args!("qemu-img: {error}")),
    }
}

/// The number behind the last `init: durable ` line that came out whole.
fn last_durable(console: &str) -> u64 {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let numbers =
        whole.lines().filter_map(|line| line.split_once("init: durable ")?.1.parse().ok());
    numbers.max().unwrap_or_else(|| panic!("nothing became durable:\n{console}"))
}

/// The number that a later boot finds the last file to have.
fn last_found(console: &str) -> u64 {
    let line = after(console, "files are whole, 0 are not, the last is");
    line.parse().unwrap_or(0)
}

/// Boots, and kills lguest once the guest's promises have reached us; in the next boot, every
/// file the guest had called durable must be there, and every file whole.
fn promises_outlive_a_kill(image: &Path, rounds: u64, after_a_kill: impl Fn(&Path)) {
    let start = || with_disk(Run::with_modules(CLOUD, "fsync"), image, "").start();
    let mut promised = 0;
    for round in 1..=rounds {
        let running = start();
        running.wait_for("init: PASS earlier");
        let found = last_found(&running.console());
        assert!(found >= promised, "round {round}: {promised} was durable, {found} is the last");
        // Each time at another place in the guest's work.
        running.wait_for(&format!("init: durable {}", found + 3));
        std::thread::sleep(Duration::from_millis(70 * round));
        promised = last_durable(&running.kill());
        after_a_kill(image);
    }
    let run = Run::with_modules(CLOUD, "fsync").append("lguest.count=1");
    let finished = with_disk(run, image, "").finish();
    finished.assert_good();
    assert!(last_found(&finished.console) >= promised);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn what_is_durable_outlives_a_kill_on_a_raw_image() {
    let place = tempfile::tempdir().unwrap();
    let image = disk::ext4(&place.path().join("disk.img"), 64 * MIB);
    promises_outlive_a_kill(&image, 3, |image| {
        let copy = image.with_extension("copy");
        fs::copy(image, &copy).unwrap();
        disk::fsck_after_a_crash(&copy);
    });
    disk::fsck(&image, 0);
}

#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn what_is_durable_outlives_a_kill_on_a_qcow2_image() {
    let place = tempfile::tempdir().unwrap();
    disk::ext4(&place.path().join("base.img"), 64 * MIB);
    let image = disk::qcow2(&place.path().join("disk.qcow2"), 64 * MIB, Some("base.img"));
    promises_outlive_a_kill(&image, 2, |image| {
        check_qcow2(image);
        disk::fsck_after_a_crash(&unpacked(image));
    });
    disk::fsck(&unpacked(&image), 0);
}

/// The user quits while the guest writes: what was written stays written.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn quitting_keeps_what_was_written() {
    let place = tempfile::tempdir().unwrap();
    disk::ext4(&place.path().join("base.img"), 64 * MIB);
    let image = disk::qcow2(&place.path().join("disk.qcow2"), 64 * MIB, Some("base.img"));
    let other = disk::raw(&place.path().join("other.img"), 16 * MIB);
    let socket = place.path().join("socket");
    let run = with_disk(Run::with_modules(CLOUD, "fsync"), &image, "");
    let run = with_disk(run, &other, "").option("--net", "unix=", &socket, "");
    let mut lguest = OnTerminal::start(run.command(), Duration::from_secs(240));
    lguest.wait_for("init: durable 5\r");
    assert!(socket.exists());
    lguest.press(b"\x01x");
    assert_eq!(lguest.finish(), Some(6));
    assert!(!socket.exists(), "the socket stays behind");
    lguest.wait_for("lguest: quit");
    let promised = last_durable(&lguest.screen().replace('\r', ""));
    check_qcow2(&image);
    let raw = unpacked(&image);
    disk::fsck_after_a_crash(&raw);
    let run = Run::with_modules(CLOUD, "fsync").append("lguest.count=1");
    let finished = with_disk(run, &raw, "").finish();
    finished.assert_good();
    assert!(last_found(&finished.console) >= promised);
}

/// The driver is taken away and given back while the disk is read.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_driver_that_comes_and_goes() {
    let place = tempfile::tempdir().unwrap();
    let image = disk::raw(&place.path().join("disk.img"), 16 * MIB);
    let run = Run::with_modules(CLOUD, "rebind").arguments(&["--cpus", "2", "--io", "threads=2"]);
    let finished = with_disk(run, &image, "").finish();
    finished.assert_status(0);
    finished.assert_console("init: PASS pattern-5");
    finished.assert_console("init: all checks passed");
    assert_eq!(finished.messages, "");
}

/// The image lies on a file system with less room than the disk has. The guest hears of it
/// as an I/O error, the user by one line, and the guest goes on.
#[test]
#[ignore = "boots a kernel; run by cargo verify"]
fn a_host_without_room() {
    const IN_SMALL_ROOM: &str = "mount -t tmpfs -o size=8M tmpfs \"$0\" &&
        truncate -s 64M \"$0/disk.img\" && exec \"$@\"";
    let place = tempfile::tempdir().unwrap();
    let room = place.path().to_str().unwrap();
    // Mounted in a namespace of its own, it goes away with the run.
    let mut through = vec!["unshare", "--mount"];
    if !rustix::process::geteuid().is_root() {
        through.extend(["--user", "--map-root-user"]);
    }
    through.extend(["sh", "-c", IN_SMALL_ROOM, room]);
    let possible = Command::new(through[0]).args(&through[1..]).arg("true").output().unwrap();
    if !possible.status.success() {
        let why = String::from_utf8_lossy(&possible.stderr).replace('\n', " ");
        return skipped(format_args!("a host without room: no small file system here: {why}"));
    }
    let run = with_disk(Run::with_modules(CLOUD, "full"), &place.path().join("disk.img"), "");
    let finished = run.through(&through).finish();
    finished.assert_status(0);
    finished.assert_console("init: all checks passed");
    finished.assert_console("I/O error, dev vda");
    finished.assert_one_line_of_log("disk.img: cannot write at byte");
    finished.assert_one_line_of_log("No space left on device");
}
