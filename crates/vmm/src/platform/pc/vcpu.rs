//! One vCPU's way to the machine: [`softcpu::Environment`], implemented.
//!
//! Ports and memory go to the devices, MSRs to the local APIC and KVM's pages. All calls
//! come from the vCPU's own thread.

use std::sync::Arc;

use softcpu::{Environment, GuestPhysAddr, Hypercall, MsrRefused};

use super::Pc;
use super::kvm::clock::{
    MSR_SYSTEM_TIME, MSR_SYSTEM_TIME_NEW, MSR_WALL_CLOCK, MSR_WALL_CLOCK_NEW, SystemTime64,
};
use super::kvm::hypercall;
use super::kvm::steal::{MSR_STEAL_TIME, StealTime};
use crate::devices::apic::local::{Effect, LocalApic};
use crate::layout::{IO_APIC, IO_APIC_SIZE};

/// `IA32_APIC_BASE`.
const MSR_APIC_BASE: u32 = 0x1b;
/// `IA32_TSC_DEADLINE`.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The local APIC's register page is this long.
const PAGE: u64 = 0x1000;

/// The environment of vCPU number `index`.
#[derive(Debug)]
pub struct PcVcpu {
    pc: Arc<Pc>,
    index: usize,
    /// Guest TSC minus host TSC.
    tsc_offset: u64,
    wall_clock: u64,
    system_time: SystemTime64,
    steal: Arc<StealTime>,
}

impl PcVcpu {
    /// For vCPU number `index`, whose guest TSC is `tsc_offset` ahead of the host's.
    #[must_use]
    pub fn new(pc: Arc<Pc>, index: usize, tsc_offset: u64, steal: Arc<StealTime>) -> Self {
        Self { pc, index, tsc_offset, wall_clock: 0, system_time: SystemTime64::default(), steal }
    }

    fn local(&self) -> Option<&LocalApic> {
        self.pc.controller().local(self.index)
    }

    fn perform(&self, effect: Effect) {
        self.pc.controller().perform(self.index, effect);
    }
}

/// The offset of `addr` in a device's `size` bytes at `base`.
fn within(addr: GuestPhysAddr, base: u64, size: u64) -> Option<u64> {
    addr.0.checked_sub(base).filter(|offset| *offset < size)
}

impl Environment for PcVcpu {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        self.pc.port_read(port, data);
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.pc.port_write(port, data);
    }

    fn mmio_read(&mut self, addr: GuestPhysAddr, data: &mut [u8]) {
        if let Some(local) = self.local()
            && let Some(offset) = within(addr, local.base().address(), PAGE)
            && local.mmio_read(offset, data)
        {
            return;
        }
        match within(addr, IO_APIC.0, IO_APIC_SIZE) {
            Some(offset) => self.pc.controller().io_read(offset, data),
            None => self.pc.memory_read(addr.0, data),
        }
    }

    fn mmio_write(&mut self, addr: GuestPhysAddr, data: &[u8]) {
        if let Some(local) = self.local()
            && let Some(offset) = within(addr, local.base().address(), PAGE)
            && let Some(effect) = local.mmio_write(offset, data)
        {
            self.perform(effect);
            return;
        }
        match within(addr, IO_APIC.0, IO_APIC_SIZE) {
            Some(offset) => self.pc.controller().io_write(offset, data),
            None => self.pc.memory_write(addr.0, data),
        }
    }

    fn read_msr(&mut self, index: u32) -> Result<u64, MsrRefused> {
        let local = self.local().ok_or(MsrRefused)?;
        match index {
            MSR_APIC_BASE => Ok(local.base().raw()),
            MSR_TSC_DEADLINE => Ok(local.tsc_deadline()),
            0x800..=0x8ff => local.x2apic_read(index).map_err(|_| MsrRefused),
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_NEW => Ok(self.wall_clock),
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_NEW => Ok(self.system_time.read()),
            MSR_STEAL_TIME => Ok(self.steal.read()),
            _ => Err(MsrRefused),
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        let local = self.local().ok_or(MsrRefused)?;
        let taken = |yes: bool| if yes { Ok(()) } else { Err(MsrRefused) };
        match index {
            MSR_APIC_BASE => taken(local.set_base(value)),
            MSR_TSC_DEADLINE => {
                local.set_tsc_deadline(value, self.tsc_offset);
                Ok(())
            }
            0x800..=0x8ff => {
                let effect = local.x2apic_write(index, value).map_err(|_| MsrRefused)?;
                self.perform(effect);
                Ok(())
            }
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_NEW => {
                self.wall_clock = value;
                self.pc.epoch().write_wall_clock(self.pc.memory(), value);
                Ok(())
            }
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_NEW => {
                self.system_time.write(value, self.pc.epoch(), self.pc.memory(), self.tsc_offset);
                Ok(())
            }
            MSR_STEAL_TIME => taken(self.steal.write(value, self.pc.memory())),
            _ => Err(MsrRefused),
        }
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.local()?.acknowledge()
    }

    fn task_priority(&mut self) -> u8 {
        self.local().map_or(0, LocalApic::task_priority_class)
    }

    fn set_task_priority(&mut self, class: u8) {
        if let Some(local) = self.local() {
            local.set_task_priority(class << 4);
        }
    }

    fn hypercall(&mut self, call: &Hypercall) -> u64 {
        hypercall::perform(call, self.pc.controller())
    }

    fn tsc_offset_changed(&mut self, offset: u64) {
        self.tsc_offset = offset;
        if let Some(local) = self.local() {
            local.tsc_moved(offset);
        }
        self.system_time.refresh(self.pc.epoch(), self.pc.memory(), offset);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::pc;
    use super::*;
    use crate::devices::Request;

    fn vcpu() -> (PcVcpu, super::super::tests::Requests) {
        let (pc, requests) = pc();
        (PcVcpu::new(pc, 0, 0, Arc::default()), requests)
    }

    #[test]
    fn nobody_answers_with_ones() {
        let (mut vcpu, _) = vcpu();
        let mut data = [0; 4];
        for port in [0xcfc, 0x2f8, 0x1234, 0xffff] {
            vcpu.port_read(port, &mut data);
            assert_eq!(data, [0xff; 4], "{port:#x}");
        }
        vcpu.mmio_read(GuestPhysAddr(0xd000_0000), &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(vcpu.read_msr(0x1234), Err(MsrRefused));
    }

    #[test]
    fn the_test_device_is_memory_and_lines() {
        let (mut vcpu, _) = vcpu();
        let mut data = [0; 8];
        vcpu.mmio_write(GuestPhysAddr(0xff00_0010), b"not RAM!");
        vcpu.mmio_read(GuestPhysAddr(0xff00_0010), &mut data);
        assert_eq!(&data, b"not RAM!");
        vcpu.port_write(0xe0, &[1, 2, 3, 4]);
        vcpu.port_read(0xe0, data.first_chunk_mut::<4>().unwrap());
        assert_eq!(data[..4], [1, 2, 3, 4]);
        vcpu.mmio_write(GuestPhysAddr(0xfee0_00f0), &0x1ff_u32.to_le_bytes());
        for (register, value) in [(0x2c_u8, 0x76_u32), (0x2d, 0)] {
            vcpu.mmio_write(GuestPhysAddr(0xfec0_0000), &[register, 0, 0, 0]);
            vcpu.mmio_write(GuestPhysAddr(0xfec0_0010), &value.to_le_bytes());
        }
        vcpu.port_write(0x200e, &[1]);
        assert_eq!(vcpu.acknowledge_interrupt(), Some(0x76));
    }

    #[test]
    fn poweroff_and_reset_are_requested() {
        let (mut vcpu, requests) = vcpu();
        vcpu.port_write(0x600, &[0x34]);
        vcpu.port_write(0x604, &[1]);
        vcpu.port_write(0x64, &[0xfe]);
        vcpu.port_write(0xf4, &[0x10, 0, 0, 0]);
        let seen = requests.0.lock().unwrap().clone();
        assert_eq!(seen, [Request::PowerOff, Request::Reset, Request::Reset, Request::Exit(0x10)]);
    }

    #[test]
    fn an_ipi_to_oneself_comes_back() {
        let (mut vcpu, _) = vcpu();
        vcpu.mmio_write(GuestPhysAddr(0xfee0_00f0), &0x1ff_u32.to_le_bytes());
        let base = vcpu.read_msr(MSR_APIC_BASE).unwrap();
        assert_eq!(base, 0xfee0_0900);
        vcpu.write_msr(MSR_APIC_BASE, base | 1 << 10).unwrap();
        vcpu.write_msr(0x83f, 0x55).unwrap();
        assert_eq!(vcpu.acknowledge_interrupt(), Some(0x55));
        vcpu.set_task_priority(7);
        assert_eq!((vcpu.task_priority(), vcpu.read_msr(0x808)), (7, Ok(0x70)));
        let mut data = [0; 4];
        vcpu.mmio_read(GuestPhysAddr(0xfee0_0020), &mut data);
        assert_eq!(data, [0xff; 4], "there is no page in x2APIC mode");
    }

    #[test]
    fn a_tsc_deadline_and_the_clock_follow_the_tsc() {
        let (mut vcpu, _) = vcpu();
        vcpu.mmio_write(GuestPhysAddr(0xfee0_0320), &0x5_0040_u32.to_le_bytes());
        vcpu.write_msr(MSR_SYSTEM_TIME_NEW, 0x2001).unwrap();
        let stamp = |vcpu: &PcVcpu| vcpu.pc.memory().load::<u64>(GuestPhysAddr(0x2008)).unwrap();
        let before = stamp(&vcpu);
        vcpu.write_msr(MSR_TSC_DEADLINE, u64::MAX / 2).unwrap();
        vcpu.tsc_offset_changed(1000);
        assert_eq!(vcpu.read_msr(MSR_TSC_DEADLINE), Ok(u64::MAX / 2));
        assert_eq!(stamp(&vcpu), before + 1000);
    }

    #[test]
    fn the_serial_line_interrupts_through_the_io_apic() {
        let (mut vcpu, _) = vcpu();
        vcpu.mmio_write(GuestPhysAddr(0xfee0_00f0), &0x1ff_u32.to_le_bytes());
        for (register, value) in [(0x18_u8, 0x34_u32), (0x19, 0)] {
            vcpu.mmio_write(GuestPhysAddr(0xfec0_0000), &[register, 0, 0, 0]);
            vcpu.mmio_write(GuestPhysAddr(0xfec0_0010), &value.to_le_bytes());
        }
        vcpu.port_write(0x3f9, &[1]);
        assert_eq!(vcpu.pc.serial_input().send(b"x"), 1);
        assert_eq!(vcpu.acknowledge_interrupt(), Some(0x34));
        let mut data = [0];
        vcpu.port_read(0x3f8, &mut data);
        assert_eq!(&data, b"x");
    }
}
