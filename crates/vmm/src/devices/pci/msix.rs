//! MSI-X: a table of messages in device memory, one per vector
//! (PCI Local Bus Specification 3.0, 6.8.2).
//!
//! The owner keeps the table behind a lock, hands it the guest's accesses, and sends the
//! messages it gives back.

use crate::devices::apic::controller::InterruptController;
use crate::devices::apic::message::MsiMessage;

/// The capability's identifier.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of one entry in the table.
pub const ENTRY_SIZE: u64 = 16;
/// Message control: the whole function is masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Vector control: the vector is masked.
const MASKED: u32 = 1;
/// The most vectors a table has.
pub const MAX_VECTORS: u16 = 2048;

/// Who takes devices' messages: the interrupt controllers, or a recorder in tests.
pub trait MsiSink: std::fmt::Debug + Send + Sync {
    /// A device writes this message.
    fn send(&self, message: MsiMessage);
}

impl MsiSink for InterruptController {
    fn send(&self, message: MsiMessage) {
        if !self.deliver_msi(message) {
            tracing::debug!(?message, "nobody takes a device's interrupt");
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Address (low, high), data, vector control.
    words: [u32; 4],
    pending: bool,
}

impl Entry {
    const fn message(&self) -> MsiMessage {
        let [low, high, data, _] = self.words;
        MsiMessage { address: (high as u64) << 32 | low as u64, data }
    }

    const fn masked(&self) -> bool {
        self.words[3] & MASKED != 0
    }
}

/// The table and the pending bits.
#[derive(Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
}

impl Msix {
    /// With so many vectors, all masked.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        let entry = Entry { words: [0, 0, 0, MASKED], pending: false };
        Self { entries: vec![entry; vectors.clamp(1, MAX_VECTORS).into()], control: 0 }
    }

    /// The capability's body, for table and pending bits in base address register 0 at
    /// these offsets, and the mask of what the guest may change in it.
    #[must_use]
    pub fn capability(&self, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let control = (self.entries.len() as u16).wrapping_sub(1);
        let mut body = [0; 10];
        for (to, from) in body.iter_mut().zip(
            control
                .to_le_bytes()
                .into_iter()
                .chain(table.to_le_bytes())
                .chain(pending.to_le_bytes()),
        ) {
            *to = from;
        }
        (body, (ENABLE | FUNCTION_MASK).to_le_bytes())
    }

    /// Whether messages are used instead of INTx.
    #[must_use]
    pub const fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Whether there is such a vector.
    #[must_use]
    pub fn has(&self, vector: u16) -> bool {
        usize::from(vector) < self.entries.len()
    }

    /// The guest wrote message control. Gives the messages that were waiting for it.
    pub fn set_control(&mut self, control: u16) -> Vec<MsiMessage> {
        self.control = control & (ENABLE | FUNCTION_MASK);
        self.take_ready()
    }

    const fn open(&self) -> bool {
        self.control & (ENABLE | FUNCTION_MASK) == ENABLE
    }

    fn take_ready(&mut self) -> Vec<MsiMessage> {
        if !self.open() {
            return Vec::new();
        }
        let ready = self.entries.iter_mut().filter(|entry| entry.pending && !entry.masked());
        ready
            .map(|entry| {
                entry.pending = false;
                entry.message()
            })
            .collect()
    }

    /// The device has a reason: the message to send, unless it has to wait.
    pub fn raise(&mut self, vector: u16) -> Option<MsiMessage> {
        let open = self.open();
        let entry = self.entries.get_mut(usize::from(vector))?;
        if open && !entry.masked() {
            return Some(entry.message());
        }
        entry.pending = true;
        None
    }

    /// The guest reads the table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (byte, at) in data.iter_mut().zip(offset..=u64::MAX) {
            let word = self
                .entries
                .get((at / ENTRY_SIZE) as usize)
                .and_then(|entry| entry.words.get((at % ENTRY_SIZE / 4) as usize));
            if let Some(byte_of) =
                word.and_then(|word| word.to_le_bytes().get((at % 4) as usize).copied())
            {
                *byte = byte_of;
            }
        }
    }

    /// The guest writes to the table, in aligned words of 4 or 8 bytes; what else it
    /// does has no meaning. Gives the messages that were waiting for it.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) -> Vec<MsiMessage> {
        if !offset.is_multiple_of(4) {
            return Vec::new();
        }
        let (words, _) = data.as_chunks::<4>();
        for (word, at) in words.iter().zip((offset..=u64::MAX).step_by(4)) {
            let place = self
                .entries
                .get_mut((at / ENTRY_SIZE) as usize)
                .and_then(|entry| entry.words.get_mut((at % ENTRY_SIZE / 4) as usize));
            if let Some(place) = place {
                *place = u32::from_le_bytes(*word);
            }
        }
        self.take_ready()
    }

    /// The guest reads the pending bits.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..=u64::MAX) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let bits = self.entries.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (n, entry)| byte | (u8::from(entry.pending) << n));
        }
    }

    /// Back to how it was at first: all masked, nothing pending.
    pub fn reset(&mut self) {
        *self = Self::new(self.entries.len() as u16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Msix {
        let mut msix = Msix::new(10);
        for vector in 0..10_u32 {
            let entry = [0xfee0_0000, 0, 0x40 + vector, 0].map(u32::to_le_bytes).concat();
            assert!(msix.table_write(u64::from(vector) * 16, &entry[..8]).is_empty());
            assert!(msix.table_write(u64::from(vector) * 16 + 8, &entry[8..]).is_empty());
        }
        msix
    }

    #[test]
    fn messages_go_out_when_nothing_masks_them() {
        let mut msix = table();
        assert_eq!(msix.raise(9), None);
        let mut pending = [0; 2];
        msix.pending_read(0, &mut pending);
        assert_eq!(pending, [0, 2]);
        assert!(msix.set_control(ENABLE | FUNCTION_MASK).is_empty());
        assert_eq!(msix.set_control(ENABLE), [MsiMessage { address: 0xfee0_0000, data: 0x49 }]);
        assert_eq!(msix.raise(1).unwrap().data, 0x41);
        assert!(msix.table_write(16 + 12, &[1, 0, 0, 0]).is_empty());
        assert_eq!(msix.raise(1), None);
        assert_eq!(msix.table_write(16 + 12, &[0; 4]).len(), 1);
        msix.pending_read(0, &mut pending);
        assert_eq!(pending, [0, 0]);
        assert_eq!(msix.raise(10), None);
    }

    #[test]
    fn any_access_is_answered() {
        let mut msix = table();
        let mut data = [0xff; 8];
        msix.table_read(16 + 8, &mut data);
        assert_eq!(data, [0x41, 0, 0, 0, 0, 0, 0, 0]);
        msix.table_read(u64::MAX - 2, &mut data);
        assert!(msix.table_write(u64::MAX - 3, &[0; 8]).is_empty());
        assert!(msix.table_write(2, &[0xff; 4]).is_empty());
        msix.pending_read(u64::MAX - 2, &mut data);
        assert_eq!(msix.capability(0x4000, 0x5000).0, [9, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
    }
}
