//! ELF vmlinux: a kernel as it comes out of the linker.
//!
//! Which way in? A vmlinux with a PVH note names a 32-bit entry point of a documented,
//! versioned protocol, made for exactly this: loaders that are no firmware. The plain
//! ELF entry point is only by convention `startup_64` (a 64-bit kernel other than Linux
//! may mean anything by it), so the note is preferred and the convention comes second.
//! It also works for 32-bit kernels, which have no other way in.
//!
//! Sources: xen/include/public/elfnote.h, arch-x86/hvm/start_info.h.

use super::elf::{Class, Executable};
use super::error::KernelError;
use super::image::Image;
use super::place::Placer;

const XEN_NOTE_OWNER: &[u8] = b"Xen\0";
/// The physical address of the 32-bit entry point.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// How a vmlinux wants to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// In 32-bit protected mode, by the PVH protocol.
    Pvh(u64),
    /// In 64-bit mode at `startup_64`.
    Linux64(u64),
}

/// Loads a vmlinux; returns its entry and where it ends in memory.
pub(super) fn load(image: &Image, placer: &mut Placer<'_>) -> Result<(Entry, u64), KernelError> {
    let mut kernel = Executable::read(image.section(0, image.len()))?;
    let note = kernel.note(image, XEN_NOTE_OWNER, XEN_ELFNOTE_PHYS32_ENTRY)?;
    if note.is_none() && kernel.class() == Class::Bits32 {
        return Err(KernelError::Bits32(" without PVH entry"));
    }
    kernel.load(placer)?;
    let entry = match note.as_deref() {
        Some(description) => {
            // Four bytes, or eight of which the upper four are zero.
            let low = description.first_chunk().map(|low| u32::from_le_bytes(*low));
            let entry = low.map(u64::from).filter(|entry| kernel.holds_code(*entry));
            Entry::Pvh(entry.ok_or(KernelError::Malformed("its PVH entry point lies outside it"))?)
        }
        None => Entry::Linux64(kernel.entry()?),
    };
    tracing::debug!(kernel = image.name(), ?entry, end = kernel.end(), "vmlinux loaded");
    Ok((entry, kernel.end()))
}
