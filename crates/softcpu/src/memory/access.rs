//! Loads and stores on memory that the guest's other vCPUs change under our feet.
//!
//! Guest RAM is shared without locks between vCPU threads and devices, by design:
//! the guest is the one who synchronises. Rust references and plain dereferences
//! would be data races there, so every access is one `mov` in inline assembly,
//! which the compiler treats as opaque: it neither splits, fuses, repeats nor
//! invents accesses, and x86 makes naturally aligned ones atomic.

use core::arch::asm;

mod sealed {
    pub trait Sealed {}
    impl Sealed for u8 {}
    impl Sealed for u16 {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

/// An integer that one `mov` moves.
pub trait Scalar:
    sealed::Sealed + Copy + Default + Eq + core::fmt::Debug + core::fmt::LowerHex + 'static
{
    /// Its size in bytes.
    const SIZE: u32;
    /// Its size in bits.
    const BITS: u32;
    /// All of its bits.
    const MASK: u64;

    /// The low bits of `value`.
    fn truncate(value: u64) -> Self;

    /// Zero-extension.
    fn zero_extend(self) -> u64;

    /// Sign-extension.
    fn sign_extend(self) -> u64;

    /// Loads from guest memory; no alignment needed.
    ///
    /// # Safety
    /// `SIZE` bytes at `ptr` are mapped readable.
    unsafe fn load(ptr: *const u8) -> Self;

    /// Stores to guest memory; no alignment needed.
    ///
    /// # Safety
    /// `SIZE` bytes at `ptr` are mapped writable and no Rust reference covers them.
    unsafe fn store(ptr: *mut u8, value: Self);
}

macro_rules! scalar {
    ($t:ty, $signed:ty, $class:ident, $load:literal, $store:literal) => {
        impl Scalar for $t {
            const SIZE: u32 = (<$t>::BITS / 8);
            const BITS: u32 = <$t>::BITS;
            const MASK: u64 = <$t>::MAX as u64;

            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $t
            }

            #[inline(always)]
            fn zero_extend(self) -> u64 {
                self as u64
            }

            #[inline(always)]
            fn sign_extend(self) -> u64 {
                self as $signed as i64 as u64
            }

            #[inline(always)]
            unsafe fn load(ptr: *const u8) -> Self {
                let value: $t;
                // SAFETY: the caller vouches for the address; the asm reads SIZE bytes
                // there and nothing else, and keeps flags and stack.
                unsafe {
                    asm!($load, value = out($class) value, ptr = in(reg) ptr,
                         options(nostack, preserves_flags, readonly));
                }
                value
            }

            #[inline(always)]
            unsafe fn store(ptr: *mut u8, value: Self) {
                // SAFETY: the caller vouches for the address; the asm writes SIZE bytes
                // there and nothing else, and keeps flags and stack.
                unsafe {
                    asm!($store, value = in($class) value, ptr = in(reg) ptr,
                         options(nostack, preserves_flags));
                }
            }
        }
    };
}

scalar!(u8, i8, reg_byte, "mov {value}, byte ptr [{ptr}]", "mov byte ptr [{ptr}], {value}");
scalar!(u16, i16, reg, "mov {value:x}, word ptr [{ptr}]", "mov word ptr [{ptr}], {value:x}");
scalar!(u32, i32, reg, "mov {value:e}, dword ptr [{ptr}]", "mov dword ptr [{ptr}], {value:e}");
scalar!(u64, i64, reg, "mov {value}, qword ptr [{ptr}]", "mov qword ptr [{ptr}], {value}");

/// Copies `len` bytes within host memory that the guest shares, as `memmove` does.
///
/// # Safety
/// `len` bytes at `src` are mapped readable and at `dst` writable; no Rust reference
/// covers either.
#[inline]
pub unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both ranges. `ptr::copy` on raw pointers makes
    // no reference; a concurrent guest write can only give us mixed bytes, as on hardware.
    unsafe { core::ptr::copy(src, dst, len) }
}

/// Stores `count` copies of `value` one after the other, as `rep stos` does.
///
/// # Safety
/// `count * SIZE` bytes at `dst` are mapped writable and no Rust reference covers them.
pub unsafe fn fill<T: Scalar>(dst: *mut u8, value: T, count: usize) {
    macro_rules! stos {
        ($instruction:literal) => {
            // SAFETY: the caller vouches for the range; the direction flag is clear in Rust code.
            unsafe {
                asm!($instruction, inout("rcx") count => _, inout("rdi") dst => _,
                     in("rax") value.zero_extend(), options(nostack, preserves_flags));
            }
        };
    }
    match T::SIZE {
        1 => stos!("rep stosb"),
        2 => stos!("rep stosw"),
        4 => stos!("rep stosd"),
        _ => stos!("rep stosq"),
    }
}
