//! The ACPI tables: what a stock kernel learns the hardware from.
//!
//! The machine is "hardware-reduced" (ACPI 6.5, 4.1): no SMI, no fixed event blocks, no
//! PM timer, no PIC, no PIT. Power-off and reset are single registers. The loader puts the
//! result where firmware would; every address and port comes from [`crate::layout`].

mod dsdt;
mod fixed;
mod pci;

use std::num::NonZeroU32;

use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use softcpu::GuestPhysAddr;

/// Who made the tables.
pub(crate) const OEM_ID: [u8; 6] = *b"LGUEST";
/// For which machine.
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"LGUESTPC";
/// In which revision.
pub(crate) const OEM_REVISION: u32 = 1;

/// Each table begins at a multiple of this.
const TABLE_ALIGN: usize = 16;
/// The most vCPUs the tables can describe: xAPIC identifiers 0 to 254, and x2APIC
/// entries from there on.
pub const MAX_CPUS: u32 = 1024;

/// Why there are no tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// More than [`MAX_CPUS`].
    #[error("{0} CPUs are more than a machine can have: give --cpus {MAX_CPUS} or fewer")]
    TooManyCpus(u32),
}

/// The tables as they are to be in guest memory.
#[derive(Clone, Debug)]
pub struct AcpiTables {
    /// All tables, the first byte belonging to the address that was asked for.
    pub bytes: Vec<u8>,
    /// Where the root pointer (RSDP) will be.
    pub rsdp: GuestPhysAddr,
}

/// Makes the tables of a machine with `cpus` vCPUs for the address `base`.
///
/// vCPU n has local APIC identifier n.
///
/// # Errors
/// [`AcpiError`] for more vCPUs than can be described.
pub fn tables(base: GuestPhysAddr, cpus: NonZeroU32) -> Result<AcpiTables, AcpiError> {
    if cpus.get() > MAX_CPUS {
        return Err(AcpiError::TooManyCpus(cpus.get()));
    }
    // The root comes first, where a search of the BIOS area finds it at once; what it
    // holds is known last.
    let mut blob = Blob { base: base.0, bytes: vec![0; Rsdp::len()] };
    let dsdt = blob.push(&dsdt::dsdt());
    let fadt = blob.push(&fixed::fadt(dsdt));
    let madt = blob.push(&fixed::madt(cpus));
    let mcfg = blob.push(&pci::mcfg());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    xsdt.add_entry(mcfg);
    let xsdt = blob.push(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    let mut bytes = blob.bytes;
    bytes.splice(..rsdp.len(), rsdp);
    Ok(AcpiTables { bytes, rsdp: base })
}

struct Blob {
    base: u64,
    bytes: Vec<u8>,
}

impl Blob {
    /// Appends a table; returns its address.
    fn push(&mut self, table: &dyn Aml) -> u64 {
        let start = self.bytes.len().next_multiple_of(TABLE_ALIGN);
        self.bytes.resize(start, 0);
        table.to_aml_bytes(&mut self.bytes as &mut dyn AmlSink);
        self.base.saturating_add(start as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::ACPI_TABLES;

    fn made(cpus: u32) -> AcpiTables {
        tables(GuestPhysAddr(ACPI_TABLES.start), NonZeroU32::new(cpus).unwrap()).unwrap()
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address, its checksum verified.
    fn table(tables: &AcpiTables, addr: u64) -> &[u8] {
        let rest = &tables.bytes[(addr - ACPI_TABLES.start) as usize..];
        let len = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
        assert_eq!(sum(&rest[..len]), 0, "checksum of {}", String::from_utf8_lossy(&rest[..4]));
        &rest[..len]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn find<'t>(tables: &'t AcpiTables, signature: &[u8]) -> &'t [u8] {
        let rsdp = &tables.bytes[..36];
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(rsdp)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(tables, u64_at(rsdp, 24));
        let entries = xsdt[36..].chunks(8).map(|entry| table(tables, u64_at(entry, 0)));
        entries.into_iter().find(|table| table.starts_with(signature)).unwrap()
    }

    #[test]
    fn everything_is_reached_from_the_root_with_right_checksums() {
        let tables = made(2);
        let fadt = find(&tables, b"FACP");
        assert_eq!(fadt.len(), 276);
        let dsdt = table(&tables, u64_at(fadt, 140));
        assert!(dsdt.starts_with(b"DSDT") && dsdt[8] >= 2);
        assert!(dsdt.windows(4).any(|name| name == b"_S5_"));
        find(&tables, b"APIC");
    }

    #[test]
    fn the_fadt_has_the_ports_of_the_layout() {
        use crate::layout::*;
        let tables = made(1);
        let fadt = find(&tables, b"FACP");
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        for (at, port) in [(116, ACPI_RESET), (244, ACPI_SLEEP_CONTROL), (256, ACPI_SLEEP_STATUS)] {
            assert_eq!((fadt[at], fadt[at + 1], u64_at(fadt, at + 4)), (1, 8, port.into()));
        }
        assert_eq!(fadt[128], ACPI_RESET_VALUE);
    }

    #[test]
    fn every_cpu_is_in_the_madt() {
        for cpus in [1, 2, 64, 255, 256, MAX_CPUS] {
            let tables = made(cpus);
            let madt = find(&tables, b"APIC");
            assert!((tables.bytes.len() as u64) < ACPI_TABLES.end - ACPI_TABLES.start);
            let (mut at, mut ids, mut io_apics) = (44, Vec::new(), 0);
            while at < madt.len() {
                match madt[at] {
                    0 => ids.push(u32::from(madt[at + 3])),
                    9 => ids.push(u32::from_le_bytes(madt[at + 4..at + 8].try_into().unwrap())),
                    1 => io_apics += 1,
                    other => panic!("structure {other}"),
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!((at, io_apics), (madt.len(), 1));
            assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        }
    }

    #[test]
    fn too_many_cpus_are_refused() {
        let error = tables(GuestPhysAddr(0), NonZeroU32::MAX).unwrap_err();
        assert!(error.to_string().contains("--cpus 1024"));
    }

    /// Writes each table to a file of its own for `iasl -d` to look at.
    #[test]
    #[ignore = "writes files; set LGUEST_ACPI_DUMP to a directory"]
    fn dump() {
        let directory = std::env::var("LGUEST_ACPI_DUMP").unwrap();
        let tables = made(2);
        let fadt = find(&tables, b"FACP");
        let dsdt = table(&tables, u64_at(fadt, 140));
        let xsdt = table(&tables, u64_at(&tables.bytes, 24));
        for (name, bytes) in
            [("facp", fadt), ("apic", find(&tables, b"APIC")), ("dsdt", dsdt), ("xsdt", xsdt)]
        {
            std::fs::write(format!("{directory}/{name}.dat"), bytes).unwrap();
        }
    }
}
