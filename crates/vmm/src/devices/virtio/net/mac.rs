//! Ethernet addresses.

use std::fmt;
use std::io;
use std::str::FromStr;

/// An Ethernet address (IEEE 802-2014, 8.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

/// Bit of the first byte: for a group of stations.
const GROUP: u8 = 1;
/// Bit of the first byte: administered locally, by no manufacturer.
const LOCAL: u8 = 2;

/// Why a text is no address for a network card.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six bytes in hexadecimal.
    #[error("{0:?} is not a MAC address: give six bytes, like 52:54:00:12:34:56")]
    Malformed(String),
    /// A group's address, or nobody's.
    #[error(
        "{0} is not the address of one card: the first byte must be even, like 52:54:00:12:34:56"
    )]
    NotUnicast(MacAddress),
}

impl MacAddress {
    /// Every station.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// A random one, administered locally.
    ///
    /// # Errors
    /// The host has no randomness to give.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        let [first, rest @ ..] = bytes;
        let [b, c, d, e, f] = rest;
        Ok(Self([first & !GROUP | LOCAL, b, c, d, e, f]))
    }

    /// Whether it names one station: neither a group nor nobody.
    #[must_use]
    pub const fn is_unicast(self) -> bool {
        let [first, ..] = self.0;
        first & GROUP == 0 && u64::from_be_bytes(self.widened()) != 0
    }

    const fn widened(self) -> [u8; 8] {
        let [a, b, c, d, e, f] = self.0;
        [0, 0, a, b, c, d, e, f]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let malformed = || MacError::Malformed(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(malformed)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(malformed());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
        }
        if parts.next().is_some() {
            return Err(malformed());
        }
        let address = Self(bytes);
        if address.is_unicast() { Ok(address) } else { Err(MacError::NotUnicast(address)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_again() {
        for _ in 0..100 {
            let address = MacAddress::random().unwrap();
            assert!(address.is_unicast());
            assert_eq!(address.0[0] & LOCAL, LOCAL);
            assert_eq!(address.to_string().parse(), Ok(address));
        }
    }

    #[test]
    fn what_is_no_cards_address_is_refused() {
        for text in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5", "+2:54:00:12:34:56"]
        {
            assert_eq!(text.parse::<MacAddress>(), Err(MacError::Malformed(text.to_owned())));
        }
        for text in ["00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"] {
            assert!(matches!(text.parse::<MacAddress>(), Err(MacError::NotUnicast(_))), "{text}");
        }
    }
}
