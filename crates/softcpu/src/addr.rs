//! Addresses that cannot be confused with one another.
//!
//! A guest has two address spaces that the soft engine handles all day long:
//! *virtual* (what Intel calls linear: after segmentation, before paging) and
//! *physical* (after paging). Mixing them up is the classic hypervisor bug, so
//! they are types here and never bare `u64`s in a public interface.

use core::fmt;

/// log2 of the size of the smallest page.
pub const PAGE_SHIFT: u32 = 12;
/// Size of the smallest page, bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// The bits of an address that select a byte within its page.
pub const PAGE_OFFSET: u64 = PAGE_SIZE - 1;

/// How many bytes there are from `addr` to the end of its page: 1 to [`PAGE_SIZE`].
#[inline]
#[must_use]
pub const fn room_in_page(addr: u64) -> u64 {
    PAGE_SIZE.wrapping_sub(addr & PAGE_OFFSET)
}

/// A guest-physical address: what comes out of paging and goes to RAM or a device.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct GuestPhysAddr(pub u64);

/// A guest-virtual (linear) address: after segmentation, before paging.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct GuestVirtAddr(pub u64);

macro_rules! address {
    ($name:ident, $tag:literal) => {
        impl $name {
            /// The first byte of this address's 4 KiB page.
            #[inline]
            #[must_use]
            pub const fn page(self) -> Self {
                Self(self.0 & !PAGE_OFFSET)
            }

            /// The offset of this address in its 4 KiB page.
            #[inline]
            #[must_use]
            pub const fn offset(self) -> u64 {
                self.0 & PAGE_OFFSET
            }

            /// The number of the 4 KiB page this address lies in.
            #[inline]
            #[must_use]
            pub const fn frame(self) -> u64 {
                self.0 >> PAGE_SHIFT
            }

            /// The address `n` bytes on, wrapping as the CPU's adders do.
            #[inline]
            #[must_use]
            pub const fn wrapping_add(self, n: u64) -> Self {
                Self(self.0.wrapping_add(n))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, ":{:#x}"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address!(GuestPhysAddr, "gpa");
address!(GuestVirtAddr, "gva");

impl GuestVirtAddr {
    /// Whether the address is canonical for 4-level paging: bits 63..47 all alike
    /// (Intel SDM vol. 1, 3.3.7.1).
    #[inline]
    #[must_use]
    pub const fn is_canonical(self) -> bool {
        ((self.0 as i64) << 16 >> 16) as u64 == self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_is_the_sign_extension_of_bit_47() {
        for good in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            assert!(GuestVirtAddr(good).is_canonical(), "{good:#x}");
        }
        for bad in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63] {
            assert!(!GuestVirtAddr(bad).is_canonical(), "{bad:#x}");
        }
    }
}
