//! The requests that `/dev/net/tun` understands (Linux: `linux/if_tun.h`).
//!
//! The only `unsafe` of the network card: each request's number comes with the type
//! that the kernel reads or writes for it.

use std::os::fd::AsFd;

use rustix::io;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl, opcode};

/// `TUNSETIFF`.
const SET_INTERFACE: Opcode = opcode::write::<i32>(b'T', 202);
/// `TUNSETOFFLOAD`.
const SET_OFFLOAD: Opcode = opcode::write::<u32>(b'T', 208);
/// `TUNSETVNETHDRSZ`.
const SET_HEADER_LEN: Opcode = opcode::write::<i32>(b'T', 216);
/// `TUNSETQUEUE`.
const SET_QUEUE: Opcode = opcode::write::<i32>(b'T', 217);

/// `IFF_TAP`: frames, not packets.
pub(super) const TAP: u16 = 0x0002;
/// `IFF_MULTI_QUEUE`.
pub(super) const MULTI_QUEUE: u16 = 0x0100;
/// `IFF_ATTACH_QUEUE`.
pub(super) const ATTACH_QUEUE: u16 = 0x0200;
/// `IFF_DETACH_QUEUE`.
pub(super) const DETACH_QUEUE: u16 = 0x0400;
/// `IFF_NO_PI`: no packet information in front of frames.
pub(super) const NO_PI: u16 = 0x1000;
/// `IFF_VNET_HDR`: but virtio's header.
pub(super) const VNET_HDR: u16 = 0x4000;

/// `TUN_F_CSUM`: we take frames whose checksum is not filled in.
pub(super) const OFFLOAD_CSUM: u32 = 1;
/// `TUN_F_TSO4`: and large TCP segments over IPv4.
pub(super) const OFFLOAD_TSO4: u32 = 2;
/// `TUN_F_TSO6`: and over IPv6.
pub(super) const OFFLOAD_TSO6: u32 = 4;
/// `TUN_F_TSO_ECN`: and those with congestion bits.
pub(super) const OFFLOAD_ECN: u32 = 8;

/// `struct ifreq`, as far as these requests use it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(name: &str, flags: u16) -> Self {
        let mut bytes = [0; 16];
        // The last byte stays zero.
        for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        Self { name: bytes, flags, rest: [0; 22] }
    }
}

/// Makes `tun` a queue of the interface `name`.
pub(super) fn set_interface(tun: impl AsFd, name: &str, flags: u16) -> io::Result<()> {
    let mut request = InterfaceRequest::new(name, flags);
    // SAFETY: TUNSETIFF reads and writes one ifreq, 40 bytes on this architecture, which
    // is what `request` is and lives through the call.
    unsafe { ioctl(tun, Updater::<SET_INTERFACE, _>::new(&mut request)) }
}

/// Switches this queue on or off.
pub(super) fn set_queue(tun: impl AsFd, attach: bool) -> io::Result<()> {
    let flags = if attach { ATTACH_QUEUE } else { DETACH_QUEUE };
    let mut request = InterfaceRequest::new("", flags);
    // SAFETY: TUNSETQUEUE reads one ifreq, which is what `request` is.
    unsafe { ioctl(tun, Updater::<SET_QUEUE, _>::new(&mut request)) }
}

/// How long the header in front of frames is, in bytes.
pub(super) fn set_header_len(tun: impl AsFd, len: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int through the pointer that Setter makes.
    unsafe { ioctl(tun, Setter::<SET_HEADER_LEN, i32>::new(len)) }
}

/// What we take: `OFFLOAD_` constants.
pub(super) fn set_offload(tun: impl AsFd, offloads: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes flags by value and touches no memory of ours.
    unsafe { ioctl(tun, IntegerSetter::<SET_OFFLOAD>::new_usize(offloads as usize)) }
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40, "struct ifreq");
