//! Memory type registers: MTRRs and PAT.
//!
//! Guest RAM is cached by the host whatever the guest says, so these only have to hold
//! what was written and refuse what hardware refuses. Source: SDM vol. 3, 11.11, 11.12.

use crate::mmu::PHYS_BITS;
use crate::vcpu::Vcpu;

/// IA32_MTRR_PHYSBASE0; bases and masks alternate from here.
pub(crate) const VARIABLE_FIRST: u32 = 0x200;
/// The last of the variable ranges' registers.
pub(crate) const VARIABLE_LAST: u32 = VARIABLE_FIRST + 2 * VARIABLE_COUNT as u32 - 1;
/// How many variable ranges IA32_MTRRCAP reports.
pub(crate) const VARIABLE_COUNT: u64 = 8;
/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write-combining.
pub(crate) const CAPABILITIES: u64 = VARIABLE_COUNT | 1 << 8 | 1 << 10;

/// The fixed-range registers, in address order.
const FIXED: [u32; 11] =
    [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// Physical address bits of a base or mask register.
const ADDRESS: u64 = ((1 << PHYS_BITS) - 1) & !0xfff;
/// Valid bit of a mask register.
const VALID: u64 = 1 << 11;
/// IA32_MTRR_DEF_TYPE: type, fixed-range enable, enable.
const DEF_TYPE_BITS: u64 = 0xcff;

/// Memory types an MTRR takes: UC, WC, WT, WP, WB.
const fn is_mtrr_type(kind: u64) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

/// PAT takes UC- (7) as well.
const fn is_pat_type(kind: u64) -> bool {
    is_mtrr_type(kind) || kind == 7
}

fn all_bytes(value: u64, valid: fn(u64) -> bool) -> bool {
    value.to_le_bytes().iter().all(|byte| valid(u64::from(*byte)))
}

/// Whether `value` is a PAT the CPU takes.
pub(crate) fn is_valid_pat(value: u64) -> bool {
    all_bytes(value, is_pat_type)
}

/// Whether `value` is an IA32_MTRR_DEF_TYPE the CPU takes.
pub(crate) const fn is_valid_default(value: u64) -> bool {
    value & !DEF_TYPE_BITS == 0 && is_mtrr_type(value & 0xff)
}

impl Vcpu {
    fn range_register(&mut self, index: u32) -> Option<&mut u64> {
        if let Some(place) = FIXED.iter().position(|fixed| *fixed == index) {
            return self.state.msr.mtrr_fixed.get_mut(place);
        }
        let place = index.checked_sub(VARIABLE_FIRST)?;
        self.state.msr.mtrr_variable.get_mut(place as usize)
    }

    /// Reads a fixed or variable range register, if `index` is one.
    pub(crate) fn read_range_register(&mut self, index: u32) -> Option<u64> {
        self.range_register(index).map(|register| *register)
    }

    /// Writes one: `None` if `index` is none, `Some(false)` if it refuses the value.
    pub(crate) fn write_range_register(&mut self, index: u32, value: u64) -> Option<bool> {
        let valid = if index > VARIABLE_LAST {
            all_bytes(value, is_mtrr_type)
        } else if index & 1 == 0 {
            value & !(ADDRESS | 0xff) == 0 && is_mtrr_type(value & 0xff)
        } else {
            value & !(ADDRESS | VALID) == 0
        };
        let register = self.range_register(index)?;
        if valid {
            *register = value;
        }
        Some(valid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_memory_types_are_refused() {
        assert!(is_valid_pat(0x0007_0406_0007_0406));
        assert!(!is_valid_pat(0x0007_0406_0007_0402));
        assert!(is_valid_default(0xc06) && !is_valid_default(0xc07) && !is_valid_default(0x1c06));
    }
}
