//! Segment registers: selector and hidden part (SDM vol. 3, 3.4).

/// Segment register numbers, as encoded in instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the registers' own names")]
pub enum SegReg {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

impl SegReg {
    /// The segment register numbered `number`, if there is one.
    #[inline]
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Es,
            1 => Self::Cs,
            2 => Self::Ss,
            3 => Self::Ds,
            4 => Self::Fs,
            5 => Self::Gs,
            _ => return None,
        })
    }
}

bitflags::bitflags! {
    /// Access rights in the layout of a descriptor's bits 55..40 (type in 3..0, S, DPL,
    /// P, then limit bits that are unused here, AVL, L, D/B, G), and bit 16 of our own.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct Access: u32 {
        /// Data and code: has been loaded.
        const ACCESSED = 1 << 0;
        /// Data: may be written. Code: may be read.
        const WRITE_OR_READ = 1 << 1;
        /// Data: grows down. Code: conforming.
        const DOWN_OR_CONFORMING = 1 << 2;
        /// Code, not data.
        const CODE = 1 << 3;
        /// Code or data (S = 1), not a system segment.
        const CODE_OR_DATA = 1 << 4;
        /// Descriptor privilege level, two bits.
        const DPL = 3 << 5;
        /// Present.
        const PRESENT = 1 << 7;
        /// Available to software.
        const AVL = 1 << 12;
        /// 64-bit code.
        const LONG = 1 << 13;
        /// D/B: 32-bit.
        const BIG = 1 << 14;
        /// Limit in pages.
        const GRANULAR = 1 << 15;
        /// Not architectural: a null selector is loaded; any use outside 64-bit mode faults.
        const UNUSABLE = 1 << 16;
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Linear base.
    pub base: u64,
    /// Limit in bytes, granularity already applied: the last valid offset.
    pub limit: u32,
    /// Access rights.
    pub access: Access,
    /// The visible selector.
    pub selector: u16,
}

impl Segment {
    /// A data segment as real mode makes them: base selector times 16, 64 KiB.
    #[must_use]
    pub const fn real_mode(selector: u16) -> Self {
        Self {
            base: (selector as u64) << 4,
            limit: 0xffff,
            access: Access::from_bits_retain(0x93),
            selector,
        }
    }

    /// CS after reset: selector F000 but base FFFF0000.
    #[must_use]
    pub const fn code_at_reset() -> Self {
        Self {
            base: 0xffff_0000,
            limit: 0xffff,
            access: Access::from_bits_retain(0x9b),
            selector: 0xf000,
        }
    }

    /// LDTR after reset.
    #[must_use]
    pub const fn ldt_at_reset() -> Self {
        Self { base: 0, limit: 0xffff, access: Access::from_bits_retain(0x82), selector: 0 }
    }

    /// TR after reset: a busy 32-bit TSS at zero.
    #[must_use]
    pub const fn tss_at_reset() -> Self {
        Self { base: 0, limit: 0xffff, access: Access::from_bits_retain(0x8b), selector: 0 }
    }

    /// Base zero, no limit, writable data.
    #[must_use]
    pub const fn flat() -> Self {
        Self { base: 0, limit: u32::MAX, access: Access::from_bits_retain(0xc093), selector: 0 }
    }

    /// The hidden part a descriptor-table entry describes (system descriptors that are
    /// 16 bytes long in long mode put base bits 63..32 into their second half, which
    /// the caller adds).
    #[must_use]
    pub const fn from_descriptor(selector: u16, raw: u64) -> Self {
        let access = Access::from_bits_retain(((raw >> 40) & 0xf0ff) as u32);
        let limit = (raw & 0xffff | (raw >> 32) & 0xf_0000) as u32;
        let limit = if access.contains(Access::GRANULAR) { (limit << 12) | 0xfff } else { limit };
        let base = (raw >> 16) & 0xff_ffff | (raw >> 32) & 0xff00_0000;
        Self { base, limit, access, selector }
    }

    /// What a null selector loads.
    #[must_use]
    pub const fn null(selector: u16) -> Self {
        Self { base: 0, limit: 0, access: Access::UNUSABLE, selector }
    }

    /// A null stack segment at privilege level `cpl`, as 64-bit mode allows (and event
    /// delivery loads): its DPL still says what the CPL is.
    #[must_use]
    pub const fn null_stack(selector: u16, cpl: u8) -> Self {
        let access = Access::UNUSABLE.bits() | (cpl as u32 & 3) << 5;
        Self { base: 0, limit: 0, access: Access::from_bits_retain(access), selector }
    }

    /// A segment as virtual-8086 mode makes them: base selector times 16, 64 KiB, DPL 3.
    #[must_use]
    pub const fn virtual_8086(selector: u16) -> Self {
        Self {
            base: (selector as u64) << 4,
            limit: 0xffff,
            access: Access::from_bits_retain(0xf3),
            selector,
        }
    }

    /// Whether nothing can be accessed through it: a null selector is loaded.
    #[inline]
    #[must_use]
    pub const fn is_unusable(&self) -> bool {
        self.access.contains(Access::UNUSABLE)
    }

    /// Whether `size` bytes at `offset` lie within the limit, which for expand-down
    /// data segments is a floor and not a ceiling (SDM vol. 3, 5.3).
    #[must_use]
    pub const fn admits(&self, offset: u64, size: u64) -> bool {
        let last = offset.wrapping_add(size.wrapping_sub(1));
        let limit = self.limit as u64;
        if last < offset {
            return false;
        }
        let data = !self.access.contains(Access::CODE);
        if data && self.access.contains(Access::DOWN_OR_CONFORMING) {
            let top = if self.is_big() { u32::MAX as u64 } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        }
    }

    /// Descriptor privilege level.
    #[inline]
    #[must_use]
    pub const fn dpl(&self) -> u8 {
        ((self.access.bits() >> 5) & 3) as u8
    }

    /// Whether L is set (64-bit code).
    #[inline]
    #[must_use]
    pub const fn is_long(&self) -> bool {
        self.access.contains(Access::LONG)
    }

    /// Whether D/B is set (32-bit code or stack).
    #[inline]
    #[must_use]
    pub const fn is_big(&self) -> bool {
        self.access.contains(Access::BIG)
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DescriptorTable {
    /// Linear base.
    pub base: u64,
    /// The last valid offset.
    pub limit: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_unpack() {
        // Linux's __KERNEL_CS and __KERNEL_DS, and a byte-granular data segment.
        let cs = Segment::from_descriptor(0x10, 0x00af_9b00_0000_ffff);
        assert!(cs.is_long() && !cs.is_big() && cs.dpl() == 0 && cs.limit == u32::MAX);
        let ds = Segment::from_descriptor(0x18, 0x00cf_f300_0000_ffff);
        assert!(ds.is_big() && ds.dpl() == 3);
        let odd = Segment::from_descriptor(0x20, 0x1245_9234_5678_9abc);
        assert_eq!((odd.base, odd.limit), (0x1234_5678, 0x5_9abc));
    }
}
