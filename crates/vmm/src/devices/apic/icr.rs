//! The interrupt command register: how a CPU sends to others (SDM vol. 3, 11.6.1, 11.12.9).

use super::message::{Address, DeliveryMode, Destination};

/// Bits of the low half that are not reserved, and delivery status, which reads zero.
pub const ICR_LOW_VALID: u32 = 0x000c_cfff;
const LOGICAL: u32 = 1 << 11;
const LEVEL_ASSERT: u32 = 1 << 14;
const TRIGGER_LEVEL: u32 = 1 << 15;

/// One command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Icr {
    low: u32,
    address: Address,
}

impl Icr {
    /// The xAPIC's pair of 32-bit registers; the destination is in bits 31..24 of `high`.
    #[must_use]
    pub const fn xapic(low: u32, high: u32) -> Self {
        Self { low, address: Address::Narrow((high >> 24) as u8) }
    }

    /// The x2APIC's 64-bit register.
    #[must_use]
    pub const fn x2apic(value: u64) -> Self {
        Self { low: value as u32, address: Address::Wide((value >> 32) as u32) }
    }

    /// The vector.
    #[must_use]
    pub const fn vector(self) -> u8 {
        self.low as u8
    }

    /// The delivery mode.
    #[must_use]
    pub const fn mode(self) -> DeliveryMode {
        DeliveryMode::from_bits(self.low >> 8)
    }

    /// Who it is for.
    #[must_use]
    pub const fn destination(self) -> Destination {
        match (self.low >> 18) & 3 {
            1 => Destination::Oneself,
            2 => Destination::All,
            3 => Destination::Others,
            _ if self.low & LOGICAL != 0 => Destination::Logical(self.address),
            _ => Destination::Physical(self.address),
        }
    }

    /// The "INIT level de-assert" of old systems, which modern CPUs do not act on.
    #[must_use]
    pub const fn is_init_deassert(self) -> bool {
        matches!(self.mode(), DeliveryMode::Init)
            && self.low & LEVEL_ASSERT == 0
            && self.low & TRIGGER_LEVEL != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_as_linux_sends_them_decode() {
        // INIT, assert, level; then its de-assert; then a startup IPI.
        let init = Icr::xapic(0xc500, 1 << 24);
        assert_eq!((init.mode(), init.is_init_deassert()), (DeliveryMode::Init, false));
        assert!(Icr::xapic(0x8500, 1 << 24).is_init_deassert());
        let sipi = Icr::xapic(0x0699, 1 << 24);
        assert_eq!((sipi.mode(), sipi.vector()), (DeliveryMode::Startup, 0x99));
        assert_eq!(sipi.destination(), Destination::Physical(Address::Narrow(1)));
        let wide = Icr::x2apic(0x0001_0002_0000_08fd);
        assert_eq!(wide.destination(), Destination::Logical(Address::Wide(0x1_0002)));
        assert_eq!(Icr::xapic(0x4_00fb, 0).destination(), Destination::Oneself);
        assert_eq!(Icr::xapic(0x8_00fb, 0).destination(), Destination::All);
        assert_eq!(Icr::xapic(0xc_0400, 0).destination(), Destination::Others);
    }
}
