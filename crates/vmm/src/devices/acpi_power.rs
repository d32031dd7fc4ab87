//! ACPI's fixed hardware of a hardware-reduced platform: sleep control and status
//! registers and the reset register (ACPI 6.5, 4.8.3.6 and 4.8.3.7).
//!
//! The FADT points at them; `poweroff` and `reboot` in the guest end here.

use super::Request;
use crate::layout::{
    ACPI_RESET, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL, ACPI_SLEEP_STATUS, ACPI_SLP_EN,
    ACPI_SLP_TYP_S5, ACPI_SLP_TYP_SHIFT,
};

/// WAK_STS in the sleep status register; we never sleep and wake, so it is never set.
const WAKE_STATUS: u8 = 0;
const SLP_TYP_MASK: u8 = 7;

/// The three registers. None of them keeps anything.
#[derive(Clone, Copy, Debug, Default)]
pub struct AcpiPower;

impl AcpiPower {
    /// Whether `port` is one of its registers.
    #[must_use]
    pub const fn owns(port: u16) -> bool {
        matches!(port, ACPI_SLEEP_CONTROL | ACPI_SLEEP_STATUS | ACPI_RESET)
    }

    /// A byte read from `port`.
    #[must_use]
    pub const fn read(self, port: u16) -> u8 {
        if port == ACPI_SLEEP_STATUS { WAKE_STATUS } else { 0 }
    }

    /// A byte written to `port`. Sleep states other than S5 are not offered by the
    /// DSDT, and asking for them does nothing.
    #[must_use]
    pub const fn write(self, port: u16, value: u8) -> Option<Request> {
        let state = (value >> ACPI_SLP_TYP_SHIFT) & SLP_TYP_MASK;
        match port {
            ACPI_SLEEP_CONTROL if value & ACPI_SLP_EN != 0 && state == ACPI_SLP_TYP_S5 => {
                Some(Request::PowerOff)
            }
            ACPI_RESET if value == ACPI_RESET_VALUE => Some(Request::Reset),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_enabled_s5_powers_off() {
        let s5 = ACPI_SLP_TYP_S5 << ACPI_SLP_TYP_SHIFT;
        assert_eq!(AcpiPower.write(ACPI_SLEEP_CONTROL, s5), None);
        assert_eq!(AcpiPower.write(ACPI_SLEEP_CONTROL, s5 | ACPI_SLP_EN), Some(Request::PowerOff));
        assert_eq!(AcpiPower.write(ACPI_SLEEP_CONTROL, ACPI_SLP_EN), None);
        assert_eq!(AcpiPower.write(ACPI_RESET, ACPI_RESET_VALUE), Some(Request::Reset));
        assert_eq!(AcpiPower.write(ACPI_RESET, 0), None);
        assert_eq!(AcpiPower.read(ACPI_SLEEP_STATUS), 0);
    }
}
