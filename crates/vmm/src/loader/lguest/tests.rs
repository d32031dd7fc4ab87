//! Kernels made up for these tests: recognised, refused and put into memory.

use lguest_abi::bus::Form;
use vm_memory::{Bytes, GuestAddress};

use super::super::synthetic::*;
use super::*;
use crate::memory::{MIB, MIN_RAM};

/// The text of a kernel of that era, as far as anybody looks at it: its name, and
/// LGUEST_INIT.
fn text(trap: &[u8]) -> Vec<u8> {
    let mut text = b"Linux version 3.12.9\0lguest\0".to_vec();
    text.resize(0x100, 0x90);
    text.extend([&[0xb8, 1, 0, 0, 0, 0xbb, 0, 0, 0x20, 0][..], trap].concat());
    text.resize(0x2000, 0x90);
    text
}

const BASE: u32 = 0x40_0000;

fn vmlinux32(text: Vec<u8>) -> Vec<u8> {
    let len = text.len() as u64;
    elf32(BASE + 0x100, &[Part::load(BASE.into(), text, len + 0x1000)])
}

fn kind(bytes: Vec<u8>) -> Result<PlatformKind, String> {
    platform_of(&Image::from_bytes("kernel", bytes)).map_err(|error| error.to_string())
}

#[test]
fn kernels_are_known_by_their_first_hypercall() {
    for trap in [&[0xcd, 0x1f][..], &[0x0f, 0x01, 0xc1]] {
        assert_eq!(kind(vmlinux32(text(trap))), Ok(PlatformKind::Lguest));
        for format in FORMATS {
            let payload = compress(format, &vmlinux32(text(trap)));
            assert_eq!(kind(bzimage32(&payload, 0x20b)), Ok(PlatformKind::Lguest), "{format}");
        }
        // Older than the header that says where the payload is.
        let payload = compress(super::super::payload::Format::Gzip, &text(trap));
        assert_eq!(kind(bzimage32(&payload, 0x207)), Ok(PlatformKind::Lguest));
    }
    // A system call, not a hypercall; no name; a 64-bit kernel; no kernel at all.
    assert_eq!(kind(vmlinux32(text(&[0xcd, 0x80]))), Ok(PlatformKind::Pc));
    assert_eq!(kind(vmlinux32(text(&[0xcd, 0x1f])[0x40..].to_vec())), Ok(PlatformKind::Pc));
    let part = Part::load(BASE.into(), text(&[0xcd, 0x1f]), 0x2000);
    assert_eq!(kind(elf64(BASE.into(), &[part])), Ok(PlatformKind::Pc));
    assert_eq!(kind(b"no kernel".to_vec()), Ok(PlatformKind::Pc));
}

#[test]
fn signs_are_found_across_the_seams_of_the_search() {
    for shift in 0x3_fff0..0x4_0010 {
        let mut bytes = vec![0x90; shift];
        bytes.extend(text(&[0xcd, 0x1f]));
        assert_eq!(kind(vmlinux32(bytes)), Ok(PlatformKind::Lguest), "{shift:#x}");
    }
}

#[test]
fn the_first_version_is_refused_in_one_line() {
    let mut old = text(&[0xcd, 0x1f]);
    old.extend(b"GenuineLguest");
    let message = kind(vmlinux32(old)).unwrap_err();
    assert!(message.contains("2.6.23") && !message.contains('\n'), "{message}");
}

#[test]
fn the_version_says_where_devices_are() {
    let with = |version: &str| {
        let mut text = text(&[0xcd, 0x1f]);
        let banner = format!("Linux version {version} (gcc)");
        text[0x800..0x800 + banner.len()].copy_from_slice(banner.as_bytes());
        text[..13].fill(0);
        let image = Image::from_bytes("kernel", vmlinux32(text));
        device_form(&image).map_err(|error| error.to_string())
    };
    assert_eq!(with("2.6.24.7"), Ok(DeviceForm::Bus(Form::Tagged)));
    for version in ["4.0", "4.9.13", "4.13.0-rc1"] {
        assert_eq!(with(version), Ok(DeviceForm::Pci), "{version}");
    }
    for version in ["2.6.25", "2.6.39.4", "3.19.8", "what"] {
        assert_eq!(with(version), Ok(DeviceForm::Bus(Form::Packed)), "{version}");
    }
    let pc = device_form(&Image::from_bytes("kernel", b"no kernel".to_vec()));
    assert!(pc.unwrap_err().to_string().contains("CONFIG_LGUEST_GUEST"));
}

fn bzimage32(payload: &[u8], version: u16) -> Vec<u8> {
    let mut file = bzimage(payload, 0x10_0000);
    file[0x206..0x208].copy_from_slice(&version.to_le_bytes());
    file[0x236..0x238].fill(0);
    file[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    file
}

fn load(kernel: Vec<u8>, initrds: &[usize]) -> (GuestRam, Result<LguestGuest, LoadError>) {
    let ram = GuestRam::new(MIN_RAM).unwrap();
    let kernel = Image::from_bytes("kernel", kernel);
    let initrds: Vec<Image> =
        initrds.iter().map(|len| Image::from_bytes("initrd", vec![0xaa; *len])).collect();
    let source = BootSource {
        kernel: &kernel,
        initrds: &initrds,
        command_line: "root=/dev/vda",
        cpus: std::num::NonZeroU32::MIN,
    };
    let guest = load_lguest(&ram, MIN_RAM as u32, &source);
    (ram, guest)
}

fn bytes(ram: &GuestRam, at: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.mmap().read_slice(&mut bytes, GuestAddress(at.into())).unwrap();
    bytes
}

#[test]
fn a_vmlinux_lies_where_it_is_linked_beside_what_it_is_told() {
    let payload = compress(super::super::payload::Format::Gzip, &vmlinux32(text(&[0xcd, 0x1f])));
    for kernel in [vmlinux32(text(&[0xcd, 0x1f])), bzimage32(&payload, 0x20b)] {
        let (ram, guest) = load(kernel, &[5000]);
        assert_eq!(guest.unwrap(), LguestGuest { entry: BASE + 0x100, initrd: 8192 });
        assert_eq!(bytes(&ram, BASE, 0x2000), text(&[0xcd, 0x1f]));
        let word = |at: u32| u32::from_le_bytes(bytes(&ram, at, 4).try_into().unwrap());
        let mem = MIN_RAM as u32;
        assert_eq!((word(0x2d0), word(0x2d8), word(0x2e0)), (0, mem, 1));
        assert_eq!((word(0x218), word(0x21c)), (mem - 8192, 8192));
        assert_eq!((word(0x23c), word(0x228), word(0x230)), (1, 0x1000, 16 << 20));
        assert_eq!(bytes(&ram, 0x206, 2), [7, 2]);
        assert_eq!(bytes(&ram, 0x1e8, 1), [1]);
        assert_eq!(bytes(&ram, 0x1000, 14), b"root=/dev/vda\0");
        assert_eq!(bytes(&ram, mem - 8192, 5001), [vec![0xaa; 5000], vec![0]].concat());
    }
}

#[test]
fn an_old_bzimage_unpacks_itself() {
    let payload = compress(super::super::payload::Format::Gzip, &text(&[0xcd, 0x1f]));
    let file = bzimage32(&payload, 0x207);
    let (ram, guest) = load(file.clone(), &[]);
    assert_eq!(guest.unwrap(), LguestGuest { entry: 0x10_0000, initrd: 0 });
    let code = (usize::from(file[0x1f1]) + 1) * 512;
    assert_eq!(bytes(&ram, 0x10_0000, file.len() - code), &file[code..]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let part = Part::load(BASE.into(), text(&[0xcd, 0x1f]), 64 * MIB);
    let (_, guest) = load(elf32(BASE + 0x100, &[part]), &[]);
    assert!(guest.unwrap_err().to_string().contains("--mem"));
    let part = Part::load(0x1800, text(&[0xcd, 0x1f]), 0x2000);
    let (_, guest) = load(elf32(0x1900, &[part]), &[]);
    assert!(guest.unwrap_err().to_string().contains("overlap"));
}
