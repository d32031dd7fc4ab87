//! Virtio devices, by the `virtio-drivers` crate: over lguest's bus or over PCI.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;

use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

use crate::boot::{direct, phys_of};
use crate::frames;
use crate::irq::Masked;
use crate::trap;

mod bus;
mod pci;

pub use bus::BusTransport;
pub use virtio_drivers::Error;

/// Bytes of a disk's sector.
pub const SECTOR: usize = virtio_drivers::device::blk::SECTOR_SIZE;

/// How drivers reach memory: it is all in the direct map.
#[derive(Debug)]
pub struct KernelHal;

// SAFETY: pages come from the allocator and go back to it; the direct map has each at one
// place.
unsafe impl Hal for KernelHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let phys = frames::take_run(pages).expect("memory for a device's rings");
        (phys, NonNull::new(direct(phys)).expect("not null"))
    }

    unsafe fn dma_dealloc(phys: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        for n in 0..pages {
            // SAFETY: the caller's: from above.
            unsafe { frames::give(phys + (n * frames::PAGE) as u64) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(phys: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(direct(phys)).expect("not null")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        phys_of(buffer.as_ptr())
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// A disk, whatever carries it.
pub trait Disk: Send {
    /// How many sectors of 512 bytes it has.
    fn sectors(&self) -> u64;
    /// Whether it cannot be written to.
    fn is_read_only(&self) -> bool;
    /// Reads whole sectors from number `at` on.
    ///
    /// # Errors
    /// The device's.
    fn read(&mut self, at: u64, data: &mut [u8]) -> Result<(), Error>;
    /// Writes whole sectors.
    ///
    /// # Errors
    /// The device's.
    fn write(&mut self, at: u64, data: &[u8]) -> Result<(), Error>;
    /// Returns when what was written is on the disk.
    ///
    /// # Errors
    /// The device's.
    fn flush(&mut self) -> Result<(), Error>;
}

impl<T: Transport + Send> Disk for VirtIOBlk<KernelHal, T> {
    fn sectors(&self) -> u64 {
        self.capacity()
    }

    fn is_read_only(&self) -> bool {
        self.readonly()
    }

    fn read(&mut self, at: u64, data: &mut [u8]) -> Result<(), Error> {
        self.read_blocks(at as usize, data)
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Result<(), Error> {
        self.write_blocks(at as usize, data)
    }

    fn flush(&mut self) -> Result<(), Error> {
        VirtIOBlk::flush(self)
    }
}

trait Console: Send {
    fn send(&mut self, bytes: &[u8]) -> bool;
    fn key(&mut self) -> Option<u8>;
}

impl<T: Transport + Send> Console for VirtIOConsole<KernelHal, T> {
    fn send(&mut self, bytes: &[u8]) -> bool {
        self.send_bytes(bytes).is_ok()
    }

    fn key(&mut self) -> Option<u8> {
        self.recv(true).ok().flatten()
    }
}

/// A source of random bytes.
pub trait Entropy: Send {
    /// Fills `data`, or as much of it as the answer says.
    ///
    /// # Errors
    /// The device's.
    fn fill(&mut self, data: &mut [u8]) -> Result<usize, Error>;
}

impl<T: Transport + Send> Entropy for VirtIORng<KernelHal, T> {
    fn fill(&mut self, data: &mut [u8]) -> Result<usize, Error> {
        self.request_entropy(data)
    }
}

/// What was found.
#[derive(Default)]
pub struct Devices {
    /// Disks, in the order of the bus.
    pub disks: Vec<Box<dyn Disk>>,
    /// Entropy sources.
    pub entropy: Vec<Box<dyn Entropy>>,
}

impl core::fmt::Debug for Devices {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Devices").field("disks", &self.disks.len()).finish_non_exhaustive()
    }
}

static CONSOLE: Masked<Option<Box<dyn Console>>> = Masked::new(None);

impl Devices {
    fn add<T: Transport + Send + 'static>(&mut self, transport: T) -> Result<(), Error> {
        match transport.device_type() {
            DeviceType::Block => {
                self.disks.push(Box::new(VirtIOBlk::<KernelHal, T>::new(transport)?));
            }
            DeviceType::Console => {
                let console = VirtIOConsole::<KernelHal, T>::new(transport)?;
                CONSOLE.with(|slot| *slot = Some(Box::new(console)));
            }
            DeviceType::EntropySource => {
                self.entropy.push(Box::new(VirtIORng::<KernelHal, T>::new(transport)?));
            }
            // Nobody here has a network yet: `virtio-drivers` has the driver.
            _ => {}
        }
        Ok(())
    }
}

/// Finds the devices, and makes a console among them the kernel's. Needs an allocator.
///
/// # Errors
/// A device's driver cannot start.
pub fn start() -> Result<Devices, Error> {
    let mut devices = Devices::default();
    if trap::is_lguest() {
        for transport in bus::all() {
            devices.add(transport)?;
        }
    } else {
        for transport in pci::all()? {
            devices.add(transport)?;
        }
    }
    Ok(devices)
}

/// Sends by the virtio console. False: there is none.
pub(crate) fn console_send(bytes: &[u8]) -> bool {
    CONSOLE.with(|console| console.as_mut().is_some_and(|console| console.send(bytes)))
}

/// A key of the virtio console.
pub(crate) fn console_key() -> Option<u8> {
    CONSOLE.with(|console| console.as_mut()?.key())
}
