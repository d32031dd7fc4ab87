//! One device on the bus: its block, and its life from reset to reset (virtio 1.2, 3.1).

use std::mem::offset_of;
use std::sync::Arc;

use lguest_abi::long::Wire;
use lguest_abi::long::bus::{CONFIG_MAX, Device, Queue as QueueBlock, VERSION_1, status};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::super::lguest_bus::BusError;
use super::super::{
    ActivateError, Activation, DeviceKind, DeviceQueue, DriverSignal, VirtioDevice, feature,
};
use super::signal::LongSignal;
use crate::devices::InterruptLine;
use crate::memory::GuestMemory;

/// Alignments of a ring's three parts, and bytes of their entries (virtio 1.2, 2.7).
const DESC_ALIGN: u64 = 16;
const DRIVER_ALIGN: u64 = 2;
const DEVICE_ALIGN: u64 = 4;

/// A device's interrupt numbers.
pub(super) struct Irqs {
    pub(super) config: u8,
    pub(super) queues: Vec<u8>,
}

/// Bytes of a kind's configuration (virtio 1.2, 5.1.4, 5.2.4, 5.3.4).
const fn config_len(kind: DeviceKind) -> u16 {
    match kind {
        DeviceKind::Net => 12,
        DeviceKind::Block => 60,
        DeviceKind::Console => 12,
        DeviceKind::Entropy => 0,
    }
}

/// A queue as its driver describes it is of no use.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("queue {0}: its ring is unaligned, of a bad size, or not in memory")]
struct BadRing(u16);

/// A core in its place.
#[derive(Debug)]
pub(super) struct LongDevice {
    core: Box<dyn VirtioDevice>,
    /// The physical address of its block.
    at: u64,
    /// Where RAM ends: rings lie below.
    ram_end: u64,
    sizes: Vec<u16>,
    kicks: Vec<Arc<EventFd>>,
    /// Which queues are in use.
    live: Vec<u16>,
    signal: Arc<LongSignal>,
    status: u8,
    /// Bits that were set since the last reset: each counts once.
    seen: u8,
    /// The features that are agreed on, version 1 among them; 0 before.
    accepted: u64,
    generation: u32,
}

impl LongDevice {
    pub(super) fn new(
        core: Box<dyn VirtioDevice>,
        at: u64,
        ram_end: u64,
        memory: &GuestMemory,
        irqs: &Irqs,
        lines: impl Fn(u8) -> InterruptLine,
    ) -> Result<Self, BusError> {
        let sizes = core.queue_sizes().to_vec();
        let mut block = Device::ZERO;
        block.kind = core.kind() as u32;
        block.queues = sizes.len() as u16;
        block.config_len = config_len(core.kind());
        block.host_features = offered(core.as_ref());
        block.config_irq = irqs.config.into();
        for ((queue, max), irq) in block.queue.iter_mut().zip(&sizes).zip(&irqs.queues) {
            (queue.max, queue.irq) = (*max, (*irq).into());
        }
        let mut bytes = [0; size_of::<Device>()];
        block.write(&mut bytes);
        memory.write_slice(&bytes, GuestAddress(at)).map_err(std::io::Error::other)?;
        let kicks = sizes.iter().map(|_| DeviceQueue::new_kick()).collect::<Result<_, _>>()?;
        let signal = LongSignal::new(
            lines(irqs.config),
            irqs.queues.iter().map(|irq| lines(*irq)).collect(),
        );
        let mut device = Self {
            core,
            at,
            ram_end,
            sizes,
            kicks,
            live: Vec::new(),
            signal,
            status: 0,
            seen: 0,
            accepted: 0,
            generation: 0,
        };
        device.show_config(memory);
        Ok(device)
    }

    fn field(&self, offset: usize) -> GuestAddress {
        GuestAddress(self.at.saturating_add(offset as u64))
    }

    fn put<T: vm_memory::ByteValued>(&self, memory: &GuestMemory, offset: usize, value: T) {
        // The block lies in the memory above RAM that was made for it.
        let _ = memory.write_obj(value, self.field(offset));
    }

    fn show_config(&mut self, memory: &GuestMemory) {
        let mut config = [0; CONFIG_MAX];
        let len = usize::from(config_len(self.core.kind()));
        let used = config.get_mut(..len).unwrap_or_default();
        self.core.read_config(0, used);
        let _ = memory.write_slice(used, self.field(offset_of!(Device, config)));
        self.generation = self.generation.wrapping_add(1);
        self.put(memory, offset_of!(Device, generation), self.generation);
    }

    fn show_status(&self, memory: &GuestMemory) {
        let stuck = if self.signal.is_stuck() { status::NEEDS_RESET } else { 0 };
        self.put(memory, offset_of!(Device, status), u32::from(self.status | stuck));
    }

    /// Shows what has changed without the driver's doing.
    pub(super) fn refresh(&mut self, memory: &GuestMemory) {
        if self.signal.take_stale() {
            self.show_config(memory);
            self.show_status(memory);
        }
    }

    /// The driver says what state it is in.
    pub(super) fn set_status(&mut self, wanted: u8, memory: &Arc<GuestMemory>) {
        if wanted == 0 {
            self.reset();
        } else {
            let new = wanted & !self.seen;
            self.seen |= wanted;
            self.status = wanted & !status::NEEDS_RESET;
            if new & status::FAILED != 0 {
                tracing::warn!(device = %self.core.kind(), "its driver has given up");
                self.stop();
            }
            if new & status::FEATURES_OK != 0 {
                self.negotiate(memory);
            }
            if self.accepted == 0 {
                // However often the driver says so.
                self.status &= !status::FEATURES_OK;
            }
            if new & status::DRIVER_OK != 0 && !self.signal.is_stuck() {
                self.start(memory);
            }
        }
        self.show_status(memory);
    }

    fn negotiate(&mut self, memory: &GuestMemory) {
        let wanted: u64 =
            memory.read_obj(self.field(offset_of!(Device, guest_features))).unwrap_or(0);
        if wanted & !offered(self.core.as_ref()) == 0 && wanted & VERSION_1 != 0 {
            self.accepted = wanted;
        }
    }

    fn start(&mut self, memory: &Arc<GuestMemory>) {
        if self.status & status::FEATURES_OK == 0 {
            tracing::warn!(device = %self.core.kind(), "its driver starts without features");
            return self.signal.needs_reset();
        }
        if let Err(error) = self.activate(memory) {
            tracing::warn!(device = %self.core.kind(), %error, "a device does not start");
            self.signal.needs_reset();
        }
    }

    fn activate(&mut self, memory: &Arc<GuestMemory>) -> Result<(), ActivateError> {
        let event_idx = self.accepted & feature::EVENT_IDX != 0;
        let mut queues = Vec::new();
        let mut live = Vec::new();
        for ((max, kick), index) in self.sizes.iter().zip(&self.kicks).zip(0_u16..) {
            let queue_at = usize::from(index).saturating_mul(size_of::<QueueBlock>());
            let at = offset_of!(Device, queue).saturating_add(queue_at);
            let mut bytes = [0; size_of::<QueueBlock>()];
            // As above: it is there.
            let _ = memory.read_slice(&mut bytes, self.field(at));
            let told = QueueBlock::read(&bytes).unwrap_or(QueueBlock::ZERO);
            if told.enable != 1 {
                continue;
            }
            let queue = self
                .ring(&told, *max, event_idx)
                .ok_or_else(|| std::io::Error::other(BadRing(index)))?;
            let way = Arc::clone(&self.signal) as Arc<dyn DriverSignal>;
            let queue = DeviceQueue::new(index, queue, Arc::clone(memory), way, Arc::clone(kick));
            queues.push(queue.map_err(std::io::Error::other)?);
            live.push(index);
        }
        let features = self.accepted;
        tracing::debug!(device = %self.core.kind(), features, "starts");
        let signal = Arc::clone(&self.signal) as Arc<dyn DriverSignal>;
        self.core.activate(Activation { features, memory: Arc::clone(memory), queues, signal })?;
        self.live = live;
        Ok(())
    }

    /// The ring that a queue's block describes, if it is one.
    fn ring(&self, told: &QueueBlock, max: u16, event_idx: bool) -> Option<Queue> {
        if told.size > max || !told.size.is_power_of_two() {
            return None;
        }
        let entries = u64::from(told.size);
        let fits = |at: u64, align: u64, fixed: u64, each: u64| {
            let len = entries.saturating_mul(each).saturating_add(fixed);
            at.is_multiple_of(align) && at.checked_add(len).is_some_and(|end| end <= self.ram_end)
        };
        let fine = fits(told.desc, DESC_ALIGN, 0, 16)
            && fits(told.driver, DRIVER_ALIGN, 6, 2)
            && fits(told.device, DEVICE_ALIGN, 6, 8);
        if !fine {
            return None;
        }
        let mut queue = Queue::new(max).ok()?;
        queue.try_set_size(told.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(told.desc)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(told.driver)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(told.device)).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Some(queue)
    }

    /// A kick of a queue, which does nothing before it is in use. False: there is none.
    pub(super) fn kick(&self, queue: u16) -> bool {
        let Some(kick) = self.kicks.get(usize::from(queue)) else { return false };
        if self.live.contains(&queue)
            // Its counter is full: it has been told often enough.
            && let Err(error) = kick.write(1)
        {
            tracing::debug!(%error, "a notification is lost");
        }
        true
    }

    /// The machine ends.
    pub(super) fn shut_down(&mut self) {
        self.core.shut_down();
    }

    /// Stops the core: nothing of it touches guest memory any more.
    fn stop(&mut self) {
        self.core.reset();
        self.live.clear();
    }

    fn reset(&mut self) {
        self.stop();
        self.signal.reset();
        (self.status, self.seen, self.accepted) = (0, 0, 0);
        for kick in &self.kicks {
            // A notification from before means nothing afterwards; mostly there is none.
            let _ = kick.read();
        }
    }
}

/// The features of a core and of the rings here.
fn offered(core: &dyn VirtioDevice) -> u64 {
    core.features() | feature::COMMON
}
