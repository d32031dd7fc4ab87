//! bzImage: finds the compressed vmlinux behind the setup code and loads it where it is
//! linked, so that neither setup code nor decompressor runs and the kernel is not moved.
//!
//! Source: Documentation/arch/x86/boot.rst, "The real-mode kernel header".

use std::io::{BufReader, Read};
use std::time::Instant;

use zerocopy::{FromZeros, IntoBytes};

use super::boot_params::{BOOT_FLAG, HDRS, SETUP_HEADER, SetupHeader, XLF_KERNEL_64};
use super::elf::{Class, Executable, Machine};
use super::error::KernelError;
use super::image::Image;
use super::payload::Format;
use super::place::Placer;

/// The first protocol version whose header says where the payload is.
const PAYLOAD_VERSION: u16 = 0x0208;
/// The first protocol version with `xloadflags`.
const XLOADFLAGS_VERSION: u16 = 0x020c;
/// What `setup_sects` means when it is zero.
const DEFAULT_SETUP_SECTS: u8 = 4;
/// The unit of `setup_sects`.
const SECTOR: u64 = 512;
/// Where the header's end is given, relative to [`HEADER_END_BASE`]: the operand of the
/// short jump over it.
const JUMP_OPERAND: usize = 0x201;
const HEADER_END_BASE: usize = 0x202;

/// A loaded kernel.
#[derive(Debug)]
pub(super) struct Loaded {
    /// `startup_64`.
    pub(super) entry: u64,
    /// Where the kernel ends in memory, bss included.
    pub(super) end: u64,
    /// The setup header the zero page begins with.
    pub(super) header: SetupHeader,
}

/// Whether a file with this head is a bzImage (or its older brother zImage).
pub(super) fn has_header(head: &[u8]) -> bool {
    let boot_flag = BOOT_FLAG.to_le_bytes();
    head.get(0x1fe..0x200) == Some(&boot_flag)
        && head.get(0x202..0x206) == Some(&HDRS.to_le_bytes())
}

/// Reads the setup header; what the kernel's version of it does not have is zero.
pub(super) fn setup_header(head: &[u8]) -> Result<SetupHeader, KernelError> {
    const TRUNCATED: KernelError = KernelError::Truncated("its setup header");
    let jump = usize::from(*head.get(JUMP_OPERAND).ok_or(TRUNCATED)?);
    let mut header = SetupHeader::new_zeroed();
    let end = HEADER_END_BASE.saturating_add(jump);
    let end = end.min(SETUP_HEADER.saturating_add(size_of::<SetupHeader>()));
    let bytes = head.get(SETUP_HEADER..end).ok_or(TRUNCATED)?;
    header.as_mut_bytes().get_mut(..bytes.len()).unwrap_or_default().copy_from_slice(bytes);
    Ok(header)
}

/// Decompresses the kernel to where it is linked.
pub(super) fn load(
    image: &Image,
    head: &[u8],
    placer: &mut Placer<'_>,
) -> Result<Loaded, KernelError> {
    let header = setup_header(head)?;
    let version = header.version.get();
    if version < PAYLOAD_VERSION {
        return Err(KernelError::OldProtocol(version));
    }
    if version >= XLOADFLAGS_VERSION && header.xloadflags.get() & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Bits32(""));
    }
    let (offset, len) = payload_range(&header, image.len())?;
    let magic = image.bytes_at(offset, 16)?;
    let format = Format::detect(&magic).ok_or(KernelError::Compression("an unknown format"))?;

    let started = Instant::now();
    let payload = BufReader::with_capacity(0x1_0000, image.section(offset, len));
    // Errors while reading are the decompressor's from here on.
    let broken = |error| match error {
        KernelError::Read(reason) => KernelError::Decompress { format: format.name(), reason },
        other => other,
    };
    let mut kernel = Executable::read(format.decompress(payload)?).map_err(broken)?;
    if kernel.class() != Class::Bits64 || kernel.machine() != Machine::X86_64 {
        return Err(KernelError::Bits32(""));
    }
    kernel.load(placer).map_err(broken)?;
    let (entry, end) = (kernel.entry()?, kernel.end());
    drain(kernel.into_rest(), end).map_err(broken)?;
    tracing::debug!(
        kernel = image.name(), %format, payload = len, entry = format_args!("{entry:#x}"),
        end = format_args!("{end:#x}"), elapsed = ?started.elapsed(), "kernel decompressed"
    );
    Ok(Loaded { entry, end, header })
}

/// Where the payload is in a file of this length: offset and length.
fn payload_range(header: &SetupHeader, file_len: u64) -> Result<(u64, u64), KernelError> {
    let setup_sects = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTS,
        n => n,
    };
    let code = u64::from(setup_sects).saturating_add(1).saturating_mul(SECTOR);
    let offset = code.saturating_add(header.payload_offset.get().into());
    let len = u64::from(header.payload_length.get());
    if len == 0 {
        return Err(KernelError::Malformed("its setup header names no payload"));
    }
    if offset.saturating_add(len) > file_len {
        return Err(KernelError::Truncated("the end of its compressed payload"));
    }
    Ok((offset, len))
}

/// Reads what is behind the segments (relocations, which a kernel that is not moved does
/// not need), because the decompressor compares checksums only at the end: a damaged
/// kernel had better be an error here than a crash in the guest. Gives up quietly after
/// as much again as the kernel itself is long.
fn drain(rest: impl Read, limit: u64) -> Result<(), KernelError> {
    std::io::copy(&mut rest.take(limit), &mut std::io::sink())?;
    Ok(())
}
