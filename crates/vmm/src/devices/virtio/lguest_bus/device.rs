//! One device on the bus: what it offers, and when it starts and stops.

use std::sync::Arc;

use lguest_abi::bus::{DeviceDesc, Form, VRING_ALIGN, VqConfig, status, tagged, write_entry};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::super::{
    ActivateError, Activation, DeviceKind, DeviceQueue, DriverSignal, VirtioDevice, feature,
};
use super::BusError;
use super::signal::BusSignal;
use crate::devices::InterruptLine;
use crate::memory::GuestMemory;

/// Bytes of features: 32 bits are all that drivers look at.
const FEATURE_BYTES: usize = 4;
/// Features of the ring. A driver from before them has not seen its own acceptance through
/// when it starts, so they are never assumed.
const RING_FEATURES: u64 = feature::INDIRECT_DESC | feature::EVENT_IDX;
const PAGE_SHIFT: u32 = 12;

/// What the old drivers of a kind know: features, and the length of its configuration.
fn known(kind: DeviceKind) -> (u64, usize) {
    use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX};
    match kind {
        DeviceKind::Block => {
            let features = [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_FLUSH];
            // Capacity, size_max, seg_max, geometry, blk_size, and the rest of the first 36.
            (features.iter().fold(0, |all, bit| all | 1 << bit), 36)
        }
        DeviceKind::Console | DeviceKind::Entropy => (0, 0),
        DeviceKind::Net => {
            use virtio_bindings::virtio_net::{
                VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
                VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
                VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
                VIRTIO_NET_F_MRG_RXBUF,
            };
            let checksums = [VIRTIO_NET_F_MAC, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM];
            let guest = [VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN];
            let host = [VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN];
            // The Launchers of those days did not merge buffers, and drivers of some of the
            // last kernels on this bus lose every frame without it.
            let merging = [VIRTIO_NET_F_MRG_RXBUF; 3];
            let features = [checksums, guest, host, merging];
            // The address, and two bytes of status that nobody is offered.
            (features.as_flattened().iter().fold(0, |all, bit| all | 1 << bit), 8)
        }
    }
}

/// The queues that its old drivers look for: a card's control queue came with features that
/// are not offered here.
pub(super) fn queue_sizes(core: &dyn VirtioDevice) -> &[u16] {
    let sizes = core.queue_sizes();
    match core.kind() {
        DeviceKind::Net => sizes.get(..2).unwrap_or(sizes),
        DeviceKind::Block | DeviceKind::Console | DeviceKind::Entropy => sizes,
    }
}

/// Writes the entry of a core at `at` in the descriptor page, and returns where the next one
/// begins; `None` if there is no room.
pub(super) fn describe(
    core: &dyn VirtioDevice,
    form: Form,
    page: &mut [u8],
    at: usize,
    queues: &[VqConfig],
) -> Option<usize> {
    let kind = core.kind() as u8;
    let (_, config_len) = known(core.kind());
    let mut config = vec![0; config_len];
    core.read_config(0, &mut config);
    match form {
        Form::Packed => {
            let features = (features(core) as u32).to_le_bytes();
            write_entry(page, at, kind, queues, &features, &config)
        }
        Form::Tagged => {
            let queues: Vec<_> = queues.iter().map(|queue| queue.to_bytes()).collect();
            let queues = queues.iter().map(|queue| (tagged::VIRTQUEUE, queue.as_slice()));
            let offered = features(core);
            let parts = tagged_parts(core.kind()).iter();
            let parts = parts.filter(|(bit, ..)| bit.is_none_or(|bit| offered & 1 << bit != 0));
            let parts = parts
                .filter_map(|(_, tag, range)| Some((*tag, config.get(range.start..range.end)?)));
            tagged::write_entry(page, at, kind, &queues.chain(parts).collect::<Vec<_>>())
        }
    }
}

/// A part of a configuration: the feature it comes with, its tag, where it is.
type TaggedPart = (Option<u32>, u8, std::ops::Range<usize>);

/// What 2.6.24 wants to know of a configuration. Its features had other numbers and are not
/// offered: a device does without any.
const fn tagged_parts(kind: DeviceKind) -> &'static [TaggedPart] {
    use virtio_bindings::virtio_blk::VIRTIO_BLK_F_SEG_MAX;
    use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
    match kind {
        DeviceKind::Block => &[
            (None, tagged::BLOCK_CAPACITY, 0..8),
            (Some(VIRTIO_BLK_F_SEG_MAX), tagged::BLOCK_SEG_MAX, 12..16),
        ],
        DeviceKind::Net => &[(Some(VIRTIO_NET_F_MAC), tagged::NET_MAC, 0..6)],
        DeviceKind::Console | DeviceKind::Entropy => &[],
    }
}

/// What is offered here: of the core's own what its old drivers know, and the ring's.
fn features(core: &dyn VirtioDevice) -> u64 {
    let (known, _) = known(core.kind());
    core.features() & known | RING_FEATURES
}

/// A core in its place.
#[derive(Debug)]
pub(super) struct BusDevice {
    core: Box<dyn VirtioDevice>,
    form: Form,
    /// The physical address of its descriptor.
    entry: u64,
    queues: Vec<VqConfig>,
    kicks: Vec<Arc<EventFd>>,
    signal: Arc<BusSignal>,
    started: bool,
}

impl BusDevice {
    pub(super) fn new(
        core: Box<dyn VirtioDevice>,
        form: Form,
        entry: u64,
        queues: Vec<VqConfig>,
        lines: Vec<InterruptLine>,
    ) -> Result<Self, BusError> {
        let kicks = queues.iter().map(|_| DeviceQueue::new_kick()).collect::<Result<_, _>>()?;
        let signal = Arc::new(BusSignal::new(lines));
        Ok(Self { core, form, entry, queues, kicks, signal, started: false })
    }

    pub(super) const fn entry(&self) -> u64 {
        self.entry
    }

    /// Where the features lie that the guest accepts, if it says so anywhere.
    fn accepted_at(&self) -> Option<GuestAddress> {
        let queues = (self.queues.len() as u64).saturating_mul(8);
        let header = size_of::<DeviceDesc>() as u64;
        let behind = header.saturating_add(queues).saturating_add(FEATURE_BYTES as u64);
        (self.form == Form::Packed).then(|| GuestAddress(self.entry.saturating_add(behind)))
    }

    /// What it accepts, if it says so anywhere; 0 before it does.
    fn accepted(&self, memory: &GuestMemory) -> Option<u32> {
        self.accepted_at().map(|at| memory.read_obj(at).unwrap_or(0))
    }

    fn status(&self, memory: &GuestMemory) -> u8 {
        let at = GuestAddress(self.entry.saturating_add(self.form.status_at() as u64));
        memory.read_obj(at).unwrap_or(0)
    }

    /// The guest has written the status byte, and says so.
    pub(super) fn status_changed(&mut self, memory: &Arc<GuestMemory>) {
        let now = self.status(memory);
        if now == 0 {
            self.reset(memory);
        } else if now & status::FAILED != 0 {
            tracing::warn!(device = %self.core.kind(), "its driver has given up");
            self.stop();
        } else if now & status::DRIVER_OK != 0 {
            self.start(memory);
        }
    }

    /// Whether `address` is that of one of its rings, which is then kicked.
    pub(super) fn kicked(&mut self, address: u64, memory: &Arc<GuestMemory>) -> bool {
        let ring = |queue: &VqConfig| u64::from(queue.pfn) << PAGE_SHIFT;
        let Some(at) = self.queues.iter().position(|queue| ring(queue) == address) else {
            return false;
        };
        if self.core.kind() != DeviceKind::Net || self.says_what_it_accepts(memory) {
            self.start(memory);
        }
        if let Some(kick) = self.kicks.get(at)
            // Its counter is full: it has been told often enough.
            && let Err(error) = kick.write(1)
        {
            tracing::debug!(%error, "a notification is lost");
        }
        true
    }

    /// Whether the features in the descriptor are those the driver uses the device by. Until
    /// 2.6.30 they are written after probing; a disk is read by then, and its requests have
    /// one form, but frames have several, and wait.
    fn says_what_it_accepts(&self, memory: &GuestMemory) -> bool {
        let accepted = self.accepted(memory);
        accepted.is_none_or(|bits| bits != 0) || self.status(memory) & status::DRIVER_OK != 0
    }

    fn start(&mut self, memory: &Arc<GuestMemory>) {
        if self.started || self.signal.is_stuck() {
            return;
        }
        self.started = true;
        if let Err(error) = self.activate(memory) {
            tracing::warn!(device = %self.core.kind(), %error, "a device does not start");
            self.signal.needs_reset();
        }
    }

    fn activate(&mut self, memory: &Arc<GuestMemory>) -> Result<(), ActivateError> {
        let offered = features(self.core.as_ref());
        let features = match self.accepted(memory).map(|bits| u64::from(bits) & offered) {
            None => feature::FIRST_HEADERS,
            // Until 2.6.30 a driver uses its device before it has said what it accepts.
            Some(0) if !self.says_what_it_accepts(memory) => offered & !RING_FEATURES,
            Some(accepted) => accepted,
        };
        let event_idx = features & feature::EVENT_IDX != 0;
        let mut queues = Vec::new();
        for ((place, kick), index) in self.queues.iter().zip(&self.kicks).zip(0_u16..) {
            let queue = old_ring(place, event_idx).map_err(std::io::Error::other)?;
            let way = Arc::clone(&self.signal) as Arc<dyn DriverSignal>;
            let queue = DeviceQueue::new(index, queue, Arc::clone(memory), way, Arc::clone(kick));
            queues.push(queue.map_err(std::io::Error::other)?);
        }
        tracing::debug!(device = %self.core.kind(), features, "starts");
        let signal = Arc::clone(&self.signal) as Arc<dyn DriverSignal>;
        self.core.activate(Activation { features, memory: Arc::clone(memory), queues, signal })
    }

    /// The machine ends.
    pub(super) fn shut_down(&mut self) {
        self.core.shut_down();
    }

    /// Stops the core: nothing of it touches guest memory any more.
    fn stop(&mut self) {
        self.core.reset();
        self.started = false;
    }

    /// The driver has reset it: rings and accepted features are cleared for the next one.
    fn reset(&mut self, memory: &GuestMemory) {
        self.stop();
        self.signal.reset();
        for kick in &self.kicks {
            // A notification from before means nothing afterwards; mostly there is none.
            let _ = kick.read();
        }
        let page = [0_u8; 1 << PAGE_SHIFT];
        let rings = self.queues.iter().flat_map(|queue| {
            (0..VqConfig::ring_pages(queue.num)).map(|n| queue.pfn.saturating_add(n))
        });
        for frame in rings {
            let at = GuestAddress(u64::from(frame) << PAGE_SHIFT);
            // These pages are RAM by construction.
            let _ = memory.write_slice(&page, at);
        }
        if let Some(at) = self.accepted_at() {
            let _ = memory.write_obj(0_u32, at);
        }
    }
}

/// A ring of the old form: descriptors, what is available, and on its own page what is
/// used (virtio 0.9.5, 2.3).
fn old_ring(place: &VqConfig, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
    let num = u64::from(place.num);
    let start = u64::from(place.pfn) << PAGE_SHIFT;
    let available = start.saturating_add(num.saturating_mul(16));
    let behind = available.saturating_add(num.saturating_mul(2)).saturating_add(4);
    let used = behind.checked_next_multiple_of(VRING_ALIGN.into()).unwrap_or(u64::MAX);
    let mut queue = Queue::new(place.num)?;
    queue.try_set_size(place.num)?;
    queue.try_set_desc_table_address(GuestAddress(start))?;
    queue.try_set_avail_ring_address(GuestAddress(available))?;
    queue.try_set_used_ring_address(GuestAddress(used))?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    Ok(queue)
}
