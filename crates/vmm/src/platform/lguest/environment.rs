//! What the vCPU of this platform finds beside RAM: devices on PCI, in kernels that look
//! for them there, and otherwise nothing.
//!
//! Ports and MSRs need a ring that its guests never reach; those instructions trap and are
//! judged in `emulate`. What is left are accesses to physical addresses without memory,
//! which page tables can name and which end the guest.

use std::fmt;

use softcpu::{Environment, Event, GuestPhysAddr, VcpuHandle};

use super::{Death, EndSink, Ended, GuestDevices};

/// The environment of the platform's vCPU.
pub struct LguestEnvironment {
    vcpu: VcpuHandle,
    /// Where the guest may reach devices as memory, if anywhere.
    devices: Option<GuestDevices>,
    ended: EndSink,
}

impl fmt::Debug for LguestEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LguestEnvironment").finish_non_exhaustive()
    }
}

impl LguestEnvironment {
    /// For this vCPU and its devices; `ended` hears of stray accesses.
    #[must_use]
    pub fn new(vcpu: VcpuHandle, devices: Option<GuestDevices>, ended: EndSink) -> Self {
        Self { vcpu, devices, ended }
    }

    fn stray(&self, addr: GuestPhysAddr) {
        (self.ended)(Ended::Died(Death::StrayAccess(addr.0).to_string()));
        // The instruction still completes; the next one does not begin.
        self.vcpu.raise(Event::STOP);
    }
}

impl Environment for LguestEnvironment {
    fn port_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn port_write(&mut self, _port: u16, _data: &[u8]) {}

    fn mmio_read(&mut self, addr: GuestPhysAddr, data: &mut [u8]) {
        data.fill(0xff);
        match &self.devices {
            Some(GuestDevices::Pci(bus)) if bus.memory_read(addr.0, data) => {}
            _ => self.stray(addr),
        }
    }

    fn mmio_write(&mut self, addr: GuestPhysAddr, data: &[u8]) {
        match &self.devices {
            Some(GuestDevices::Pci(bus)) if bus.memory_write(addr.0, data) => {}
            _ => self.stray(addr),
        }
    }
}
