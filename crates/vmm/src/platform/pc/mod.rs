//! The `pc` platform: what a stock 64-bit kernel finds on an ACPI machine without the
//! legacy of forty years.
//!
//! It owns the devices and decides which port or address is whose. It knows neither the
//! engine that runs the vCPUs nor the Launcher; what the guest asks of the machine as a
//! whole goes to the function it was given.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use softcpu::PhysMemory;

use crate::clock::host_tsc;
use crate::devices::acpi_power::AcpiPower;
use crate::devices::apic::controller::InterruptController;
use crate::devices::debug_exit::{self, DEBUG_EXIT_PORT};
use crate::devices::i8042::I8042;
use crate::devices::pci::PciBus;
use crate::devices::pic::Pic;
use crate::devices::pit::{PORT_61, Pit};
use crate::devices::pvpanic::{self, PVPANIC_PORT};
use crate::devices::rtc::Rtc;
use crate::devices::serial::{SerialInput, SerialPort};
use crate::devices::test_device::TestDevice;
use crate::devices::{InterruptLine, Request};
use crate::layout::{COM1, COM1_IRQ, I8042_COMMAND, I8042_DATA, IO_APIC_PINS, PCI_CONFIG_PORTS};

pub mod kvm;
pub mod timers;
pub mod vcpu;

use kvm::clock::Epoch;

/// Who hears what the guest asks of the machine. Called on vCPU threads.
pub type RequestSink = Box<dyn Fn(Request) + Send + Sync>;

/// What a PC is built from.
pub struct PcConfig {
    /// Its interrupt controllers.
    pub controller: Arc<InterruptController>,
    /// Its RAM.
    pub memory: Arc<PhysMemory>,
    /// The moment its clocks count from.
    pub epoch: Epoch,
    /// The PCI bus, with all its devices.
    pub pci: PciBus,
    /// Where COM1's output goes.
    pub serial_output: Box<dyn Write + Send>,
    /// Whether the debug-exit port exists, and the test device beside it.
    pub debug_exit: bool,
    /// Who hears the guest's requests.
    pub requests: RequestSink,
}

impl fmt::Debug for PcConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PcConfig")
            .field("epoch", &self.epoch)
            .field("debug_exit", &self.debug_exit)
            .finish_non_exhaustive()
    }
}

/// The platform: devices and who answers where.
pub struct Pc {
    controller: Arc<InterruptController>,
    memory: Arc<PhysMemory>,
    epoch: Epoch,
    pci: PciBus,
    serial: SerialPort,
    rtc: Mutex<Rtc>,
    pit: Mutex<Pit>,
    pic: Mutex<Pic>,
    i8042: Mutex<I8042>,
    /// There if test kernels are expected, and the debug-exit port with it.
    test_device: Option<Mutex<TestDevice>>,
    requests: RequestSink,
}

impl fmt::Debug for Pc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pc").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pc {
    /// Puts the devices together.
    #[must_use]
    pub fn new(config: PcConfig) -> Arc<Self> {
        let line: InterruptLine = config.controller.line(COM1_IRQ);
        let test_device = config.debug_exit.then(|| {
            let lines = (0..IO_APIC_PINS).map(|pin| config.controller.line(pin));
            Mutex::new(TestDevice::new(lines.collect()))
        });
        Arc::new(Self {
            serial: SerialPort::new(line, config.serial_output),
            controller: config.controller,
            memory: config.memory,
            epoch: config.epoch,
            pci: config.pci,
            rtc: Mutex::default(),
            pit: Mutex::default(),
            pic: Mutex::default(),
            i8042: Mutex::default(),
            test_device,
            requests: config.requests,
        })
    }

    /// The interrupt controllers.
    #[must_use]
    pub fn controller(&self) -> &InterruptController {
        &self.controller
    }

    /// RAM.
    #[must_use]
    pub fn memory(&self) -> &PhysMemory {
        &self.memory
    }

    /// The moment the clocks count from.
    #[must_use]
    pub const fn epoch(&self) -> &Epoch {
        &self.epoch
    }

    /// Where COM1's input comes in.
    #[must_use]
    pub fn serial_input(&self) -> SerialInput {
        self.serial.input()
    }

    /// The test device, if there is one.
    fn test_device(&self) -> Option<MutexGuard<'_, TestDevice>> {
        self.test_device.as_ref().map(lock)
    }

    /// Reads guest-physical memory that is neither RAM nor an interrupt controller's.
    pub fn memory_read(&self, addr: u64, data: &mut [u8]) {
        if !self.pci.memory_read(addr, data)
            && !self.test_device().is_some_and(|device| device.memory_read(addr, data))
        {
            data.fill(0xff);
        }
    }

    /// Writes it; nobody minds if nobody is there.
    pub fn memory_write(&self, addr: u64, data: &[u8]) {
        if !self.pci.memory_write(addr, data)
            && let Some(mut device) = self.test_device()
        {
            device.memory_write(addr, data);
        }
    }

    /// Nanoseconds since the machine's epoch, for the timer chip.
    fn nanos(&self) -> u64 {
        self.epoch.frequency.nanos(host_tsc().wrapping_sub(self.epoch.tsc))
    }

    /// `in`: all devices here but PCI have byte-wide registers, so wider accesses are
    /// several.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        if PCI_CONFIG_PORTS.contains(&port) {
            self.pci.port_read(port, data);
            return;
        }
        data.fill(0xff);
        for (byte, port) in data.iter_mut().zip(port..=u16::MAX) {
            *byte = self.read_byte(port);
        }
    }

    /// `out`, likewise.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        if PCI_CONFIG_PORTS.contains(&port) {
            self.pci.port_write(port, data);
            return;
        }
        for (byte, port) in data.iter().zip(port..=u16::MAX) {
            if let Some(request) = self.write_byte(port, *byte) {
                (self.requests)(request);
            }
        }
    }

    /// The ports nobody answers read as all ones.
    fn read_byte(&self, port: u16) -> u8 {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        match port {
            port if COM1.contains(&port) => self.serial.read(port.wrapping_sub(COM1.start) as u8),
            0x70 => lock(&self.rtc).read_index(),
            0x71 => lock(&self.rtc).read_data(now()),
            I8042_DATA => lock(&self.i8042).read_data(),
            I8042_COMMAND => lock(&self.i8042).read_status(),
            PORT_61 => lock(&self.pit).read_port_61(self.nanos()),
            0x40..=0x43 => lock(&self.pit).read(port, self.nanos()),
            PVPANIC_PORT => pvpanic::read(),
            port if Pic::owns(port) => lock(&self.pic).read(port),
            port if TestDevice::owns(port) => {
                self.test_device().map_or(0xff, |device| device.read(port))
            }
            port if AcpiPower::owns(port) => AcpiPower.read(port),
            _ => 0xff,
        }
    }

    fn write_byte(&self, port: u16, value: u8) -> Option<Request> {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        match port {
            port if COM1.contains(&port) => {
                self.serial.write(port.wrapping_sub(COM1.start) as u8, value)
            }
            0x70 => lock(&self.rtc).write_index(value),
            0x71 => lock(&self.rtc).write_data(value, now()),
            I8042_DATA => return lock(&self.i8042).write_data(value),
            I8042_COMMAND => return lock(&self.i8042).write_command(value),
            PORT_61 => lock(&self.pit).write_port_61(value, self.nanos()),
            0x40..=0x43 => lock(&self.pit).write(port, value, self.nanos()),
            PVPANIC_PORT => return pvpanic::write(value),
            DEBUG_EXIT_PORT if self.test_device.is_some() => return Some(debug_exit::write(value)),
            // POST codes, and the delay kernels make by writing there.
            0x80 => tracing::trace!(value, "POST code"),
            port if Pic::owns(port) => lock(&self.pic).write(port, value),
            port if TestDevice::owns(port) => {
                if let Some(mut device) = self.test_device() {
                    device.write(port, value);
                }
            }
            port if AcpiPower::owns(port) => return AcpiPower.write(port, value),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
pub(crate) use tests::{test_controller, test_memory};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::TscFrequency;
    use crate::devices::apic::io::IoApic;
    use crate::devices::apic::local::{LocalApic, LocalApicConfig};
    use crate::memory::{GuestRam, MIN_RAM};
    use softcpu::VcpuHandle;

    #[derive(Clone, Debug, Default)]
    pub(super) struct Requests(pub(super) Arc<Mutex<Vec<Request>>>);

    pub(crate) fn test_memory() -> Arc<PhysMemory> {
        Arc::new(GuestRam::new(MIN_RAM).unwrap().phys_memory().unwrap())
    }

    pub(crate) fn test_controller(vcpus: usize) -> Arc<InterruptController> {
        let frequency = TscFrequency::from_hz(1_000_000_000);
        let timers = Arc::new(timers::Timers::new(vcpus, frequency));
        let local = |vcpu| {
            let deadlines = timers.clone();
            let handle = VcpuHandle::new();
            let config = LocalApicConfig {
                id: vcpu as u32,
                vcpu,
                phys_bits: 40,
                frequency,
                handle,
                deadlines,
            };
            let local = LocalApic::new(config);
            let _ = local.mmio_write(0xf0, &0x1ff_u32.to_le_bytes());
            local
        };
        InterruptController::new((0..vcpus).map(local).collect(), IoApic::default())
    }

    pub(super) fn pc() -> (Arc<Pc>, Requests) {
        let requests = Requests::default();
        let sink = requests.clone();
        let pc = Pc::new(PcConfig {
            controller: test_controller(1),
            memory: test_memory(),
            epoch: Epoch::now(TscFrequency::from_hz(1_000_000_000)),
            pci: PciBus::default(),
            serial_output: Box::new(std::io::sink()),
            debug_exit: true,
            requests: Box::new(move |request| sink.0.lock().unwrap().push(request)),
        });
        (pc, requests)
    }

    #[test]
    fn wide_accesses_at_the_top_of_the_port_space_end_there() {
        let (pc, _) = pc();
        let mut data = [0; 4];
        pc.port_read(0xfffe, &mut data);
        assert_eq!(data, [0xff; 4]);
        pc.port_write(0xffff, &[1, 2, 3, 4]);
    }
}
