//! The few instructions at the reset vector, where a PC has its firmware.
//!
//! Linux on a hardware-reduced ACPI machine does not reboot by ACPI's reset register: it
//! takes such a machine for one with EFI, and as there is no EFI, goes back to real mode
//! and jumps to the BIOS (arch/x86/kernel/reboot.c, `BOOT_EFI` and `BOOT_BIOS`). Nothing
//! being there, it would run through zeroes for ever. So there is this much firmware: it
//! writes the reset register.

use super::error::PlaceError;
use super::place::Placer;
use crate::layout::{ACPI_RESET, ACPI_RESET_VALUE, RESET_VECTOR};

/// Puts the code there.
pub(super) fn place(placer: &mut Placer<'_>) -> Result<(), PlaceError> {
    placer.put(RESET_VECTOR, &code(), "reset vector")
}

/// 16-bit code that resets the machine, or halts if it cannot.
fn code() -> [u8; 10] {
    let [port_low, port_high] = ACPI_RESET.to_le_bytes();
    [
        0xba,
        port_low,
        port_high, // mov dx, ACPI_RESET
        0xb0,
        ACPI_RESET_VALUE, // mov al, ACPI_RESET_VALUE
        0xee,             // out dx, al
        0xfa,             // cli
        0xf4,             // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIN_RAM};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn the_reset_vector_writes_the_reset_register() {
        let ram = GuestRam::new(MIN_RAM).unwrap();
        place(&mut Placer::new(&ram)).unwrap();
        let mut bytes = [0; 10];
        ram.mmap().read_slice(&mut bytes, GuestAddress(0xf_fff0)).unwrap();
        assert_eq!(bytes, *b"\xba\x04\x06\xb0\x01\xee\xfa\xf4\xeb\xfd");
    }
}
