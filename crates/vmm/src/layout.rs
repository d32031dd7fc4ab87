//! The guest-physical address map and the I/O ports of the machine.
//!
//! Three parties must agree on these numbers: the loader (which places things and
//! describes RAM to the kernel), the ACPI tables (which describe the hardware) and the
//! `pc` platform (which answers at the addresses). They all take them from here.
//!
//! ```text
//! 0x0000_0000 .. 0x0009_fc00   RAM, boot structures near the bottom
//! 0x0009_fc00 .. 0x0010_0000   BIOS area: RAM, reserved; ACPI tables, reset vector
//! 0x0010_0000 .. 0xc000_0000   RAM as far as there is any: kernel, initrd at the top
//! 0xc000_0000 .. 0xe000_0000   MMIO window for PCI devices
//! 0xe000_0000 .. 0xe010_0000   PCI configuration space (ECAM)
//! 0xfec0_0000                  IO-APIC
//! 0xfee0_0000                  local APICs, MSI
//! 0x1_0000_0000 ..             RAM that did not fit below the hole
//! ```

use std::ops::Range;

use softcpu::addr::GuestPhysAddr;

/// Where RAM below 4 GiB ends at the latest, and the hole for devices starts.
pub const HOLE_START: GuestPhysAddr = GuestPhysAddr(0xc000_0000);
/// Where the hole ends and high RAM starts.
pub const HOLE_END: GuestPhysAddr = GuestPhysAddr(0x1_0000_0000);

/// The window PCI devices' 32-bit BARs are placed in.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express configuration space of the one bus: 4 KiB for each of 256 functions.
pub const PCI_ECAM: Range<u64> = 0xe000_0000..0xe010_0000;

/// The ports to PCI configuration space: four bytes of address, four of data.
pub const PCI_CONFIG_PORTS: Range<u16> = 0xcf8..0xd00;
/// The PCI configuration space's data port.
pub const PCI_CONFIG_DATA: u16 = 0xcfc;
/// The IO-APIC pins that PCI's interrupt lines arrive at.
pub const PCI_INTERRUPTS: Range<u8> = 16..24;

/// The IO-APIC's registers.
pub const IO_APIC: GuestPhysAddr = GuestPhysAddr(0xfec0_0000);
/// How much address space the IO-APIC's registers take.
pub const IO_APIC_SIZE: u64 = 0x1000;
/// The IO-APIC's own identification, beside those of the local APICs.
pub const IO_APIC_ID: u8 = 0;
/// Input pins of the IO-APIC; pin n is global system interrupt n.
pub const IO_APIC_PINS: u8 = 24;
/// The local APICs' registers, and where devices write MSIs.
pub const LOCAL_APIC: GuestPhysAddr = GuestPhysAddr(0xfee0_0000);
/// How much address space MSIs and the local APIC's registers take.
pub const LOCAL_APIC_SIZE: u64 = 0x10_0000;

/// The end of what e820 calls usable below 1 MiB: the BIOS's data area follows.
pub const LOW_USABLE_END: GuestPhysAddr = GuestPhysAddr(0x9_fc00);
/// Where a PC has its firmware: RAM here, but reserved.
pub const BIOS_AREA: Range<u64> = 0xe_0000..0x10_0000;
/// Where the ACPI tables are: in the BIOS area, which is searched for their root.
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_f000;
/// Where a PC starts after reset (F000:FFF0), and where kernels jump to reboot.
pub const RESET_VECTOR: Range<u64> = 0xf_fff0..0x10_0000;
/// The end of the BIOS area; kernels are loaded from here.
pub const HIGH_MEMORY: GuestPhysAddr = GuestPhysAddr(0x10_0000);

/// The global descriptor table that a kernel starts with.
pub const BOOT_GDT: GuestPhysAddr = GuestPhysAddr(0x500);
/// The boot protocol's structure (zero page or PVH start info), and the tables it points to.
pub const BOOT_INFO: Range<u64> = 0x7000..0x9000;
/// The multiboot information, and what it points to. High, because there are multiboot
/// kernels that are linked to some low address.
pub const MULTIBOOT_INFO: Range<u64> = 0x9_0000..0x9_f000;
/// The page tables a 64-bit kernel starts with: one PML4, one PDPT, four directories.
pub const BOOT_PAGE_TABLES: Range<u64> = 0x9000..0xf000;
/// The command line, zero-terminated.
pub const COMMAND_LINE: Range<u64> = 0x2_0000..0x3_0000;

/// COM1: eight ports.
pub const COM1: Range<u16> = 0x3f8..0x400;
/// COM1's interrupt.
pub const COM1_IRQ: u8 = 4;

/// The real-time clock: index and data port.
pub const RTC: Range<u16> = 0x70..0x72;

/// The keyboard controller's data port.
pub const I8042_DATA: u16 = 0x60;
/// The keyboard controller's status and command port.
pub const I8042_COMMAND: u16 = 0x64;
/// The keyboard controller's interrupt.
pub const I8042_IRQ: u8 = 1;

/// ACPI sleep control register (ACPI 6.5, 4.8.3.7): one byte.
pub const ACPI_SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register: one byte, wake status in bit 7.
pub const ACPI_SLEEP_STATUS: u16 = 0x601;
/// SLP_EN in the sleep control register: enter the state in [`ACPI_SLP_TYP_SHIFT`].
pub const ACPI_SLP_EN: u8 = 1 << 5;
/// Where SLP_TYP is in the sleep control register: three bits.
pub const ACPI_SLP_TYP_SHIFT: u8 = 2;
/// The value of SLP_TYP that the DSDT's `\_S5` gives for "off".
pub const ACPI_SLP_TYP_S5: u8 = 5;
/// ACPI reset register (ACPI 6.5, 4.8.3.6): one byte.
pub const ACPI_RESET: u16 = 0x604;
/// What is written to [`ACPI_RESET`] to reset the machine.
pub const ACPI_RESET_VALUE: u8 = 1;
