//! Integer arithmetic as the host CPU does it, flags and all.
//!
//! Each function is the instruction itself in inline assembly, followed by `lahf` and
//! `seto`, which together copy all six status flags. Undefined flags are thereby
//! whatever the host leaves in them, as on the host itself.

use core::arch::asm;

use crate::memory::access::Scalar;

/// A status-flag image in RFLAGS's layout, from AH and AL after `lahf; seto al`.
#[inline(always)]
fn status(ax: u16) -> u64 {
    u64::from(ax >> 8 & 0xd5) | u64::from(ax & 1) << 11
}

/// The other way round.
fn image(flags: u64) -> u16 {
    (flags as u16 & 0xd5) << 8 | (flags >> 11) as u16 & 1
}

/// The two-operand operations with the classic encodings.
pub(crate) trait Alu: Scalar {
    fn add(a: Self, b: Self) -> (Self, u64);
    fn sub(a: Self, b: Self) -> (Self, u64);
    fn and(a: Self, b: Self) -> (Self, u64);
    fn or(a: Self, b: Self) -> (Self, u64);
    fn xor(a: Self, b: Self) -> (Self, u64);
    /// With the carry of `flags` coming in.
    fn adc(a: Self, b: Self, flags: u64) -> (Self, u64);
    /// With the borrow of `flags` coming in.
    fn sbb(a: Self, b: Self, flags: u64) -> (Self, u64);
    fn inc(a: Self) -> (Self, u64);
    fn dec(a: Self) -> (Self, u64);
    fn neg(a: Self) -> (Self, u64);
    /// Shifts and rotates are given RFLAGS as they find them.
    fn shl(a: Self, count: u8, flags: u64) -> (Self, u64);
    fn shr(a: Self, count: u8, flags: u64) -> (Self, u64);
    fn sar(a: Self, count: u8, flags: u64) -> (Self, u64);
    fn rol(a: Self, count: u8, flags: u64) -> (Self, u64);
    fn ror(a: Self, count: u8, flags: u64) -> (Self, u64);
    fn rcl(a: Self, count: u8, flags: u64) -> (Self, u64);
    fn rcr(a: Self, count: u8, flags: u64) -> (Self, u64);
    /// Unsigned product: low half, high half.
    fn mul(a: Self, b: Self) -> (Self, Self, u64);
    /// Signed product: low half, high half.
    fn imul(a: Self, b: Self) -> (Self, Self, u64);
    /// Unsigned quotient and remainder of `high:low`; `None` where the CPU raises `#DE`.
    /// Flags are undefined after a division, which is to say that ours leaves them alone.
    fn div(low: Self, high: Self, by: Self) -> Option<(Self, Self)>;
    /// Signed quotient and remainder, likewise.
    fn idiv(low: Self, high: Self, by: Self) -> Option<(Self, Self)>;
}

macro_rules! two {
    ($name:ident, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, b: Self) -> (Self, u64) {
            let ax: u16;
            // SAFETY: arithmetic on two registers; the asm names every register it changes.
            unsafe {
                asm!(concat!(stringify!($name), " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                     a = inout($class) a, b = in($class) b, out("ax") ax, options(pure, nomem, nostack));
            }
            (a, status(ax))
        }
    };
}

macro_rules! two_carry {
    ($name:ident, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, b: Self, flags: u64) -> (Self, u64) {
            let ax: u16;
            // SAFETY: as `two!`; `bt` puts bit 0 of `flags` into the carry.
            unsafe {
                asm!("bt {f:e}, 0", concat!(stringify!($name), " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                     a = inout($class) a, b = in($class) b, f = in(reg) flags, out("ax") ax,
                     options(pure, nomem, nostack));
            }
            (a, status(ax))
        }
    };
}

macro_rules! one {
    ($name:ident, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self) -> (Self, u64) {
            let ax: u16;
            // SAFETY: arithmetic on one register; the asm names every register it changes.
            unsafe {
                asm!(concat!(stringify!($name), " {a", $m, "}"), "lahf", "seto al",
                     a = inout($class) a, out("ax") ax, options(pure, nomem, nostack));
            }
            (a, status(ax))
        }
    };
}

/// Shifts and rotates: by more than one place they leave OF undefined, and CPUs leave it alone or
/// not. So they find the guest's flags.
macro_rules! shift {
    ($name:ident, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut a: Self, count: u8, flags: u64) -> (Self, u64) {
            let mut ax = image(flags);
            // SAFETY: as `one!`, with the count in CL and the flags from AX.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!(stringify!($name), " {a", $m, "}, cl"),
                     "lahf", "seto al", a = inout($class) a, in("cl") count, inout("ax") ax,
                     options(pure, nomem, nostack));
            }
            (a, status(ax))
        }
    };
}

/// Multiplication and division for 16 bits and more, which use (R|E)AX and (R|E)DX.
macro_rules! wide {
    ($t:ty, $signed:ty, $wide:ty, $wide_signed:ty, $m:literal) => {
        #[inline(always)]
        fn mul(a: Self, b: Self) -> (Self, Self, u64) {
            let (low, high, ax) = wide!(@run "mul", $m, a, 0_u8, b);
            (low as $t, high as $t, status(ax as u16))
        }

        #[inline(always)]
        fn imul(a: Self, b: Self) -> (Self, Self, u64) {
            let (low, high, ax) = wide!(@run "imul", $m, a, 0_u8, b);
            (low as $t, high as $t, status(ax as u16))
        }

        fn div(low: Self, high: Self, by: Self) -> Option<(Self, Self)> {
            if high >= by {
                return None;
            }
            // The divisor is not zero and the quotient fits, because high < by: no #DE.
            let (quotient, remainder, _) = wide!(@run "div", $m, low, high, by);
            Some((quotient as $t, remainder as $t))
        }

        fn idiv(low: Self, high: Self, by: Self) -> Option<(Self, Self)> {
            let dividend = (<$wide>::from(high) << <$t>::BITS | <$wide>::from(low)) as $wide_signed;
            let fits = dividend.checked_div(<$wide_signed>::from(by as $signed))?;
            <$signed>::try_from(fits).ok()?;
            // The divisor is not zero and the quotient fits, as just computed: no #DE.
            let (quotient, remainder, _) = wide!(@run "idiv", $m, low, high, by);
            Some((quotient as $t, remainder as $t))
        }
    };
    (@run $name:literal, $m:literal, $low:expr, $high:expr, $by:expr) => {{
        let (low, high, ax): (u64, u64, u64);
        // SAFETY: arithmetic on named registers; the caller has ruled out #DE.
        unsafe {
            asm!(concat!($name, " {b", $m, "}"), "mov {low}, rax", "lahf", "seto al",
                 b = in(reg) $by.zero_extend(), low = lateout(reg) low,
                 inout("rax") $low.zero_extend() => ax, inout("rdx") u64::from($high) => high,
                 options(pure, nomem, nostack));
        }
        (low, high, ax)
    }};
}

macro_rules! common {
    ($class:ident, $m:literal) => {
        two!(add, $class, $m);
        two!(sub, $class, $m);
        two!(and, $class, $m);
        two!(or, $class, $m);
        two!(xor, $class, $m);
        two_carry!(adc, $class, $m);
        two_carry!(sbb, $class, $m);
        one!(inc, $class, $m);
        one!(dec, $class, $m);
        one!(neg, $class, $m);
        shift!(shl, $class, $m);
        shift!(shr, $class, $m);
        shift!(sar, $class, $m);
        shift!(rol, $class, $m);
        shift!(ror, $class, $m);
        shift!(rcl, $class, $m);
        shift!(rcr, $class, $m);
    };
}

impl Alu for u8 {
    common!(reg_byte, "");

    #[inline(always)]
    fn mul(a: Self, b: Self) -> (Self, Self, u64) {
        let (product, flags): (u16, u16);
        // SAFETY: arithmetic on named registers.
        unsafe {
            asm!("mul {b}", "mov {p:x}, ax", "lahf", "seto al", b = in(reg_byte) b, p = lateout(reg) product,
                 inout("ax") u16::from(a) => flags, options(pure, nomem, nostack));
        }
        (product as u8, (product >> 8) as u8, status(flags))
    }

    #[inline(always)]
    fn imul(a: Self, b: Self) -> (Self, Self, u64) {
        let (product, flags): (u16, u16);
        // SAFETY: arithmetic on named registers.
        unsafe {
            asm!("imul {b}", "mov {p:x}, ax", "lahf", "seto al", b = in(reg_byte) b, p = lateout(reg) product,
                 inout("ax") u16::from(a) => flags, options(pure, nomem, nostack));
        }
        (product as u8, (product >> 8) as u8, status(flags))
    }

    fn div(low: Self, high: Self, by: Self) -> Option<(Self, Self)> {
        if high >= by {
            return None;
        }
        let result: u16;
        // SAFETY: the divisor is not zero and the quotient fits, because high < by.
        unsafe {
            asm!("div {b}", b = in(reg_byte) by, inout("ax") u16::from_le_bytes([low, high]) => result,
                 options(pure, nomem, nostack));
        }
        Some((result as u8, (result >> 8) as u8))
    }

    fn idiv(low: Self, high: Self, by: Self) -> Option<(Self, Self)> {
        let dividend = i16::from_le_bytes([low, high]);
        i8::try_from(dividend.checked_div(i16::from(by as i8))?).ok()?;
        let result: u16;
        // SAFETY: the divisor is not zero and the quotient fits, as just computed.
        unsafe {
            asm!("idiv {b}", b = in(reg_byte) by, inout("ax") u16::from_le_bytes([low, high]) => result,
                 options(pure, nomem, nostack));
        }
        Some((result as u8, (result >> 8) as u8))
    }
}

impl Alu for u16 {
    common!(reg, ":x");
    wide!(u16, i16, u32, i32, ":x");
}

impl Alu for u32 {
    common!(reg, ":e");
    wide!(u32, i32, u64, i64, ":e");
}

impl Alu for u64 {
    common!(reg, ":r");
    wide!(u64, i64, u128, i128, ":r");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_come_from_the_host() {
        assert_eq!(u8::add(0xff, 1), (0, 0x55)); // CF PF AF ZF
        assert_eq!(u32::sub(0, 1).0, u32::MAX);
        assert_eq!(u64::adc(u64::MAX, 0, 1), (0, 0x55));
        assert_eq!(i8::MIN as u8, u8::neg(0x80).0);
        assert_ne!(u8::neg(0x80).1 & 1 << 11, 0);
    }

    #[test]
    fn division_refuses_what_the_cpu_would_fault_on() {
        assert_eq!(u8::div(7, 0, 0), None);
        assert_eq!(u8::div(0, 2, 2), None);
        assert!(matches!(u16::div(7, 0, 2), Some((3, 1))));
        assert_eq!(u32::idiv(0x8000_0000, u32::MAX, u32::MAX), None);
        assert_eq!(u64::idiv(1 << 63, u64::MAX, u64::MAX), None);
        assert_eq!(u64::idiv(0, 1 << 63, u64::MAX), None);
        assert!(
            matches!(u64::idiv((-7_i64) as u64, u64::MAX, 2), Some((q, r)) if q as i64 == -3 && r as i64 == -1)
        );
    }

    #[test]
    fn products_have_two_halves() {
        assert_eq!(u8::mul(0xff, 0xff).0, 1);
        assert_eq!(u8::mul(0xff, 0xff).1, 0xfe);
        assert_eq!(u64::mul(u64::MAX, 2).1, 1);
        assert_eq!(u32::imul(u32::MAX, 2).1, u32::MAX);
    }
}
