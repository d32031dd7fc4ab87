//! `IA32_APIC_BASE`: where the local APIC is and which interface it has
//! (SDM vol. 3, 11.4.3, 11.4.4 and 11.12.5).

use crate::layout::LOCAL_APIC;

/// This is the processor that starts first.
const BSP: u64 = 1 << 8;
/// The x2APIC interface.
const EXTD: u64 = 1 << 10;
/// The APIC exists at all.
const ENABLE: u64 = 1 << 11;

/// The interface a local APIC has at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// Globally disabled.
    Disabled,
    /// Registers in memory.
    Xapic,
    /// Registers as MSRs.
    X2apic,
}

/// A valid value of the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicBase(u64);

impl ApicBase {
    /// The value after reset.
    #[must_use]
    pub const fn at_reset(bsp: bool) -> Self {
        Self(LOCAL_APIC.0 | ENABLE | if bsp { BSP } else { 0 })
    }

    /// What the register held, as kept in an atomic.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The register.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The mode it selects.
    #[must_use]
    pub const fn mode(self) -> ApicMode {
        match (self.0 & ENABLE != 0, self.0 & EXTD != 0) {
            (true, false) => ApicMode::Xapic,
            (true, true) => ApicMode::X2apic,
            (false, _) => ApicMode::Disabled,
        }
    }

    /// The guest-physical address of the register page.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0 & !0xfff
    }

    /// The register after a write of `value`, or `None` where the CPU raises `#GP`:
    /// reserved bits, and the mode changes that the manual's figure 11-27 does not have.
    /// `phys_bits` is the width of a physical address.
    #[must_use]
    pub const fn write(self, value: u64, phys_bits: u8) -> Option<Self> {
        let beyond = if phys_bits >= 64 { 0 } else { u64::MAX << phys_bits };
        let reserved = beyond | (0xfff & !(BSP | EXTD | ENABLE));
        if value & reserved != 0 {
            return None;
        }
        let new = Self(value);
        let allowed = match (self.mode(), new.mode()) {
            (_, ApicMode::Disabled) => value & EXTD == 0,
            (ApicMode::Disabled, ApicMode::X2apic) | (ApicMode::X2apic, ApicMode::Xapic) => false,
            _ => true,
        };
        if allowed { Some(new) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_change_only_along_the_manuals_arrows() {
        let disabled = ApicBase(0xfee0_0000);
        let xapic = ApicBase(0xfee0_0000 | ENABLE);
        let x2apic = ApicBase(0xfee0_0000 | ENABLE | EXTD);
        let states = [disabled, xapic, x2apic];
        let allowed = states.map(|from| states.map(|to| from.write(to.0, 40).is_some()));
        assert_eq!(allowed, [[true, true, false], [true, true, true], [true, false, true]]);
        assert_eq!(xapic.write(0xfee0_0000 | EXTD, 40), None, "EXTD without EN");
        assert_eq!(xapic.write(xapic.0 | 1, 40), None);
        assert_eq!(xapic.write(xapic.0 | 1 << 40, 40), None);
        assert!(xapic.write(xapic.0 | 1 << 39, 40).is_some());
    }
}
