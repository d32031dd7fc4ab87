//! Bodies of the fuzz targets for the devices' registers, and the list of all for devices.
//!
//! Each takes bytes, plays them as accesses, and must return: no panic, no hang, no
//! unbounded growth. The fuzzers call them, and so does a short run in the tests, where
//! arithmetic overflow panics too. Bytes that stand for time only move it forwards.

use std::sync::Arc;
use std::time::Duration;

use softcpu::{Event, VcpuHandle};

use super::apic::controller::InterruptController;
use super::apic::io::IoApic;
use super::apic::local::{DeadlineSink, LocalApic, LocalApicConfig};
use super::apic::message::MsiMessage;
use super::i8042::I8042;
use super::pci::fuzz::fuzz_pci;
use super::pic::Pic;
use super::pit::{PIT, Pit};
use super::rtc::Rtc;
use super::serial::SerialPort;
use super::test_device::{LINES, MEMORY, SCRATCH, TestDevice};
use super::virtio::block::fuzz::fuzz_block;
use super::virtio::fuzz::{fuzz_console, fuzz_entropy};
use super::{InterruptLine, InterruptSink};
use crate::clock::TscFrequency;

/// Takes numbers off the front of the input.
pub(crate) struct Bytes<'d>(&'d [u8]);

impl<'d> Bytes<'d> {
    pub(crate) const fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        self.take().map(u8::from_le_bytes)
    }

    pub(crate) fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn long(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

pub(crate) struct Unwired;

impl InterruptSink for Unwired {
    fn set_line(&self, _: u8, _: bool) {}
}

impl DeadlineSink for Unwired {
    fn arm(&self, _: usize, _: Option<u64>) {}
}

/// COM1: pairs of register and value; register bit 7 reads, bit 6 types.
pub fn fuzz_serial(data: &[u8]) {
    let mut bytes = Bytes(data);
    let port = SerialPort::new(InterruptLine::new(Arc::new(Unwired), 4), Box::new(std::io::sink()));
    let input = port.input();
    let mut typed = 0_usize;
    while let (Some(register), Some(value)) = (bytes.byte(), bytes.byte()) {
        match register >> 6 {
            0 => port.write(register & 7, value),
            // A sender would wait for a reader that is not there.
            1 if typed < 4000 => typed = typed.saturating_add(input.send(&[value])),
            _ => {
                let _ = port.read(register & 7);
            }
        }
    }
}

/// The clock: operation, value and seconds to go on.
pub fn fuzz_rtc(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut rtc = Rtc::default();
    let mut now = Duration::ZERO;
    while let (Some(operation), Some(value)) = (bytes.byte(), bytes.byte()) {
        match operation & 3 {
            0 => rtc.write_index(value),
            1 => rtc.write_data(value, now),
            2 => {
                let _ = rtc.read_data(now);
            }
            _ => {
                let step = Duration::from_millis(bytes.long().unwrap_or(0));
                now = now.saturating_add(step);
            }
        }
    }
}

/// The keyboard controller: operation and value.
pub fn fuzz_i8042(data: &[u8]) {
    let mut bytes = Bytes(data);
    let mut chip = I8042::default();
    while let (Some(operation), Some(value)) = (bytes.byte(), bytes.byte()) {
        match operation & 3 {
            0 => {
                let _ = chip.write_command(value);
            }
            1 => {
                let _ = chip.write_data(value);
            }
            2 => {
                let _ = chip.read_data();
            }
            _ => {
                let _ = chip.read_status();
            }
        }
    }
}

/// Interval timer, port 0x61 and the legacy interrupt controllers: operation and value.
pub fn fuzz_pit_pic(data: &[u8]) {
    const PIC_PORTS: [u16; 6] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];
    let mut bytes = Bytes(data);
    let (mut pit, mut pic) = (Pit::default(), Pic::default());
    let mut now = 0_u64;
    while let (Some(operation), Some(value)) = (bytes.byte(), bytes.byte()) {
        let channel = PIT | u16::from(operation >> 6);
        let pic_port =
            PIC_PORTS.into_iter().cycle().nth(usize::from(operation >> 5)).unwrap_or(0x20);
        match operation & 7 {
            0 => pit.write(channel, value, now),
            1 => {
                let _ = pit.read(channel, now);
            }
            2 => pit.write_port_61(value, now),
            3 => {
                let _ = pit.read_port_61(now);
            }
            4 => pic.write(pic_port, value),
            5 => {
                let _ = pic.read(pic_port);
            }
            _ => now = now.saturating_add(bytes.long().unwrap_or(0)),
        }
    }
}

pub(crate) fn controllers() -> Arc<InterruptController> {
    let local = |vcpu: u8| {
        LocalApic::new(LocalApicConfig {
            id: u32::from(vcpu),
            vcpu: usize::from(vcpu),
            phys_bits: 40,
            frequency: TscFrequency::from_hz(1_000_000_000),
            handle: VcpuHandle::new(),
            deadlines: Arc::new(Unwired),
        })
    };
    InterruptController::new((0..2).map(local).collect(), IoApic::default())
}

/// A local APIC: memory page, MSRs, base register, timers, and messages from a sibling.
pub fn fuzz_local_apic(data: &[u8]) {
    let mut bytes = Bytes(data);
    let machine = controllers();
    let [local, ..] = machine.locals() else { return };
    while let Some(operation) = bytes.byte() {
        match operation & 7 {
            0 => {
                let Some([offset, length]) = bytes.take() else { return };
                let mut data = [0; 64];
                let length = usize::from(length).min(data.len());
                let _ = data
                    .get_mut(..length)
                    .map(|data| local.mmio_read(u64::from(offset) << 4, data));
            }
            1 => {
                let (Some(offset), Some(value)) = (bytes.take(), bytes.word()) else { return };
                let offset = u64::from(u16::from_le_bytes(offset)) & 0xfff;
                if let Some(effect) = local.mmio_write(offset, &value.to_le_bytes()) {
                    machine.perform(0, effect);
                }
            }
            2 => {
                let Some(msr) = bytes.byte() else { return };
                let _ = local.x2apic_read(0x800 | u32::from(msr));
            }
            3 => {
                let (Some(msr), Some(value)) = (bytes.byte(), bytes.long()) else { return };
                if let Ok(effect) = local.x2apic_write(0x800 | u32::from(msr), value) {
                    machine.perform(0, effect);
                }
            }
            4 => {
                let Some(mode) = bytes.byte() else { return };
                let _ = local.set_base(0xfee0_0000 | u64::from(mode & 0xf) << 8);
            }
            5 => {
                let (Some(deadline), Some(offset)) = (bytes.long(), bytes.long()) else { return };
                local.set_tsc_deadline(deadline, offset);
                local.tsc_moved(offset.rotate_left(7));
                local.timer_expired(deadline);
            }
            6 => {
                let (Some(address), Some(data)) = (bytes.word(), bytes.word()) else { return };
                let address = 0xfee0_0000 | u64::from(address & 0xf_ffff);
                let _ = machine.deliver_msi(MsiMessage { address, data });
            }
            _ => {
                let wanted = local.handle().take(Event::all());
                let _ = (wanted, local.acknowledge(), local.take_startup(), local.to_string());
                local.set_task_priority(operation);
            }
        }
    }
}

/// The IO-APIC: its page and its lines, with two local APICs behind it.
pub fn fuzz_io_apic(data: &[u8]) {
    let mut bytes = Bytes(data);
    let machine = controllers();
    for (vcpu, local) in machine.locals().iter().enumerate() {
        if let Some(effect) = local.mmio_write(0xf0, &0x1ff_u32.to_le_bytes()) {
            machine.perform(vcpu, effect);
        }
    }
    while let Some(operation) = bytes.byte() {
        match operation & 3 {
            0 => {
                let (Some(offset), Some(value)) = (bytes.byte(), bytes.word()) else { return };
                let data = value.to_le_bytes();
                let length = usize::from(operation >> 5).min(data.len());
                machine.io_write(u64::from(offset), data.get(..length).unwrap_or(&data));
            }
            1 => {
                let Some(offset) = bytes.byte() else { return };
                machine.io_read(u64::from(offset), &mut [0; 8]);
            }
            2 => machine.set_line(operation >> 3, operation & 4 != 0),
            _ => {
                for (vcpu, local) in machine.locals().iter().enumerate() {
                    if local.acknowledge().is_some() {
                        machine.perform(vcpu, local.end_of_interrupt());
                    }
                }
            }
        }
    }
}

/// The test device: operation, where, and value; its lines end at an IO-APIC.
pub fn fuzz_test_device(data: &[u8]) {
    let mut bytes = Bytes(data);
    let machine = controllers();
    let mut device = TestDevice::new((0..24).map(|pin| machine.line(pin)).collect());
    while let (Some(operation), Some(at)) = (bytes.byte(), bytes.take()) {
        let at = u16::from_le_bytes(at);
        let start = if operation & 0x80 == 0 { SCRATCH.start } else { LINES.start };
        let port = start.wrapping_add(at);
        let addr = MEMORY.start.wrapping_add(u64::from(at)).wrapping_sub(u64::from(operation));
        let mut data = [operation; 64];
        let len = usize::from(operation >> 2 & 0x1f).saturating_add(1);
        let data = data.get_mut(..len).unwrap_or_default();
        match operation & 3 {
            0 => device.write(port, operation),
            1 => {
                let _ = device.read(port);
            }
            2 => {
                device.memory_write(addr, data);
            }
            _ => {
                device.memory_read(addr, data);
            }
        }
    }
}

/// A target: takes bytes, and returns.
pub type Target = fn(&[u8]);

/// Every target by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("serial", fuzz_serial),
    ("rtc", fuzz_rtc),
    ("i8042", fuzz_i8042),
    ("pci", fuzz_pci),
    ("pit_pic", fuzz_pit_pic),
    ("local_apic", fuzz_local_apic),
    ("io_apic", fuzz_io_apic),
    ("test_device", fuzz_test_device),
    ("virtio_entropy", fuzz_entropy),
    ("virtio_console", fuzz_console),
    ("virtio_block", fuzz_block),
    ("virtio_net", super::virtio::net::fuzz::fuzz_net),
    ("lguest", crate::platform::lguest::fuzz::fuzz_lguest),
];
