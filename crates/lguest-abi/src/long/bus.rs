//! The bus of 64-bit guests: pages of device descriptors just above RAM, carrying virtio
//! 1.x with split rings.
//!
//! Blocks of 512 bytes: first a header, then one for each device. The guest writes what is
//! marked so, the host the rest. Changes take effect by hypercall only: SET_STATUS makes
//! the host read what the guest wrote, NOTIFY that a queue has work. A device says that it
//! has used buffers by its queue's IRQ, and that its configuration changed by its own.

use super::layout::shared;

/// What the header begins with.
pub const MAGIC: [u8; 8] = *b"lguestbs";
/// Size and alignment of header and devices.
pub const BLOCK_BYTES: usize = 512;
/// Most devices.
pub const DEVICES_MAX: u16 = 63;
/// Bytes of configuration there is room for.
pub const CONFIG_MAX: usize = 128;
/// Queues there is room for.
pub const QUEUES_MAX: usize = 10;

/// Bits of the status (virtio 1.2, 2.1), with their names.
pub const STATUS: &[(&str, u8)] = &[
    ("ACKNOWLEDGE", status::ACKNOWLEDGE),
    ("DRIVER", status::DRIVER),
    ("DRIVER_OK", status::DRIVER_OK),
    ("FEATURES_OK", status::FEATURES_OK),
    ("NEEDS_RESET", status::NEEDS_RESET),
    ("FAILED", status::FAILED),
];

/// Bits of the status.
#[allow(missing_docs)]
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// VIRTIO_F_VERSION_1: always offered, and to be accepted.
pub const VERSION_1: u64 = 1 << 32;

shared! {
    /// The first block.
    Header {
        /// [`MAGIC`].
        magic: [u8; 8],
        /// How many devices follow.
        devices: u32,
        /// [`BLOCK_BYTES`].
        block: u32,
        /// 0.
        reserved: [u64; 62],
    }
}

shared! {
    /// A virtqueue.
    Queue {
        /// Most entries.
        max: u16,
        /// Raised when buffers were used.
        irq: u16,
        /// Entries, a power of two. The guest writes.
        size: u16,
        /// 1: it is to be used. The guest writes.
        enable: u16,
        /// Physical address of the descriptors. The guest writes, as the others.
        desc: u64,
        /// Of the available ring.
        driver: u64,
        /// Of the used ring.
        device: u64,
    }
}

shared! {
    /// A device.
    Device {
        /// Its virtio id.
        kind: u32,
        /// Queues it has.
        queues: u16,
        /// Bytes of configuration it has.
        config_len: u16,
        /// Features it offers.
        host_features: u64,
        /// Features that are accepted. The guest writes.
        guest_features: u64,
        /// What has become of SET_STATUS.
        status: u32,
        /// Changes with the configuration: the same before and after a reading.
        generation: u32,
        /// Raised when the configuration changed or NEEDS_RESET is set.
        config_irq: u32,
        /// 0.
        reserved: [u32; 7],
        /// The configuration, as virtio has it.
        config: [u8; CONFIG_MAX],
        /// The queues.
        queue: [Queue; QUEUES_MAX],
    }
}

/// Where a device's block begins, from the bus' start. `None`: there cannot be so many.
pub const fn device_at(device: u16) -> Option<usize> {
    if device >= DEVICES_MAX {
        return None;
    }
    Some((device as usize).wrapping_add(1).wrapping_mul(BLOCK_BYTES))
}

/// Where a device's queue is, from the bus' start. `None`: there cannot be so many.
pub const fn queue_at(device: u16, queue: u16) -> Option<usize> {
    if queue as usize >= QUEUES_MAX {
        return None;
    }
    match device_at(device) {
        Some(at) => Some(
            at.wrapping_add(core::mem::offset_of!(Device, queue))
                .wrapping_add((queue as usize).wrapping_mul(size_of::<Queue>())),
        ),
        None => None,
    }
}

/// Bytes of a bus with so many devices, in whole pages.
pub const fn bus_bytes(devices: u16) -> usize {
    (devices as usize).wrapping_add(1).wrapping_mul(BLOCK_BYTES).next_multiple_of(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::long::layout::{assert_packed, assert_wire};

    #[test]
    fn blocks_have_no_holes() {
        assert_packed(Header::FIELDS, BLOCK_BYTES);
        assert_packed(Device::FIELDS, BLOCK_BYTES);
        assert_packed(Queue::FIELDS, 32);
        assert_wire::<Header>();
        assert_wire::<Device>();
        assert_wire::<Queue>();
        assert_eq!(size_of::<Device>(), BLOCK_BYTES);
    }

    #[test]
    fn places_end_with_the_last_device() {
        assert_eq!(device_at(0), Some(512));
        assert_eq!(device_at(62), Some(63 * 512));
        assert_eq!(device_at(63), None);
        assert_eq!(queue_at(1, 0), Some(1024 + 192));
        assert_eq!(queue_at(0, 9), Some(1024 - 32));
        assert_eq!(queue_at(0, 10), None);
        assert_eq!(bus_bytes(0), 4096);
        assert_eq!(bus_bytes(7), 4096);
        assert_eq!(bus_bytes(8), 8192);
        assert_eq!(bus_bytes(DEVICES_MAX), 32768);
    }
}
