//! The tables of fixed form: FADT and MADT.

use std::num::NonZeroU32;

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{
    ACPI_RESET, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL, ACPI_SLEEP_STATUS, IO_APIC, IO_APIC_ID,
    LOCAL_APIC,
};

/// IAPC_BOOT_ARCH: there is no VGA (ACPI 6.5, table 5.11).
const VGA_NOT_PRESENT: u16 = 1 << 2;

/// A byte-wide register at an I/O port.
fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// The Fixed ACPI Description Table (ACPI 6.5, 5.2.9).
///
/// The 8042 bit stays clear on purpose: there is a keyboard controller, but all it can do
/// is reset the machine, which needs no probing. With the bit set Linux would spend part
/// of its boot looking for a keyboard.
pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::Headless)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = VGA_NOT_PRESENT.into();
    fadt.reset_reg = byte_port(ACPI_RESET);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = byte_port(ACPI_SLEEP_CONTROL);
    fadt.sleep_status_reg = byte_port(ACPI_SLEEP_STATUS);
    fadt.finalize()
}

/// Structure type: processor local x2APIC.
const PROCESSOR_LOCAL_X2APIC: u8 = 9;
/// Local APIC flags: the processor is enabled.
const ENABLED: u32 = 1;
/// The first identifier an xAPIC entry cannot have: 255 is the broadcast.
const XAPIC_END: u32 = 255;
/// The table's length without structures.
const MADT_HEADER: u32 = 44;
/// The revision of ACPI 6.5's MADT.
const MADT_REVISION: u8 = 6;
/// Where the local APICs' address is in the table.
const MADT_LOCAL_APIC: usize = 36;

/// Processor local x2APIC structure (ACPI 6.5, 5.2.12.12).
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct LocalX2Apic {
    kind: u8,
    length: u8,
    reserved: [u8; 2],
    x2apic_id: U32,
    flags: U32,
    processor_uid: U32,
}

/// The Multiple APIC Description Table (ACPI 6.5, 5.2.12): a local APIC per vCPU and one
/// IO-APIC for all interrupts. There is no dual-8259 and no source override: pin n is
/// interrupt n.
pub(super) fn madt(cpus: NonZeroU32) -> Sdt {
    let mut madt =
        Sdt::new(*b"APIC", MADT_HEADER, MADT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // All device addresses lie below 4 GiB.
    madt.write_u32(MADT_LOCAL_APIC, LOCAL_APIC.0 as u32);
    for id in 0..cpus.get() {
        match u8::try_from(id) {
            Ok(small) if id < XAPIC_END => {
                let apic = ProcessorLocalApic::new(small, small, EnabledStatus::Enabled);
                madt.append_slice(apic.as_bytes());
            }
            _ => {
                let apic = LocalX2Apic {
                    kind: PROCESSOR_LOCAL_X2APIC,
                    length: size_of::<LocalX2Apic>() as u8,
                    reserved: [0; 2],
                    x2apic_id: id.into(),
                    flags: ENABLED.into(),
                    processor_uid: id.into(),
                };
                madt.append_slice(apic.as_bytes());
            }
        }
    }
    madt.append_slice(IoApic::new(IO_APIC_ID, IO_APIC.0 as u32, 0).as_bytes());
    madt
}
