//! Where frames go: what a card's worker asks of a backend.
//!
//! A backend belongs to one worker at a time and never blocks. Its descriptors are
//! registered edge-triggered: it remembers whether it may read or write until the host
//! says that it would block. Nothing it meets is an error to its worker: a peer that is
//! gone is a link that is down.

use std::fmt;
use std::io::Read;

use event_manager::{EventOps, EventSet, Events};

use super::header::Header;

pub(super) mod passt;
pub(super) mod stream;
pub(super) mod tap;
mod tap_ioctl;
pub(super) mod unix;

/// The longest frame: 64 KiB of IP, Ethernet's header and room for VLAN tags less what
/// such a packet cannot have. QEMU, passt and Linux stay within it.
pub(super) const MAX_FRAME: usize = 65_550;

/// What the worker registers besides a backend's descriptors begins here.
pub(super) const FIRST_FREE_TOKEN: u32 = 2;

/// A frame that has come in.
#[derive(Debug)]
pub(super) struct Incoming<'l> {
    /// What is known of it.
    pub header: Header,
    /// Its bytes.
    pub frame: &'l [u8],
}

/// A way out of the guest.
pub(super) trait Backend: fmt::Debug + Send {
    /// The features that depend on who does the work: offloads, and the MTU.
    fn features(&self) -> u64;

    /// The process that it has started, if it is one.
    fn child(&self) -> Option<u32> {
        None
    }

    /// The MTU to tell the driver, in bytes, if `features` has it.
    fn mtu(&self) -> u16 {
        0
    }

    /// A driver is ready that agreed on `features`; `active`: this backend's queue pair
    /// is in use from the start.
    fn start(&mut self, features: u64, active: bool);

    /// Switches the queue behind this backend on or off, where there are several.
    fn set_active(&mut self, active: bool) {
        let _ = active;
    }

    /// Registers the descriptors, whose tokens are below [`FIRST_FREE_TOKEN`].
    fn register(&mut self, ops: &mut EventOps<'_>);

    /// Something has happened to a descriptor.
    fn event(&mut self, token: u32, set: EventSet);

    /// Replaces descriptors that have died. Called when the worker is done for now.
    fn settle(&mut self, ops: &mut EventOps<'_>) {
        let _ = ops;
    }

    /// Whether there is somebody to talk to.
    fn is_up(&self) -> bool;

    /// The next frame that has come in; the same until [`Backend::consume`].
    fn peek(&mut self) -> Option<Incoming<'_>>;

    /// Forgets the frame that [`Backend::peek`] gave.
    fn consume(&mut self);

    /// Whether [`Backend::send`] may be called. If not, an event will come.
    fn can_send(&mut self) -> bool;

    /// Sends a frame of `len` bytes (at most [`MAX_FRAME`]) that `frame` yields, and
    /// returns its first bytes' place in memory, for whoever wants to look at them. It
    /// may stay in a buffer until [`Backend::flush`].
    fn send(&mut self, header: &Header, frame: &mut dyn Read, len: usize) -> &[u8];

    /// Hands on what is buffered, as far as the host takes it.
    fn flush(&mut self);
}

/// Registers a descriptor edge-triggered, for everything.
fn watch<T: std::os::fd::AsRawFd>(ops: &mut EventOps<'_>, source: &T, token: u32) {
    let all = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if let Err(error) = ops.add(Events::with_data(source, token, all)) {
        tracing::error!(%error, "net: the host will not watch a descriptor");
    }
}

/// Takes a descriptor back before it is closed.
fn unwatch<T: std::os::fd::AsRawFd>(ops: &mut EventOps<'_>, source: &T) {
    if let Err(error) = ops.remove(Events::empty(source)) {
        tracing::debug!(%error, "net: a descriptor that nobody watched");
    }
}
