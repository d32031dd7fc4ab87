//! The state of the CPU at a 32-bit guest's first instruction, V1 to V6.
//!
//! The kernel runs in ring 1 with IOPL 0 and the CPU's own interrupt flag set, for all its
//! life: whatever touches the flag either traps or does nothing. Segments are flat and
//! loaded; their descriptors are the only two in the GDT. The IDT is empty. Paging is on
//! already, though a guest of V5 and V6 cannot tell.

use crate::segments::Descriptor;

/// CS: entry 12, ring 1.
pub const CS: u16 = 0x61;
/// DS, ES and SS: entry 13, ring 1. FS and GS are 0.
pub const DS: u16 = 0x69;
/// Interrupts on, and the bit that always is.
pub const EFLAGS: u32 = 0x202;
/// ESI: where `boot_params` is. All other general registers are 0.
pub const ESI: u32 = crate::boot::BOOT_PARAMS_AT;
/// The descriptor behind [`CS`]: 4 GiB of code, privilege 1.
pub const CODE: Descriptor = Descriptor::from_words(0x0000_ffff, 0x00cf_bb00);
/// The descriptor behind [`DS`]: 4 GiB of data, privilege 1.
pub const DATA: Descriptor = Descriptor::from_words(0x0000_ffff, 0x00cf_b300);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segments::{KERNEL_CS, KERNEL_DS, Stored};

    #[test]
    fn selectors_and_descriptors_agree() {
        for (selector, index, descriptor) in [(CS, KERNEL_CS, CODE), (DS, KERNEL_DS, DATA)] {
            assert_eq!(usize::from(selector >> 3), index);
            assert_eq!(selector & 7, 1);
            assert_eq!(descriptor.dpl(), 1);
            // They are as the guest's own would be after the fix-up.
            assert_eq!(
                Descriptor::accept(index as u32, descriptor),
                Some(Stored::Used(descriptor))
            );
        }
    }
}
