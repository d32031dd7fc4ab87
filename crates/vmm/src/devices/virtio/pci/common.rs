//! The common configuration: status, features, queues (virtio 1.2, 4.1.4.3 and 2.1).
//!
//! The order of a driver's start is the specification's (3.1.1), and held to: features
//! before FEATURES_OK, queues before DRIVER_OK. Who does otherwise does not harm
//! anybody; its writes have no effect.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::signal::PciSignal;
use crate::devices::virtio::{
    ActivateError, Activation, DeviceQueue, DriverSignal, VirtioDevice, feature,
};
use crate::memory::GuestMemory;

/// Bytes of the structure, without what belongs to features not offered.
pub(super) const SIZE: u64 = 0x38;

/// Device status (virtio 1.2, 2.1).
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
/// Those a driver may set.
const SETTABLE: u8 = 1 | 2 | DRIVER_OK | FEATURES_OK | 128;

/// The fields and where they are.
mod field {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
}

/// A queue as its driver describes it.
#[derive(Clone, Copy, Debug)]
struct QueueSetup {
    max_size: u16,
    size: u16,
    enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueSetup {
    const fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, enabled: false, descriptors: 0, available: 0, used: 0 }
    }
}

/// The registers of one function.
#[derive(Debug)]
pub(super) struct Common {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    memory: Arc<GuestMemory>,
}

impl Common {
    pub(super) fn new(device: &dyn VirtioDevice, kept_back: u64, memory: Arc<GuestMemory>) -> Self {
        Self {
            offered: device.features() & !kept_back | feature::COMMON,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: 0,
            queue_select: 0,
            queues: device.queue_sizes().iter().map(|size| QueueSetup::new(*size)).collect(),
            memory,
        }
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The guest reads. All fields are laid out, and it gets what it asked for: so any
    /// width will do.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], signal: &PciSignal) {
        let queue = self.selected();
        let number = |field: fn(&QueueSetup) -> u64| queue.map_or(0, field);
        let stuck = if signal.is_stuck() { NEEDS_RESET } else { 0 };
        let queue_vector = signal.queue_vector(self.queue_select);
        let fields: [(u64, u64, usize); 16] = [
            (field::DEVICE_FEATURE_SELECT, self.device_feature_select.into(), 4),
            (field::DEVICE_FEATURE, half(self.offered, self.device_feature_select).into(), 4),
            (field::DRIVER_FEATURE_SELECT, self.driver_feature_select.into(), 4),
            (field::DRIVER_FEATURE, half(self.accepted, self.driver_feature_select).into(), 4),
            (field::CONFIG_VECTOR, signal.config_vector().into(), 2),
            (field::NUM_QUEUES, self.queues.len() as u64, 2),
            (field::STATUS, (self.status | stuck).into(), 1),
            (field::GENERATION, signal.generation().into(), 1),
            (field::QUEUE_SELECT, self.queue_select.into(), 2),
            (field::QUEUE_SIZE, number(|queue| queue.size.into()), 2),
            (field::QUEUE_VECTOR, queue_vector.into(), 2),
            (field::QUEUE_ENABLE, number(|queue| queue.enabled.into()), 2),
            (field::QUEUE_NOTIFY_OFF, self.queue_select.into(), 2),
            (field::QUEUE_DESC, number(|queue| queue.descriptors), 8),
            (field::QUEUE_DRIVER, number(|queue| queue.available), 8),
            (field::QUEUE_DEVICE, number(|queue| queue.used), 8),
        ];
        let mut image = [0_u8; SIZE as usize];
        for (at, value, width) in fields {
            let place = image.iter_mut().skip(at as usize).take(width);
            place.zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
        }
        super::super::read_config_bytes(&image, offset, data);
    }

    /// The guest writes one field, or one half of a 64-bit one (virtio 1.2, 4.1.3.1).
    pub(super) fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        device: &mut dyn VirtioDevice,
        signal: &Arc<PciSignal>,
        kicks: &[Arc<EventFd>],
    ) {
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (field::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (field::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (field::DRIVER_FEATURE, 4) => self.accept(value as u32),
            (field::CONFIG_VECTOR, 2) => signal.set_config_vector(value as u16),
            (field::QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (field::QUEUE_VECTOR, 2) => signal.set_queue_vector(self.queue_select, value as u16),
            (field::STATUS, 1) => self.set_status(value as u8, device, signal, kicks),
            (_, 2 | 4 | 8) => self.write_queue(offset, value, data.len()),
            _ => {}
        }
    }

    fn accept(&mut self, features: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let (shift, keep) = match self.driver_feature_select {
            0 => (0, !0xffff_ffff),
            1 => (32, 0xffff_ffff),
            _ => return,
        };
        self.accepted = (self.accepted & keep) | (u64::from(features) << shift);
    }

    fn write_queue(&mut self, offset: u64, value: u64, width: usize) {
        let started = self.status & DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if started || queue.enabled {
            return;
        }
        let address = match offset & !7 {
            field::QUEUE_DESC => &mut queue.descriptors,
            field::QUEUE_DRIVER => &mut queue.available,
            field::QUEUE_DEVICE => &mut queue.used,
            _ => {
                match (offset, width) {
                    (field::QUEUE_SIZE, 2) => {
                        let size = value as u16;
                        if size.is_power_of_two() && size <= queue.max_size {
                            queue.size = size;
                        }
                    }
                    (field::QUEUE_ENABLE, 2) => queue.enabled = value == 1,
                    _ => {}
                }
                return;
            }
        };
        *address = match (offset & 7, width) {
            (0, 8) => value,
            (0, 4) => (*address & !0xffff_ffff) | value,
            (4, 4) => (*address & 0xffff_ffff) | (value << 32),
            _ => *address,
        };
    }

    /// The status register: 0 resets, else bits are added (virtio 1.2, 2.1.1).
    fn set_status(
        &mut self,
        value: u8,
        device: &mut dyn VirtioDevice,
        signal: &Arc<PciSignal>,
        kicks: &[Arc<EventFd>],
    ) {
        if value == 0 {
            self.reset(device, signal, kicks);
            return;
        }
        let mut added = value & SETTABLE & !self.status;
        // Features that were not offered, or without virtio 1: not accepted (3.1.1, step 6).
        let acceptable =
            self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0;
        if added & FEATURES_OK != 0 && !acceptable {
            tracing::debug!(
                device = %device.kind(), accepted = self.accepted, offered = self.offered,
                "the driver's features are refused"
            );
            added &= !FEATURES_OK;
        }
        // DRIVER_OK without FEATURES_OK is not for drivers of virtio 1.
        if (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        if added & DRIVER_OK != 0
            && let Err(error) = self.activate(device, signal, kicks)
        {
            tracing::warn!(device = %device.kind(), %error, "a device does not start");
            signal.needs_reset();
        }
    }

    fn activate(
        &self,
        device: &mut dyn VirtioDevice,
        signal: &Arc<PciSignal>,
        kicks: &[Arc<EventFd>],
    ) -> Result<(), ActivateError> {
        let mut queues = Vec::new();
        for ((setup, kick), index) in self.queues.iter().zip(kicks).zip(0_u16..) {
            if !setup.enabled {
                continue;
            }
            let memory = Arc::clone(&self.memory);
            let way = Arc::clone(signal) as Arc<dyn DriverSignal>;
            let queue = self.queue(setup).map_err(std::io::Error::other)?;
            let queue = DeviceQueue::new(index, queue, memory, way, Arc::clone(kick));
            queues.push(queue.map_err(std::io::Error::other)?);
        }
        let signal = Arc::clone(signal) as Arc<dyn DriverSignal>;
        let memory = Arc::clone(&self.memory);
        device.activate(Activation { features: self.accepted, memory, queues, signal })
    }

    fn queue(&self, setup: &QueueSetup) -> Result<Queue, virtio_queue::Error> {
        use vm_memory::GuestAddress;
        let mut queue = Queue::new(setup.max_size)?;
        queue.try_set_size(setup.size)?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(setup.available))?;
        queue.try_set_used_ring_address(GuestAddress(setup.used))?;
        queue.set_event_idx(self.accepted & feature::EVENT_IDX != 0);
        queue.set_ready(true);
        Ok(queue)
    }

    fn reset(&mut self, device: &mut dyn VirtioDevice, signal: &PciSignal, kicks: &[Arc<EventFd>]) {
        device.reset();
        signal.reset();
        for kick in kicks {
            // A notification from before means nothing afterwards; mostly there is none.
            let _ = kick.read();
        }
        self.status = 0;
        self.accepted = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
    }
}

/// The low or the high half of feature bits; there are no others.
const fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
