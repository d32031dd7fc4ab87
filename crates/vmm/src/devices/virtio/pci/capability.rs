//! The capabilities by which a driver finds the parts of a function
//! (virtio 1.2, 4.1.4), and the one through which it may reach them without memory
//! accesses at all.

use std::ops::Range;

use super::{BAR, COMMON, DEVICE, ISR, MEMORY_SIZE, MSIX_PENDING, MSIX_TABLE, NOTIFY, NOTIFY_STEP};
use crate::devices::pci::config::ConfigSpace;
use crate::devices::pci::msix::{self, Msix};

/// Vendor-specific: what virtio's capabilities are.
const VENDOR_SPECIFIC: u8 = 0x09;
/// Bytes of a virtio capability, its identifier and link included.
const LEN: u8 = 16;

/// What a capability leads to (virtio 1.2, 4.1.4).
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI_ACCESS: u8 = 5;

/// Where in the capability of type 5 the driver says what it wants, and gets it.
const ACCESS_BAR: u16 = 4;
const ACCESS_OFFSET: u16 = 8;
const ACCESS_LEN: u16 = 12;
const ACCESS_DATA: u16 = 16;
/// Message control follows MSI-X's identifier and link.
const MSIX_CONTROL: u16 = 2;

/// Where those capabilities are that do something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    msix: Option<u16>,
    access: u16,
}

/// An access to the function's memory, asked for in configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Where.
    pub(super) offset: u64,
    /// 1, 2 or 4 bytes.
    pub(super) len: usize,
}

impl Capabilities {
    /// Adds them all; MSI-X's only where there is somebody for messages.
    pub(super) fn add(config: &mut ConfigSpace, msix: &Msix, messages: bool) -> Self {
        for (kind, part) in [(TYPE_COMMON, COMMON), (TYPE_ISR, ISR), (TYPE_DEVICE, DEVICE)] {
            config.add_capability(VENDOR_SPECIFIC, &body(LEN, kind, &part), &[]);
        }
        let mut notify = body(LEN.saturating_add(4), TYPE_NOTIFY, &NOTIFY).to_vec();
        notify.extend_from_slice(&(NOTIFY_STEP as u32).to_le_bytes());
        config.add_capability(VENDOR_SPECIFIC, &notify, &[]);

        let mut access = body(LEN.saturating_add(4), TYPE_PCI_ACCESS, &(0..0)).to_vec();
        access.extend_from_slice(&[0; 4]);
        // The bar, the offset, the length and the data may be written; bytes are counted
        // from behind the capability's link.
        let mut writable = [0_u8; 18];
        for (at, mask) in writable.iter_mut().enumerate() {
            *mask = if at == 2 || at >= 6 { 0xff } else { 0 };
        }
        let access = config.add_capability(VENDOR_SPECIFIC, &access, &writable);

        let msix = messages.then(|| {
            let (table, pending) = (MSIX_TABLE.start as u32, MSIX_PENDING.start as u32);
            let (body, writable) = msix.capability(table, pending);
            config.add_capability(msix::CAPABILITY, &body, &writable)
        });
        Self { msix, access }
    }

    /// MSI-X's message control; without MSI-X it is off.
    pub(super) fn msix_control(&self, config: &ConfigSpace) -> u16 {
        let Some(msix) = self.msix else { return 0 };
        let mut control = [0; 2];
        config.read(msix.saturating_add(MSIX_CONTROL), &mut control);
        u16::from_le_bytes(control)
    }

    /// What an access to configuration space at `offset` means, if it is to the data of
    /// the capability of type 5 (virtio 1.2, 4.1.4.9).
    pub(super) fn window(&self, offset: u16, config: &ConfigSpace) -> Option<Window> {
        if offset != self.access.saturating_add(ACCESS_DATA) {
            return None;
        }
        let word = |at: u16| {
            let mut bytes = [0; 4];
            config.read(self.access.saturating_add(at), &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let (bar, at, len) = (word(ACCESS_BAR) as u8, word(ACCESS_OFFSET), word(ACCESS_LEN));
        let aligned = matches!(len, 1 | 2 | 4) && at.is_multiple_of(len);
        let inside = bar == BAR.0 && u64::from(at) < MEMORY_SIZE;
        (aligned && inside).then_some(Window { offset: at.into(), len: len as usize })
    }
}

/// What follows a capability's link: length, type, base address register, where there.
fn body(len: u8, kind: u8, part: &Range<u64>) -> [u8; 14] {
    let mut body = [0; 14];
    let size = part.end.saturating_sub(part.start) as u32;
    let words = [len, kind, BAR.0, 0, 0, 0]
        .into_iter()
        .chain((part.start as u32).to_le_bytes())
        .chain(size.to_le_bytes());
    for (to, from) in body.iter_mut().zip(words) {
        *to = from;
    }
    body
}
