//! The devices on the machine's bus, from their cores to the end of their work.

use std::sync::Arc;

use super::MachineError;
use crate::devices::apic::controller::InterruptController;
use crate::devices::pci::intx::IntxLines;
use crate::devices::pci::msix::MsiSink;
use crate::devices::pci::{PciBus, PciFunction};
use crate::devices::virtio::lguest_bus::LguestBus;
use crate::devices::virtio::long_bus::LongBus;
use crate::devices::virtio::pci::{PciPlace, VirtioPci};
use crate::devices::virtio::{DeviceKind, IoThreads, VirtioDevice};
use crate::layout::PCI_INTERRUPTS;
use crate::memory::GuestRam;
use crate::sandbox::Sandbox;

/// The devices, and the threads that work for them.
#[derive(Debug)]
pub(super) struct Devices {
    on: Bus,
    io: Arc<IoThreads>,
}

/// How devices on PCI interrupt.
#[derive(Debug)]
pub(super) struct Wiring {
    /// By their lines.
    pub(super) lines: IntxLines,
    /// By messages, if anybody takes them.
    pub(super) messages: Option<Arc<dyn MsiSink>>,
    /// What of a device's features is not offered.
    pub(super) kept_back: fn(DeviceKind) -> u64,
}

impl Wiring {
    /// That of a PC.
    pub(super) fn pc(controller: &Arc<InterruptController>) -> Self {
        let line = |pin| (pin, controller.line(pin));
        let others = PCI_INTERRUPTS.skip(1).map(line);
        Self {
            lines: IntxLines::new(line(PCI_INTERRUPTS.start), others),
            messages: Some(Arc::clone(controller) as _),
            kept_back: |_| 0,
        }
    }
}

/// What carries them.
#[derive(Debug)]
enum Bus {
    Pci(Vec<Arc<VirtioPci>>),
    Lguest(Arc<LguestBus>),
    Long(Arc<LongBus>),
}

impl Devices {
    /// Those on a guest's lguest bus.
    pub(super) fn on_lguest_bus(bus: Arc<LguestBus>, io: Arc<IoThreads>) -> Self {
        Self { on: Bus::Lguest(bus), io }
    }

    /// Those on the bus of a 64-bit guest.
    pub(super) fn on_long_bus(bus: Arc<LongBus>, io: Arc<IoThreads>) -> Self {
        Self { on: Bus::Long(bus), io }
    }

    /// Puts the cores on a bus, one slot each.
    pub(super) fn on_pci(
        cores: Vec<Box<dyn VirtioDevice>>,
        io: Arc<IoThreads>,
        ram: &GuestRam,
        wiring: &Wiring,
    ) -> Result<(PciBus, Self), MachineError> {
        let mut bus = PciBus::default();
        let mut functions = Vec::new();
        for core in cores {
            let slot = bus.next_slot()?;
            tracing::debug!(%slot, device = %core.kind(), "on the bus");
            let place = PciPlace {
                slot,
                pin: wiring.lines.pin(slot),
                messages: wiring.messages.clone(),
                kept_back: (wiring.kept_back)(core.kind()),
                memory: Arc::clone(ram.mmap()),
            };
            let function = VirtioPci::new(core, place).map_err(MachineError::Device)?;
            bus.add(Arc::clone(&function) as Arc<dyn PciFunction>);
            functions.push(function);
        }
        Ok((bus, Self { on: Bus::Pci(functions), io }))
    }

    /// Has the threads enter the sandbox, and those that are still to come.
    pub(super) fn confine(&self, sandbox: Arc<dyn Sandbox>) {
        self.io.confine(sandbox);
    }

    /// Finishes what is in flight, and stops the threads.
    pub(super) fn shut_down(&self) {
        match &self.on {
            Bus::Pci(functions) => functions.iter().for_each(|function| function.shut_down()),
            Bus::Lguest(bus) => bus.shut_down(),
            Bus::Long(bus) => bus.shut_down(),
        }
        self.io.stop();
    }
}
