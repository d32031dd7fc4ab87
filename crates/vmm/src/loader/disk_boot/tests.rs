//! Finding kernels on real ext4 file systems, made by `mkfs.ext4 -d` (e2fsprogs, which every
//! Debian has), within tables made here.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use gpt_disk_io::gpt_disk_types::{
    BlockSize, GptHeader, GptPartitionEntry, GptPartitionEntryArray, GptPartitionType, LbaLe,
    U32Le, guid,
};
use gpt_disk_io::{BlockIoAdapter, Disk};
use proptest::prelude::*;

use super::*;
use crate::loader::fuzz::fuzz_disk_boot;

const UUID: &str = "11111111-2222-3333-4444-555555555555";
const OTHER_UUID: &str = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee";
const PARTUUID: &str = "6f1e3c50-6b5c-4a8e-8f4b-0d6f6f1f2a02";

/// Something in a tree: a file's path and contents, or a link's ("path -> target").
type Entry<'e> = (&'e str, &'e str);

/// A file system with these files; parameters for mkfs may say more.
fn ext4(kib: u32, uuid: &str, parameters: &[&str], entries: &[Entry<'_>]) -> Vec<u8> {
    let tree = tempfile::tempdir().unwrap();
    for (path, contents) in entries {
        let (path, target) = path.split_once(" -> ").unwrap_or((path, ""));
        let at = tree.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        match target {
            "" if path.ends_with('/') => fs::create_dir_all(at).unwrap(),
            "" => fs::write(at, contents).unwrap(),
            target => symlink(target, at).unwrap(),
        }
    }
    make(tree.path(), kib, uuid, parameters)
}

fn make(tree: &Path, kib: u32, uuid: &str, parameters: &[&str]) -> Vec<u8> {
    let image = tempfile::NamedTempFile::new().unwrap();
    let made = Command::new("mkfs.ext4")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-U", uuid, "-d"])
        .arg(tree)
        .args(parameters)
        .arg(image.path())
        .arg(format!("{kib}k"))
        .output()
        .expect("mkfs.ext4 is needed: install e2fsprogs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    fs::read(image.path()).unwrap()
}

fn boot(image: Vec<u8>) -> Result<BootFiles, DiskBootError> {
    let image: Rc<dyn ImageRead> = Rc::new(image);
    find(&image, "disk.img")
}

fn contents(image: &Image) -> String {
    String::from_utf8(image.bytes_at(0, 1 << 20).unwrap()).unwrap()
}

/// Kernel, initrds and command line in one line.
fn summary(image: Vec<u8>) -> String {
    let files = boot(image).unwrap();
    let initrds: Vec<String> = files.initrds.iter().map(contents).collect();
    format!("{} [{}] {}", contents(&files.kernel), initrds.join(" "), files.command_line)
}

/// Puts file systems into partitions of an MBR, at whole megabytes.
fn mbr(systems: &[Vec<u8>]) -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    disk[440..444].copy_from_slice(&0x0bad_cafeu32.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    for (slot, system) in systems.iter().enumerate() {
        let at = 446 + 16 * slot;
        disk[at + 4] = 0x83;
        let start = (disk.len() / 512) as u32;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&((system.len() / 512) as u32).to_le_bytes());
        disk.extend(system);
        disk.resize(disk.len().next_multiple_of(1 << 20), 0);
    }
    disk
}

/// Puts a file system into the second partition of a GPT.
fn gpt(system: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1 << 20];
    image.extend(system);
    image.resize(image.len() + (1 << 20), 0);
    let last = (image.len() / 512 - 1) as u64;
    let mut first = GptHeader {
        my_lba: LbaLe::from_u64(1),
        alternate_lba: LbaLe::from_u64(last),
        partition_entry_lba: LbaLe::from_u64(2),
        number_of_partition_entries: U32Le::from_u32(128),
        ..Default::default()
    };
    let layout = first.get_partition_entry_array_layout().unwrap();
    let mut storage = vec![0; 32 * 512];
    let mut entries = GptPartitionEntryArray::new(layout, BlockSize::BS_512, &mut storage).unwrap();
    *entries.get_partition_entry_mut(1).unwrap() = GptPartitionEntry {
        partition_type_guid: GptPartitionType(guid!("0fc63daf-8483-4772-8e79-3d69d8477de4")),
        unique_partition_guid: PARTUUID.parse().unwrap(),
        starting_lba: LbaLe::from_u64(2048),
        ending_lba: LbaLe::from_u64(2047 + system.len() as u64 / 512),
        ..Default::default()
    };
    first.partition_entry_array_crc32 = entries.calculate_crc32();
    first.update_header_crc32();
    let mut second = GptHeader {
        my_lba: first.alternate_lba,
        alternate_lba: first.my_lba,
        partition_entry_lba: LbaLe::from_u64(last - 32),
        ..first
    };
    second.update_header_crc32();
    let mut block = [0; 512];
    let mut disk = Disk::new(BlockIoAdapter::new(&mut image[..], BlockSize::BS_512)).unwrap();
    disk.write_protective_mbr(&mut block).unwrap();
    disk.write_primary_gpt_header(&first, &mut block).unwrap();
    disk.write_secondary_gpt_header(&second, &mut block).unwrap();
    disk.write_gpt_partition_entry_array(&entries).unwrap();
    entries.set_start_lba(second.partition_entry_lba.into());
    disk.write_gpt_partition_entry_array(&entries).unwrap();
    drop(disk);
    image
}

/// As Debian leaves it when no boot loader is installed.
const DEBIAN: &[Entry<'_>] = &[
    ("/boot/vmlinuz-6.1.0-9", "old"),
    ("/boot/initrd.img-6.1.0-9", "old initrd"),
    ("/boot/vmlinuz-6.1.0-10", "kernel"),
    ("/boot/initrd.img-6.1.0-10", "initrd"),
    ("/etc/fstab", ""),
];

#[test]
fn the_newest_kernel_is_taken_with_its_initrd() {
    let expected = format!("kernel [initrd] root=UUID={UUID} ro");
    assert_eq!(summary(ext4(8192, UUID, &[], DEBIAN)), expected);
    assert_eq!(summary(gpt(&ext4(8192, UUID, &[], DEBIAN))), expected);
    assert_eq!(summary(mbr(&[ext4(8192, UUID, &[], DEBIAN)])), expected);
    // ext2 and ext3, and with blocks of another size.
    for parameters in
        [["-O", "^extents,^64bit,^has_journal"], ["-O", "^extents,^64bit"], ["-b", "1024"]]
    {
        assert_eq!(summary(ext4(8192, UUID, &parameters, DEBIAN)), expected, "{parameters:?}");
    }
    let suse = [("/boot/vmlinuz-1", "k"), ("/boot/initrd-1", "i"), ("/etc/", "")];
    assert!(summary(ext4(2048, UUID, &[], &suse)).starts_with("k [i] "));
}

#[test]
fn debians_links_come_before_version_numbers() {
    let links = [
        ("/vmlinuz -> boot/vmlinuz-6.1.0-9", ""),
        ("/initrd.img -> boot/initrd.img-6.1.0-9", ""),
        ("/etc/default/grub", "GRUB_CMDLINE_LINUX=\"net.ifnames=0\"\n"),
    ];
    let image = ext4(8192, UUID, &[], &[DEBIAN, &links].concat());
    assert_eq!(
        summary(image.clone()),
        format!("old [old initrd] root=UUID={UUID} ro net.ifnames=0")
    );
    assert_eq!(boot(image).unwrap().kernel.name(), "disk.img:/boot/vmlinuz-6.1.0-9");
    // A link that leads nowhere is passed over.
    let dangling = [("/vmlinuz -> boot/vmlinuz-5", ""), ("/initrd.img -> initrd.img", "")];
    assert!(summary(ext4(8192, UUID, &[], &[DEBIAN, &dangling].concat())).starts_with("kernel "));
}

#[test]
fn the_boot_loaders_configuration_comes_first() {
    let config = "menuentry 'x' {\n linux /boot/vmlinuz-6.1.0-9 root=LABEL=r ro console=tty0\n \
                  initrd /boot/initrd.img-6.1.0-9\n}\n";
    let grub = [("/boot/grub/grub.cfg", config)];
    let image = ext4(8192, UUID, &[], &[DEBIAN, &grub].concat());
    assert_eq!(summary(image), "old [old initrd] root=LABEL=r ro console=tty0");
    // One that is older than the files does not count.
    let stale = [("/boot/grub/grub.cfg", "menuentry {\nlinux /boot/vmlinuz-4 root=/dev/sda\n}\n")];
    assert!(summary(ext4(8192, UUID, &[], &[DEBIAN, &stale].concat())).starts_with("kernel "));
}

#[test]
fn boot_may_be_a_partition_of_its_own() {
    let entry =
        "title Linux\nversion 6.9\nlinux /vmlinuz-6.9\ninitrd /initramfs-6.9.img\noptions ro\n";
    let boot = [
        ("/vmlinuz-6.9", "kernel"),
        ("/initramfs-6.9.img", "initrd"),
        ("/vmlinuz-0-rescue-12", "rescue"),
    ];
    let root = ext4(2048, OTHER_UUID, &[], &[("/etc/fstab", ""), ("/boot/", "")]);
    let plain = ext4(2048, UUID, &[], &boot);
    assert_eq!(
        summary(mbr(&[plain.clone(), root.clone()])),
        format!("kernel [initrd] root=UUID={OTHER_UUID} ro")
    );
    let with_entry = [&boot[..], &[("/loader/entries/a.conf", entry)]].concat();
    let configured = ext4(2048, UUID, &[], &with_entry);
    assert_eq!(
        summary(mbr(&[root, configured])),
        format!("kernel [initrd] root=UUID={OTHER_UUID} ro ro")
    );
    // Without a root file system that can be recognised, it is the user's to say.
    assert_eq!(summary(mbr(&[plain])), "kernel [initrd] ");
}

#[test]
fn without_an_initrd_the_kernel_must_find_its_root_itself() {
    let files = [("/boot/vmlinuz-1", "kernel"), ("/etc/fstab", "")];
    let system = ext4(2048, UUID, &[], &files);
    assert_eq!(summary(gpt(&system)), format!("kernel [] root=PARTUUID={PARTUUID} ro"));
    assert_eq!(
        summary(mbr(std::slice::from_ref(&system))),
        "kernel [] root=PARTUUID=0badcafe-01 ro"
    );
    assert_eq!(summary(system), "kernel [] root=/dev/vda ro");
}

#[test]
fn the_second_partition_table_stands_in_for_the_first() {
    let mut image = gpt(&ext4(2048, UUID, &[], &[("/boot/vmlinuz-1", "kernel"), ("/etc/", "")]));
    image[512 + 24] ^= 1;
    assert_eq!(summary(image), format!("kernel [] root=PARTUUID={PARTUUID} ro"));
}

#[test]
fn what_is_missing_is_said_with_the_remedy() {
    let error = |image| boot(image).unwrap_err().to_string();
    for image in [vec![], vec![0; 100], vec![0; 1 << 20], gpt(&[1; 4096])] {
        let said = error(image);
        assert!(said.starts_with("disk.img: no ext4 file system"), "{said}");
        assert!(said.contains("--kernel"), "{said}");
    }
    let said = error(ext4(2048, UUID, &[], &[("/etc/fstab", "")]));
    assert!(said.starts_with("disk.img: no kernel in its /boot"), "{said}");
    // A directory, a loop and nothing at all are no kernels.
    let odd =
        [("/boot/vmlinuz-1/", ""), ("/boot/vmlinuz-2 -> vmlinuz-2", ""), ("/vmlinuz -> /", "")];
    assert!(error(ext4(2048, UUID, &[], &odd)).contains("no kernel"));

    let mut damaged = ext4(8192, UUID, &[], DEBIAN);
    damaged[1024 + 0x68] ^= 1;
    let said = error(damaged);
    assert!(said.contains("at byte 0") && said.contains("run e2fsck"), "{said}");
    let mut cut = mbr(&[ext4(8192, UUID, &[], DEBIAN)]);
    cut.truncate(3 << 20);
    assert!(error(cut).contains("no ext4"));
}

#[test]
fn a_file_system_that_claims_to_be_huge_takes_no_memory() {
    let mut image = seeds().swap_remove(0).1;
    image[1024 + 0x4..1024 + 0x8].copy_from_slice(&u32::MAX.to_le_bytes());
    image[1024 + 0x20..1024 + 0x24].copy_from_slice(&1u32.to_le_bytes());
    let said = boot(image).unwrap_err().to_string();
    assert!(said.contains("too many block groups"), "{said}");
}

#[test]
fn a_file_that_claims_to_be_huge_is_refused() {
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir(tree.path().join("boot")).unwrap();
    let huge = fs::File::create(tree.path().join("boot/vmlinuz-1")).unwrap();
    huge.set_len(600 << 20).unwrap();
    let said = boot(make(tree.path(), 4096, UUID, &[])).unwrap_err().to_string();
    assert!(said.starts_with("disk.img:/boot/vmlinuz-1: 629145600 bytes are too much"), "{said}");
}

/// Small enough to be seeds, and without checksums, which would keep mutations out.
fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let small = |entries: &[Entry<'_>]| {
        ext4(
            96,
            UUID,
            &["-b", "1024", "-N", "32", "-O", "^metadata_csum,^has_journal,^resize_inode"],
            entries,
        )
    };
    let config = "menuentry 'x' {\n linux /vmlinuz-1 ro\n initrd /initrd.img-1\n}\n";
    let entry = "version 1\nlinux /vmlinuz-1\noptions ro\n";
    let grub = [("/grub/grub.cfg", config), ("/vmlinuz-1", "k"), ("/initrd.img-1", "i")];
    let entries = [("/loader/entries/1.conf", entry), ("/vmlinuz-1", "k")];
    let journal = ["-b", "1024", "-N", "32", "-O", "^metadata_csum,^resize_inode", "-J", "size=1"];
    vec![
        (
            "links",
            small(&[("/boot/vmlinuz-1", "k"), ("/vmlinuz -> boot/vmlinuz-1", ""), ("/etc/", "")]),
        ),
        ("grub", small(&grub)),
        ("entries", small(&entries)),
        (
            "ext2",
            ext4(
                96,
                UUID,
                &[
                    "-b",
                    "1024",
                    "-N",
                    "32",
                    "-O",
                    "^extents,^64bit,^metadata_csum,^has_journal,^resize_inode",
                ],
                &grub,
            ),
        ),
        ("journal", ext4(2400, UUID, &journal, &grub)),
    ]
}

/// The seeds of the fuzz target. Run with `--ignored` after changing what is read.
#[test]
#[ignore = "writes the corpus into the source tree"]
fn write_corpus() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz_corpus/disk_boot");
    fs::create_dir_all(directory).unwrap();
    for (name, image) in seeds() {
        if name != "journal" {
            fs::write(format!("{directory}/{name}"), image).unwrap();
        }
    }
    let mut tables = mbr(&[]);
    tables.truncate(4096);
    fs::write(format!("{directory}/mbr"), tables).unwrap();
    let mut tables = gpt(&[]);
    tables.truncate(8192);
    fs::write(format!("{directory}/gpt"), tables).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Flips where the file system's structures are; every seed with every set of flips.
    #[test]
    fn damaged_file_systems_never_panic(
        flips in prop::collection::vec((0..40_000usize, any::<u8>()), 1..200),
        head in prop::collection::vec((1024..4096usize, any::<u8>()), 0..4),
    ) {
        static SEEDS: std::sync::OnceLock<Vec<(&'static str, Vec<u8>)>> = std::sync::OnceLock::new();
        for (_, seed) in SEEDS.get_or_init(seeds) {
            for part in [&flips, &head] {
                let mut image = seed.clone();
                for (at, value) in part {
                    image[*at] = *value;
                }
                fuzz_disk_boot(&image);
            }
        }
    }
}

/// A real disk, for looking at by hand.
#[test]
#[ignore = "set LGUEST_DISK to a raw image or a block device"]
fn a_real_disk_has_a_kernel() {
    let path = std::env::var("LGUEST_DISK").unwrap();
    let image: Rc<dyn ImageRead> = Rc::new(fs::File::open(&path).unwrap());
    let started = std::time::Instant::now();
    let files = find(&image, &path).unwrap();
    println!("{} ({} bytes)", files.kernel.name(), files.kernel.len());
    for initrd in &files.initrds {
        println!("{} ({} bytes)", initrd.name(), initrd.len());
    }
    println!("{} in {:?}", files.command_line, started.elapsed());
}
