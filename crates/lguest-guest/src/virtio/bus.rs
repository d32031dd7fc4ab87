//! lguest's bus as a transport: blocks in memory, two hypercalls
//! (docs/lguest-abi.md, section 10).

use core::mem::offset_of;
use core::ptr::addr_of_mut;

use lguest_abi::long::bus::{BLOCK_BYTES, CONFIG_MAX, Device, Header, MAGIC};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::boot::direct;
use crate::hypercall::{self, Call};

/// A device on the bus.
#[derive(Debug)]
pub struct BusTransport {
    number: u16,
    block: *mut Device,
}

// SAFETY: the block is the device's own, and the transport its only user.
unsafe impl Send for BusTransport {}

/// All devices.
pub(crate) fn all() -> impl Iterator<Item = BusTransport> {
    let (at, len) = hypercall::bus();
    let header = direct(at).cast::<Header>();
    // SAFETY: the bus is there, if its length says so.
    let (known, count) = unsafe {
        if len == 0 { (false, 0) } else { ((*header).magic == MAGIC, (*header).devices) }
    };
    (0..if known { count as u16 } else { 0 }).map(move |number| BusTransport {
        number,
        block: direct(at + (usize::from(number) + 1) as u64 * BLOCK_BYTES as u64).cast(),
    })
}

/// A field of the device's block.
macro_rules! field {
    ($self:ident.$($field:tt)+) => {
        // SAFETY: within the block.
        unsafe { addr_of_mut!((*$self.block).$($field)+) }
    };
}

fn get<T: Copy>(field: *mut T) -> T {
    // SAFETY: a field of a block, by `field!`; the host may write it.
    unsafe { field.read_volatile() }
}

fn put<T: Copy>(field: *mut T, value: T) {
    // SAFETY: as above.
    unsafe { field.write_volatile(value) }
}

impl Transport for BusTransport {
    fn device_type(&self) -> DeviceType {
        // What nobody knows is nothing anybody asks for.
        DeviceType::try_from(get(field!(self.kind))).unwrap_or(DeviceType::Pstore)
    }

    fn read_device_features(&mut self) -> u64 {
        get(field!(self.host_features))
    }

    fn write_driver_features(&mut self, features: u64) {
        put(field!(self.guest_features), features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        get(field!(self.queue[usize::from(queue)].max)).into()
    }

    fn notify(&mut self, queue: u16) {
        hypercall::call(Call::Notify { device: self.number, queue });
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(get(field!(self.status)))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        hypercall::call(Call::SetStatus { device: self.number, status: status.bits() as u8 });
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        desc: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        let queue = usize::from(queue);
        put(field!(self.queue[queue].size), size as u16);
        put(field!(self.queue[queue].desc), desc);
        put(field!(self.queue[queue].driver), driver);
        put(field!(self.queue[queue].device), device);
        put(field!(self.queue[queue].enable), 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        put(field!(self.queue[usize::from(queue)].enable), 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        get(field!(self.queue[usize::from(queue)].enable)) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        // An interrupt here says by its number what it is of.
        InterruptStatus::QUEUE_INTERRUPT
    }

    fn read_config_generation(&self) -> u32 {
        get(field!(self.generation))
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let len = usize::from(get(field!(self.config_len))).min(CONFIG_MAX);
        if offset + size_of::<T>() > len {
            return Err(Error::ConfigSpaceTooSmall);
        }
        let at = self.block.cast::<u8>().wrapping_add(offset_of!(Device, config) + offset);
        // SAFETY: within the configuration, as checked.
        Ok(unsafe { at.cast::<T>().read_unaligned() })
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> Result<(), Error> {
        // The host alone writes there.
        Err(Error::Unsupported)
    }
}

impl Drop for BusTransport {
    fn drop(&mut self) {
        self.set_status(DeviceStatus::empty());
    }
}
