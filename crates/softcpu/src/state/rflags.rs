//! RFLAGS (SDM vol. 1, 3.4.3).

#![allow(missing_docs, reason = "the manual's own mnemonics")]

bitflags::bitflags! {
    /// The flags register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(transparent)]
    pub struct RFlags: u64 {
        const CF = 1 << 0;
        /// Always one.
        const FIXED = 1 << 1;
        const PF = 1 << 2;
        const AF = 1 << 4;
        const ZF = 1 << 6;
        const SF = 1 << 7;
        const TF = 1 << 8;
        const IF = 1 << 9;
        const DF = 1 << 10;
        const OF = 1 << 11;
        /// I/O privilege level, two bits.
        const IOPL = 3 << 12;
        const NT = 1 << 14;
        const RF = 1 << 16;
        const VM = 1 << 17;
        const AC = 1 << 18;
        const VIF = 1 << 19;
        const VIP = 1 << 20;
        const ID = 1 << 21;

        /// The flags that arithmetic computes.
        const STATUS = Self::CF.bits() | Self::PF.bits() | Self::AF.bits() | Self::ZF.bits()
            | Self::SF.bits() | Self::OF.bits();
    }
}

impl RFlags {
    /// The I/O privilege level, 0 to 3.
    #[inline]
    #[must_use]
    pub const fn iopl(self) -> u8 {
        ((self.bits() >> 12) & 3) as u8
    }

    /// `self` with the bits of `mask` taken from `image`; the reserved ones keep their
    /// fixed values, whatever the image says.
    #[inline]
    #[must_use]
    pub const fn with_image(self, image: u64, mask: Self) -> Self {
        let mask = mask.bits() & Self::all().bits();
        Self::from_bits_retain(self.bits() & !mask | image & mask | Self::FIXED.bits())
    }

    /// `self` with the status flags taken from `host`, a raw image of host flags.
    #[inline]
    #[must_use]
    pub const fn with_status(self, host: u64) -> Self {
        let status = Self::STATUS.bits();
        Self::from_bits_retain(self.bits() & !status | host & status)
    }
}
