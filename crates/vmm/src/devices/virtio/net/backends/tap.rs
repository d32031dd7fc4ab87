//! `tap=NAME`: an interface of the host, whose kernel does all offloads.
//!
//! Each frame is one read or write, with virtio's own header in front of it (`tun.c`
//! speaks the same 12 bytes). With several queues each has a descriptor of its own.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use event_manager::{EventOps, EventSet};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::super::error::NetError;
use super::super::feature;
use super::super::header::{HEADER_LEN, Header};
use super::tap_ioctl::{self as tun, MULTI_QUEUE, NO_PI, TAP, VNET_HDR};
use super::{Backend, Incoming, MAX_FRAME, unwatch, watch};

const TUN: u32 = 0;
const DEVICE: &str = "/dev/net/tun";

/// What the host's kernel does for the driver, in both directions.
const FEATURES: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN;

/// One queue of a tap interface.
#[derive(Debug)]
pub(in super::super) struct TapBackend {
    name: String,
    tun: File,
    /// There are other queues beside this one.
    multi: bool,
    /// This queue is switched on.
    attached: bool,
    readable: bool,
    writable: bool,
    gone: bool,
    watched: bool,
    input: Box<[u8]>,
    /// Bytes in `input`; none: nothing has been read.
    received: usize,
    /// A frame, and whether it still has to go.
    output: Vec<u8>,
    waiting: bool,
}

fn refused(name: &str, operation: &'static str, error: io::Error) -> NetError {
    let raw = error.raw_os_error().map(Errno::from_raw_os_error);
    let remedy = match (operation, raw) {
        ("opening /dev/net/tun", Some(Errno::NOENT | Errno::NODEV | Errno::NXIO)) => {
            "load it: modprobe tun".to_owned()
        }
        ("opening /dev/net/tun", _) => "let your user open it: chmod 666 /dev/net/tun".to_owned(),
        (_, Some(Errno::PERM)) => {
            format!("make it yours, as root: ip tuntap add {name} mode tap user $USER")
        }
        (_, Some(Errno::BUSY)) => "another process uses it: take another interface".to_owned(),
        (_, Some(Errno::INVAL)) => {
            format!("it is no tap interface: ip tuntap add another one (ip -d link show {name})")
        }
        _ => format!("look at it: ip -d link show {name}"),
    };
    NetError::Tap { name: name.to_owned(), operation, error, remedy }
}

impl TapBackend {
    /// Opens up to `queues` queues of `name`. One that was made for a single queue gives
    /// one.
    ///
    /// # Errors
    /// [`NetError::Tap`].
    pub(in super::super) fn open(name: &str, queues: u16) -> Result<Vec<Self>, NetError> {
        let base = TAP | NO_PI | VNET_HDR;
        if queues > 1 {
            match Self::open_queue(name, base | MULTI_QUEUE, true) {
                Ok(first) => {
                    let mut all = vec![first];
                    for _ in 1..queues {
                        all.push(Self::open_queue(name, base | MULTI_QUEUE, true)?);
                    }
                    return Ok(all);
                }
                Err(NetError::Tap { error, .. })
                    if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) =>
                {
                    tracing::info!(
                        "net: {name} has a single queue (ip tuntap add ... multi_queue)"
                    );
                }
                Err(error) => return Err(error),
            }
        }
        Ok(vec![Self::open_queue(name, base, false)?])
    }

    fn open_queue(name: &str, flags: u16, multi: bool) -> Result<Self, NetError> {
        let failed = |operation| move |error: Errno| refused(name, operation, error.into());
        let tun = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(|error| refused(name, "opening /dev/net/tun", error))?;
        tun::set_interface(&tun, name, flags).map_err(failed("taking the interface"))?;
        tun::set_header_len(&tun, HEADER_LEN as i32)
            .map_err(failed("setting the header's length"))?;
        tun::set_offload(&tun, 0).map_err(failed("setting offloads"))?;
        let room = HEADER_LEN.saturating_add(MAX_FRAME);
        Ok(Self {
            name: name.to_owned(),
            tun,
            multi,
            attached: true,
            readable: true,
            writable: true,
            gone: false,
            watched: false,
            input: vec![0; room].into_boxed_slice(),
            received: 0,
            output: Vec::with_capacity(room),
            waiting: false,
        })
    }

    fn fail(&mut self, error: &io::Error) {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => {}
            _ => {
                let raw = error.raw_os_error().map(Errno::from_raw_os_error);
                // The interface has been deleted under us.
                if matches!(raw, Some(Errno::BADFD | Errno::BADF | Errno::NODEV)) && self.attached {
                    self.gone = true;
                } else {
                    tracing::debug!(name = self.name, %error, "net: a frame is dropped");
                }
            }
        }
    }
}

impl Backend for TapBackend {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn start(&mut self, features: u64, active: bool) {
        let offloads = [
            (feature::GUEST_CSUM, tun::OFFLOAD_CSUM),
            (feature::GUEST_TSO4, tun::OFFLOAD_TSO4),
            (feature::GUEST_TSO6, tun::OFFLOAD_TSO6),
            (feature::GUEST_ECN, tun::OFFLOAD_ECN),
        ];
        let agreed = offloads.iter().filter(|(feature, _)| features & feature != 0);
        let mut wanted = agreed.fold(0, |all, (_, offload)| all | offload);
        // All others presuppose the first (virtio 1.2, 5.1.3.1), for the kernel too.
        if wanted & tun::OFFLOAD_CSUM == 0 {
            wanted = 0;
        }
        if let Err(error) = tun::set_offload(&self.tun, wanted) {
            tracing::warn!(name = self.name, %error, "net: the host will not offload");
        }
        self.received = 0;
        self.set_active(active);
    }

    fn set_active(&mut self, active: bool) {
        if !self.multi || active == self.attached {
            return;
        }
        match tun::set_queue(&self.tun, active) {
            Ok(()) => self.attached = active,
            Err(error) => tracing::warn!(name = self.name, %error, "net: a queue is not switched"),
        }
        self.readable = true;
        self.writable = true;
    }

    fn register(&mut self, ops: &mut EventOps<'_>) {
        self.watched = !self.gone;
        if self.watched {
            (self.readable, self.writable) = (true, true);
            watch(ops, &self.tun, TUN);
        }
    }

    fn event(&mut self, _token: u32, set: EventSet) {
        let broken = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.readable |= broken || set.contains(EventSet::IN);
        self.writable |= broken || set.contains(EventSet::OUT);
    }

    fn settle(&mut self, ops: &mut EventOps<'_>) {
        if self.gone && std::mem::take(&mut self.watched) {
            unwatch(ops, &self.tun);
            tracing::warn!("net: {} is gone, the link is down", self.name);
        }
    }

    fn is_up(&self) -> bool {
        !self.gone
    }

    fn peek(&mut self) -> Option<Incoming<'_>> {
        while self.received < HEADER_LEN {
            if !self.readable || self.gone || !self.attached {
                return None;
            }
            match (&self.tun).read(&mut self.input) {
                Ok(len) => self.received = len,
                Err(error) => {
                    self.readable = error.kind() == ErrorKind::Interrupted;
                    self.fail(&error);
                }
            }
        }
        let (header, frame) = Header::read_from_prefix(self.input.get(..self.received)?).ok()?;
        Some(Incoming { header, frame })
    }

    fn consume(&mut self) {
        self.received = 0;
    }

    fn can_send(&mut self) -> bool {
        self.flush();
        !self.waiting
    }

    fn send(&mut self, header: &Header, frame: &mut dyn Read, len: usize) -> &[u8] {
        let header = Header { num_buffers: 0.into(), ..*header };
        self.output.clear();
        self.output.extend_from_slice(header.as_bytes());
        self.output.resize(HEADER_LEN.saturating_add(len), 0);
        let room = self.output.get_mut(HEADER_LEN..).unwrap_or_default();
        match frame.read_exact(room) {
            Ok(()) => self.waiting = true,
            Err(error) => tracing::debug!(%error, "net: a frame of the guest's is dropped"),
        }
        self.flush();
        self.output.get(HEADER_LEN..).unwrap_or_default()
    }

    fn flush(&mut self) {
        // Frames for a queue that is off, or an interface that is gone, are lost.
        if self.gone || !self.attached {
            self.waiting = false;
        }
        while self.waiting && self.writable {
            match (&self.tun).write(&self.output) {
                Ok(_) => self.waiting = false,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    // The interface is down, or the kernel does not like the header: as
                    // good as lost on the way.
                    self.waiting = false;
                    self.fail(&error);
                }
            }
        }
    }
}
