//! 32-bit kernels with lguest guest support, loaded as the lguest Launcher did: the zero
//! page at physical 0, one entry of memory map, subarchitecture 1, and no firmware.
//!
//! A vmlinux is copied to its physical addresses. A bzImage whose payload is one is
//! unpacked here and loaded the same way; one that is older, or holds something else, is
//! put at 1 MiB and unpacks itself, which a guest in ring 1 may do.

use super::boot_params::SetupHeader;
use super::elf::{Class, Executable};
use super::error::{KernelError, LoadError};
use super::identify::{self, KernelKind};
use super::image::Image;
use super::place::Placer;
use super::{BootSource, bzimage, initrd};
use crate::layout::HOLE_START;
use crate::memory::{GuestRam, MIB};

use lguest_abi::boot::{
    self, BOOT_PARAMS_BYTES, BZIMAGE_AT, E820_RAM, KEEP_SEGMENTS, KERNEL_ALIGNMENT,
    LOADER_UNDEFINED, PAGE, SUBARCH_LGUEST, offset,
};

mod long;
mod long_tables;
mod recognise;

pub use long::{LongGuest, LongTold, load_long};
pub use recognise::{DeviceForm, PlatformKind, device_form, platform_of};

use recognise::Payload;

/// Where the command line ends at the latest: Linux' `COMMAND_LINE_SIZE` behind its start.
const COMMAND_LINE_MAX: usize = 2047;
/// RAM ends below the hole, with this much room for device pages.
pub const MAX_RAM: u64 = HOLE_START.0 - MIB;

/// A guest of the lguest platform that is ready to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LguestGuest {
    /// The first instruction.
    pub entry: u32,
    /// How much of RAM's end the initrd takes, bytes; whole pages.
    pub initrd: u32,
}

/// Loads a kernel that [`platform_of`] takes for one of this platform into fresh RAM, of
/// which the first `mem` bytes are what the guest is told of.
///
/// # Errors
/// [`LoadError`]: whatever is wrong with what the user gave.
pub fn load_lguest(
    ram: &GuestRam,
    mem: u32,
    source: &BootSource<'_>,
) -> Result<LguestGuest, LoadError> {
    let in_kernel =
        |reason: KernelError| LoadError::Kernel { name: source.kernel.name().to_owned(), reason };
    let mut placer = Placer::new(ram);
    placer.claim(boot::BOOT_PARAMS_AT.into(), PAGE.into(), "zero page")?;
    place_command_line(&mut placer, source.command_line)?;
    let (entry, end) = load_kernel(source.kernel, &mut placer).map_err(in_kernel)?;
    if end > mem.into() {
        return Err(in_kernel(KernelError::TooBig { needed: end }));
    }
    let last = u64::from(mem).saturating_sub(1);
    let initrd = initrd::place_together(&mut placer, source.initrds, end, last)?;
    // Below the end of RAM, which is below 4 GiB.
    let initrd = initrd.map_or(0, |range| u64::from(mem).saturating_sub(range.start) as u32);
    let params = zero_page(mem, initrd);
    placer.write(boot::BOOT_PARAMS_AT.into(), &params, "zero page")?;
    tracing::debug!(entry = format_args!("{entry:#x}"), end, initrd, "lguest guest loaded");
    Ok(LguestGuest { entry, initrd })
}

fn place_command_line(placer: &mut Placer<'_>, line: &str) -> Result<(), LoadError> {
    if line.len() > COMMAND_LINE_MAX {
        return Err(LoadError::CommandLineTooLong { len: line.len(), max: COMMAND_LINE_MAX });
    }
    if line.contains('\0') {
        return Err(LoadError::CommandLineZero);
    }
    let start = u64::from(boot::COMMAND_LINE_AT);
    // The kernel copies as much as it has room for, whatever the line's length.
    placer.claim(start, PAGE.into(), "command line")?;
    placer.write(start, &[line.as_bytes(), b"\0"].concat(), "command line")?;
    Ok(())
}

/// Puts the kernel into RAM; returns its entry and where it ends.
fn load_kernel(image: &Image, placer: &mut Placer<'_>) -> Result<(u32, u64), KernelError> {
    let head = image.bytes_at(0, identify::HEAD_LEN)?;
    match identify::identify(&head)? {
        KernelKind::BzImage => {
            let header = bzimage::setup_header(&head)?;
            match Payload::of(image, &header)? {
                Some(payload) if payload.is_vmlinux(image)? => {
                    let stream = payload.open(image)?;
                    load_vmlinux(&mut Executable::read(stream)?, placer)
                }
                _ => load_whole(image, &header, placer),
            }
        }
        KernelKind::Elf | KernelKind::Multiboot => {
            load_vmlinux(&mut Executable::read(image.section(0, image.len()))?, placer)
        }
    }
}

fn load_vmlinux<R: std::io::Read>(
    kernel: &mut Executable<R>,
    placer: &mut Placer<'_>,
) -> Result<(u32, u64), KernelError> {
    if kernel.class() != Class::Bits32 {
        return Err(KernelError::Malformed("it is a 64-bit kernel within a 32-bit one"));
    }
    kernel.load(placer)?;
    // A 32-bit file has no other entry.
    Ok((kernel.entry()? as u32, kernel.end()))
}

/// Puts a bzImage's protected-mode code at 1 MiB: it unpacks itself from there.
fn load_whole(
    image: &Image,
    header: &SetupHeader,
    placer: &mut Placer<'_>,
) -> Result<(u32, u64), KernelError> {
    let start = recognise::code_offset(header);
    let limit = placer.ram().low_end().0;
    let len = image.len().saturating_sub(start);
    if len == 0 {
        return Err(KernelError::Truncated("its protected-mode code"));
    }
    let at = u64::from(BZIMAGE_AT);
    let end = at.saturating_add(len);
    if end > limit {
        return Err(KernelError::TooBig { needed: end });
    }
    placer.claim(at, len, "kernel")?;
    let code = image.bytes_at(start, usize::try_from(len).unwrap_or(usize::MAX))?;
    placer.write(at, &code, "kernel")?;
    let entry = header.code32_start.get();
    if !(at..end).contains(&entry.into()) {
        return Err(KernelError::Malformed("its 32-bit entry point lies outside it"));
    }
    Ok((entry, end))
}

/// `boot_params` with what a guest of this platform is told, all else zero.
fn zero_page(mem: u32, initrd: u32) -> Vec<u8> {
    let mut page = vec![0; BOOT_PARAMS_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        for (slot, byte) in page.iter_mut().skip(at).zip(bytes) {
            *slot = *byte;
        }
    };
    put(offset::E820_ENTRIES, &[1]);
    // One stretch from 0: its address is zero already.
    put(offset::E820_MAP.saturating_add(8), &u64::from(mem).to_le_bytes());
    put(offset::E820_MAP.saturating_add(16), &E820_RAM.to_le_bytes());
    put(offset::VERSION, &boot::VERSION.to_le_bytes());
    put(offset::LOADFLAGS, &[KEEP_SEGMENTS]);
    put(offset::HARDWARE_SUBARCH, &SUBARCH_LGUEST.to_le_bytes());
    put(offset::CMD_LINE_PTR, &boot::COMMAND_LINE_AT.to_le_bytes());
    put(offset::KERNEL_ALIGNMENT, &KERNEL_ALIGNMENT.to_le_bytes());
    if initrd != 0 {
        put(offset::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
        put(offset::RAMDISK_IMAGE, &mem.saturating_sub(initrd).to_le_bytes());
        put(offset::RAMDISK_SIZE, &initrd.to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests;
