//! The Differentiated System Description Table: devices that no bus announces, and what
//! to write to switch the machine off.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, ResourceTemplate, Scope};
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::devices::pvpanic::PVPANIC_PORT;
use crate::layout::{ACPI_SLP_TYP_S5, COM1, COM1_IRQ, RTC};

/// The length of a table's header.
const HEADER: u32 = 36;
/// Integers are 64 bits wide from this revision on.
const DSDT_REVISION: u8 = 2;

/// Makes the table.
pub(super) fn dsdt() -> Sdt {
    let mut aml = Vec::new();
    let com1 = Ports { first: COM1.start, count: COM1.end.saturating_sub(COM1.start) as u8 };
    isa_device("COM1", &EISAName::new("PNP0501"), com1, Some(COM1_IRQ), &mut aml);
    let rtc = Ports { first: RTC.start, count: RTC.end.saturating_sub(RTC.start) as u8 };
    // Without an interrupt: our clock has no alarm, and Linux sets none then.
    isa_device("RTC_", &EISAName::new("PNP0B00"), rtc, None, &mut aml);
    let pvpanic = Ports { first: PVPANIC_PORT, count: 1 };
    isa_device("PEVT", &"QEMU0001", pvpanic, None, &mut aml);
    super::pci::host_bridge(&mut aml);
    // \_S5: SLP_TYP for the sleep control register (twice, for PM1a and PM1b, which a
    // hardware-reduced machine has not), and two reserved numbers (ACPI 6.5, 7.4.2).
    let slp_typ = ACPI_SLP_TYP_S5;
    Name::new("_S5_".into(), &Package::new(vec![&slp_typ, &slp_typ, &0u8, &0u8]))
        .to_aml_bytes(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// A device's I/O ports.
struct Ports {
    first: u16,
    count: u8,
}

/// A device of the ISA kind: fixed ports, and perhaps an edge-triggered interrupt of its own.
fn isa_device(name: &str, id: &dyn Aml, ports: Ports, irq: Option<u8>, aml: &mut Vec<u8>) {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    let hid = Name::new("_HID".into(), id);
    let uid = Name::new("_UID".into(), &0u8);
    let ports = IO::new(ports.first, ports.first, 1, ports.count);
    let interrupt = irq.map(|irq| Interrupt::new(consumer, edge, active_low, shared, irq.into()));
    let mut resources: Vec<&dyn Aml> = vec![&ports];
    resources.extend(interrupt.iter().map(|interrupt| interrupt as &dyn Aml));
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let device = Device::new(name.into(), vec![&hid, &uid, &crs]);
    Scope::new("_SB_".into(), vec![&device]).to_aml_bytes(aml);
}
