//! Interrupt messages: what travels between IO-APIC, MSIs and local APICs.

use super::icr::Icr;

/// How the target takes the message (SDM vol. 3, 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, to every CPU addressed.
    Fixed,
    /// The vector, to the one with the lowest priority.
    LowestPriority,
    /// System management interrupt; there is no system management mode here.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT: reset of the CPU, which then waits for a startup message.
    Init,
    /// Startup: real mode at the page the vector names.
    Startup,
    /// The vector comes from an 8259A, of which none is wired.
    External,
    /// A reserved encoding.
    Reserved,
}

impl DeliveryMode {
    /// From its three-bit encoding.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::External,
            _ => Self::Reserved,
        }
    }

    /// Whether the message brings a vector to be queued.
    #[must_use]
    pub const fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// Edge or level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Once per message.
    Edge,
    /// The IO-APIC waits for the end of interrupt.
    Level,
}

impl Trigger {
    /// Level if `level`.
    #[must_use]
    pub const fn from_bit(level: bool) -> Self {
        if level { Self::Level } else { Self::Edge }
    }
}

/// Who a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// By APIC identifier.
    Physical(Address),
    /// By logical identifier.
    Logical(Address),
    /// The sender.
    Oneself,
    /// Everybody.
    All,
    /// Everybody but the sender.
    Others,
}

/// The destination field, whose width says what "everybody" looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// 8 bits: xAPIC, IO-APIC, MSI.
    Narrow(u8),
    /// 32 bits: x2APIC.
    Wide(u32),
}

impl Address {
    /// The number itself.
    #[must_use]
    pub const fn id(self) -> u32 {
        match self {
            Self::Narrow(id) => id as u32,
            Self::Wide(id) => id,
        }
    }

    /// Whether it addresses everybody.
    #[must_use]
    pub const fn is_broadcast(self) -> bool {
        matches!(self, Self::Narrow(0xff) | Self::Wide(0xffff_ffff))
    }
}

/// One interrupt on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// For whom.
    pub destination: Destination,
    /// How it is taken.
    pub mode: DeliveryMode,
    /// Its vector.
    pub vector: u8,
    /// Edge or level.
    pub trigger: Trigger,
}

/// A message-signalled interrupt as a device writes it (SDM vol. 3, 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where it is written: 0xFEE in bits 31..20.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

impl MsiMessage {
    /// Decodes the message; `None` if the address is not an interrupt's.
    #[must_use]
    pub const fn decode(self) -> Option<InterruptMessage> {
        if self.address >> 20 != 0xfee {
            return None;
        }
        let id = Address::Narrow((self.address >> 12) as u8);
        let redirection_hint = self.address & (1 << 3) != 0;
        let logical = self.address & (1 << 2) != 0;
        let mode = DeliveryMode::from_bits(self.data >> 8);
        // Without the redirection hint the destination mode is ignored: physical.
        let destination = if redirection_hint && logical {
            Destination::Logical(id)
        } else {
            Destination::Physical(id)
        };
        Some(InterruptMessage {
            destination,
            mode,
            vector: self.data as u8,
            trigger: Trigger::from_bit(self.data & (1 << 15) != 0),
        })
    }
}

impl From<Icr> for InterruptMessage {
    fn from(icr: Icr) -> Self {
        Self {
            destination: icr.destination(),
            mode: icr.mode(),
            vector: icr.vector(),
            // Interrupts between processors are edges (SDM vol. 3, 11.6.1).
            trigger: Trigger::Edge,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msis_decode() {
        let plain = MsiMessage { address: 0xfee0_3000, data: 0x31 }.decode().unwrap();
        assert_eq!(plain.destination, Destination::Physical(Address::Narrow(3)));
        assert_eq!(
            (plain.mode, plain.vector, plain.trigger),
            (DeliveryMode::Fixed, 0x31, Trigger::Edge)
        );
        let logical = MsiMessage { address: 0xfee0_100c, data: 0x8141 }.decode().unwrap();
        assert_eq!(logical.destination, Destination::Logical(Address::Narrow(1)));
        assert_eq!((logical.mode, logical.trigger), (DeliveryMode::LowestPriority, Trigger::Level));
        assert_eq!(MsiMessage { address: 0xfed0_0000, data: 0 }.decode(), None);
        assert_eq!(MsiMessage { address: 0x1_fee0_0000, data: 0 }.decode(), None);
    }
}
