//! The loader: puts a kernel, its initrds, its command line and what it must know of the
//! machine into guest RAM, and says how the first vCPU enters it.
//!
//! It takes the place of firmware and boot loader. Kernels are bzImages (whose vmlinux is
//! decompressed here, natively, to where it is linked; the setup code and decompressor
//! inside never run), ELF vmlinux files, and multiboot ELF files. Everything read from
//! files is untrusted: lengths and addresses are checked, and what does not make sense is
//! a [`LoadError`] whose one line names the thing and the remedy.
//!
//! RAM must be fresh, that is zero ([`GuestRam::new`], [`GuestRam::clear`]). The Machine
//! calls [`load`] once before any vCPU runs, then [`EntryPoint::vcpu_state`].

mod boot_params;
mod bzimage;
pub mod disk_boot;
mod elf;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod identify;
mod image;
mod initrd;
mod lguest;
mod lz4_legacy;
mod memory_map;
mod multiboot;
mod payload;
mod place;
mod pvh;
mod reset_vector;
#[cfg(test)]
mod synthetic;
#[cfg(test)]
mod tests;
mod vcpu_start;
mod vmlinux;

use std::num::NonZeroU32;
use std::ops::Range;

use softcpu::GuestPhysAddr;
use zerocopy::IntoBytes;

use boot_params::{BootParams, DEFAULT_CMDLINE_SIZE, SetupHeader};
pub use error::{KernelError, LoadError, PlaceError};
use identify::KernelKind;
pub use identify::LooksLike;
pub use image::Image;
pub use lguest::{
    DeviceForm, LguestGuest, LongGuest, LongTold, MAX_RAM as LGUEST_MAX_RAM, PlatformKind,
    device_form, load_lguest, load_long, platform_of,
};
pub use memory_map::{MapEntry, RangeType, memory_map};
pub use place::Placed;
use place::Placer;
pub use vcpu_start::set_firmware_msrs;

use crate::acpi;
use crate::layout::{ACPI_TABLES, BOOT_INFO, COMMAND_LINE, MULTIBOOT_INFO};
use crate::memory::GuestRam;

/// What is to be booted.
#[derive(Debug)]
pub struct BootSource<'b> {
    /// The kernel.
    pub kernel: &'b Image,
    /// Its initrds: for Linux they become one, for multiboot each is a module.
    pub initrds: &'b [Image],
    /// Its command line.
    pub command_line: &'b str,
    /// How many vCPUs the ACPI tables describe.
    pub cpus: NonZeroU32,
}

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// Linux's 64-bit boot protocol, at `startup_64` of the vmlinux.
    Linux64 {
        /// The first instruction.
        rip: GuestPhysAddr,
        /// The zero page, for RSI.
        boot_params: GuestPhysAddr,
    },
    /// PVH: 32-bit protected mode without paging.
    Pvh {
        /// The first instruction.
        eip: GuestPhysAddr,
        /// The start info, for EBX.
        start_info: GuestPhysAddr,
    },
    /// Multiboot: 32-bit protected mode without paging.
    Multiboot {
        /// The first instruction.
        eip: GuestPhysAddr,
        /// The multiboot information, for EBX.
        info: GuestPhysAddr,
    },
}

/// A guest that is ready to be started.
#[derive(Debug)]
pub struct LoadedGuest {
    /// How to enter it.
    pub entry: EntryPoint,
    /// What is where, for those who want to know. Nothing overlaps.
    pub placed: Vec<Placed>,
}

/// Loads what is to be booted into fresh RAM.
///
/// # Errors
/// [`LoadError`]: whatever is wrong with what the user gave. RAM is then half filled.
pub fn load(ram: &GuestRam, source: &BootSource<'_>) -> Result<LoadedGuest, LoadError> {
    let in_kernel =
        |reason: KernelError| LoadError::Kernel { name: source.kernel.name().to_owned(), reason };
    let head = source.kernel.bytes_at(0, identify::HEAD_LEN);
    let head = head.map_err(|error| in_kernel(error.into()))?;
    let kind = identify::identify(&head).map_err(in_kernel)?;

    let mut placer = Placer::new(ram);
    place_boot_structures(&mut placer, kind)?;
    reset_vector::place(&mut placer)?;
    let rsdp = place_acpi(&mut placer, source.cpus)?;

    let kernel = load_kernel(source.kernel, kind, &head, &mut placer).map_err(in_kernel)?;
    let entry = match kernel {
        Kernel::Linux64 { entry, end, header } => {
            let hdr = &header;
            let reach = or_default(hdr.initrd_addr_max.get(), u32::MAX);
            let initrd = initrd::place_together(&mut placer, source.initrds, end, reach)?;
            let max = or_default(hdr.cmdline_size.get(), DEFAULT_CMDLINE_SIZE);
            let cmd_line = place_command_line(&mut placer, source.command_line, max)?;
            let map = memory_map(ram);
            let told = boot_params::Told { cmd_line, initrd, rsdp, map: &map };
            let params = BootParams::new(header, &told);
            placer.write(BOOT_INFO.start, params.as_bytes(), "zero page")?;
            EntryPoint::Linux64 {
                rip: GuestPhysAddr(entry),
                boot_params: GuestPhysAddr(BOOT_INFO.start),
            }
        }
        Kernel::Pvh { entry, end } => {
            let initrd = initrd::place_together(&mut placer, source.initrds, end, u64::MAX)?;
            let cmdline =
                place_command_line(&mut placer, source.command_line, DEFAULT_CMDLINE_SIZE.into())?;
            let info = pvh::start_info(cmdline, initrd, rsdp, &memory_map(ram));
            placer.write(BOOT_INFO.start, &info, "PVH start info")?;
            EntryPoint::Pvh {
                eip: GuestPhysAddr(entry),
                start_info: GuestPhysAddr(BOOT_INFO.start),
            }
        }
        Kernel::Multiboot { entry, end } => {
            let info = place_multiboot(&mut placer, source, end)?;
            EntryPoint::Multiboot { eip: GuestPhysAddr(entry), info: GuestPhysAddr(info) }
        }
    };
    tracing::debug!(?entry, "guest loaded");
    for placed in placer.taken() {
        tracing::trace!(what = placed.what, range = ?format_args!("{:#x?}", placed.range), "placed");
    }
    Ok(LoadedGuest { entry, placed: placer.into_taken() })
}

/// A kernel in guest RAM.
enum Kernel {
    Linux64 { entry: u64, end: u64, header: SetupHeader },
    Pvh { entry: u64, end: u64 },
    Multiboot { entry: u64, end: u64 },
}

/// Places what the kernel's boot protocol has in low memory, or room for it.
fn place_boot_structures(placer: &mut Placer<'_>, kind: KernelKind) -> Result<(), PlaceError> {
    vcpu_start::place_descriptors(placer)?;
    let information = match kind {
        KernelKind::BzImage | KernelKind::Elf => {
            vcpu_start::place_page_tables(placer)?;
            BOOT_INFO
        }
        // It starts without paging and may be linked to where the tables would be.
        KernelKind::Multiboot => MULTIBOOT_INFO,
    };
    let len = information.end.saturating_sub(information.start);
    placer.claim(information.start, len, "boot information")
}

fn load_kernel(
    image: &Image,
    kind: KernelKind,
    head: &[u8],
    placer: &mut Placer<'_>,
) -> Result<Kernel, KernelError> {
    Ok(match kind {
        KernelKind::BzImage => {
            let bzimage::Loaded { entry, end, header } = bzimage::load(image, head, placer)?;
            Kernel::Linux64 { entry, end, header }
        }
        KernelKind::Elf => match vmlinux::load(image, placer)? {
            (vmlinux::Entry::Pvh(entry), end) => Kernel::Pvh { entry, end },
            (vmlinux::Entry::Linux64(entry), end) => {
                Kernel::Linux64 { entry, end, header: SetupHeader::for_vmlinux() }
            }
        },
        KernelKind::Multiboot => {
            let (entry, end) = multiboot::load(image, head, placer)?;
            Kernel::Multiboot { entry, end }
        }
    })
}

/// Puts the ACPI tables into the BIOS area; returns where their root pointer is.
fn place_acpi(placer: &mut Placer<'_>, cpus: NonZeroU32) -> Result<u64, LoadError> {
    let tables = acpi::tables(GuestPhysAddr(ACPI_TABLES.start), cpus)?;
    placer.put(ACPI_TABLES, &tables.bytes, "ACPI tables")?;
    Ok(tables.rsdp.0)
}

/// Puts the command line into place, zero-terminated; returns where it is.
fn place_command_line(placer: &mut Placer<'_>, line: &str, max: u64) -> Result<u64, LoadError> {
    // There must be room for the terminating zero, whatever a header says.
    let room = COMMAND_LINE.end.saturating_sub(COMMAND_LINE.start).saturating_sub(1);
    let max = usize::try_from(max.min(room)).unwrap_or(usize::MAX);
    if line.len() > max {
        return Err(LoadError::CommandLineTooLong { len: line.len(), max });
    }
    if line.contains('\0') {
        return Err(LoadError::CommandLineZero);
    }
    placer.put(COMMAND_LINE, &[line.as_bytes(), b"\0"].concat(), "command line")?;
    Ok(COMMAND_LINE.start)
}

fn place_multiboot(
    placer: &mut Placer<'_>,
    source: &BootSource<'_>,
    end: u64,
) -> Result<u64, LoadError> {
    // By convention the first word is the kernel's name, as boot loaders pass it.
    let line = match source.command_line {
        "" => source.kernel.name().to_owned(),
        line => format!("{} {line}", source.kernel.name()),
    };
    let cmdline = place_command_line(placer, &line, u64::MAX)?;
    let ranges = initrd::place_apart(placer, source.initrds, end)?;
    let names = source.initrds.iter().map(Image::name);
    let modules: Vec<(Range<u64>, &str)> = ranges.into_iter().zip(names).collect();
    let ram = placer.ram();
    let map = memory_map(ram);
    let told = multiboot::Told { cmdline, modules: &modules, map: &map, low_end: ram.low_end().0 };
    placer.write(MULTIBOOT_INFO.start, &multiboot::info(&told)?, "multiboot information")?;
    Ok(MULTIBOOT_INFO.start)
}

/// A header field, or a default where an old header has none.
fn or_default(field: u32, default: u32) -> u64 {
    if field == 0 { default.into() } else { field.into() }
}
