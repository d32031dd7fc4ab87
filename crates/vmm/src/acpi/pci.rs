//! What tells the guest of the PCI bus: its host bridge in the DSDT, and where its
//! configuration space is in memory (MCFG; PCI Firmware Specification 3.3, 4.1.2).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package,
    PackageBuilder, ResourceTemplate, Scope,
};
use acpi_tables::mcfg::MCFG;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::devices::pci::intx::line_of;
use crate::devices::pci::{SLOTS, Slot};
use crate::layout::{PCI_CONFIG_PORTS, PCI_ECAM, PCI_INTERRUPTS, PCI_MMIO32};

/// `_PRT`: all functions of a device, in the low half of the address.
const ALL_FUNCTIONS: u32 = 0xffff;

/// The table that leads to configuration space in memory, which has room for bus 0 alone.
pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(PCI_ECAM.start, 0, 0, 0);
    mcfg
}

/// The host bridge, what it decodes, and where its interrupt lines end.
pub(super) fn host_bridge(aml: &mut Vec<u8>) {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &0u8);
    let segment = Name::new("_SEG".into(), &0u8);
    let bus = Name::new("_BBN".into(), &0u8);
    // The bridge itself is coherent, and so are all behind it.
    let coherent = Name::new("_CCA".into(), &1u8);

    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let ports = PCI_CONFIG_PORTS.end.saturating_sub(PCI_CONFIG_PORTS.start) as u8;
    let ports = IO::new(PCI_CONFIG_PORTS.start, PCI_CONFIG_PORTS.start, 1, ports);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_MMIO32.start as u32,
        PCI_MMIO32.end.saturating_sub(1) as u32,
        None,
    );
    let decodes = ResourceTemplate::new(vec![&buses, &ports, &memory]);
    let decodes = Name::new("_CRS".into(), &decodes);
    let routes = Name::new("_PRT".into(), &routes());
    let parts: Vec<&dyn Aml> = vec![&hid, &cid, &uid, &segment, &bus, &coherent, &decodes, &routes];
    let bridge = Device::new("PCI0".into(), parts);

    // Linux trusts the MCFG only if somebody has reserved what it points to.
    let id = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let size = PCI_ECAM.end.saturating_sub(PCI_ECAM.start) as u32;
    let space = Memory32Fixed::new(true, PCI_ECAM.start as u32, size);
    let space = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&space]));
    let reserved = Device::new("ECAM".into(), vec![&id, &space]);
    Scope::new("_SB_".into(), vec![&bridge, &reserved]).to_aml_bytes(aml);
}

/// INTA of each slot, by the number of its interrupt (ACPI 6.5, 6.2.13).
fn routes() -> PackageBuilder {
    let count = PCI_INTERRUPTS.len();
    let mut routes = PackageBuilder::new();
    for slot in 1..SLOTS {
        let address = u32::from(slot) << 16 | ALL_FUNCTIONS;
        let line = line_of(Slot(slot), count) as u8;
        let interrupt = PCI_INTERRUPTS.start.saturating_add(line);
        routes.add_element(&Package::new(vec![&address, &0u8, &0u8, &interrupt]));
    }
    routes
}
