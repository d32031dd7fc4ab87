//! Floating point: x87, SSE, and AVX with FMA where CPUID offers them.
//!
//! Results are compared bit for bit with values worked out by hand or with integer
//! arithmetic, not with what the same unit computes a second time.

use crate::{Outcome, ensure};
use std::arch::asm;
use std::hint::black_box;

/// The x87 unit: 64-bit mantissas, the register stack, transcendental instructions, the
/// rounding control and the exception flags.
pub fn x87() -> Outcome {
    // 1 + 2^-63 is exact in an 80-bit register and nowhere else: subtracting 1 again
    // gives 2^-63 only if the intermediate was kept in extended precision.
    let mut tiny = 0.0f64;
    let minus_63 = -63i32;
    // SAFETY: pushes and pops balance, so the x87 stack is as before; memory operands are
    // live locals.
    unsafe {
        asm!(
            "fild dword ptr [{exponent}]",
            "fld1",
            "fscale",       // st0 = 2^-63, st1 = -63
            "fstp st(1)",
            "fld1",
            "faddp",        // 1 + 2^-63
            "fld1",
            "fsubp",        // 2^-63 if nothing was rounded away
            "fstp qword ptr [{out}]",
            exponent = in(reg) &minus_63,
            out = in(reg) &mut tiny,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    ensure!(tiny == 2f64.powi(-63), "extended precision lost: {tiny:e}");

    // Adding sin^2 and cos^2 over many angles goes round the register stack thousands of times.
    let mut sum = 0.0f64;
    for step in 0..2000u32 {
        let angle = f64::from(step) / 100.0;
        let mut one = 0.0f64;
        // SAFETY: balanced pushes and pops; operands are live locals.
        unsafe {
            asm!(
                "fld qword ptr [{angle}]",
                "fsincos",
                "fmul st(0), st(0)",
                "fxch",
                "fmul st(0), st(0)",
                "faddp",
                "fstp qword ptr [{one}]",
                angle = in(reg) &angle,
                one = in(reg) &mut one,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        sum += one;
    }
    ensure!((sum - 2000.0).abs() < 1e-9, "sum of sin^2+cos^2 over 2000 angles is {sum}");

    // Rounding control: 2.5 rounds to 2 (nearest even), 3 (up), 2 (down), 2 (chop).
    let value = 2.5f64;
    for (control, want) in [(0x037fu16, 2i32), (0x0b7f, 3), (0x077f, 2), (0x0f7f, 2)] {
        let normal = 0x037fu16;
        let mut got = 0i32;
        // SAFETY: the control word is put back; pushes and pops balance.
        unsafe {
            asm!(
                "fldcw word ptr [{control}]",
                "fld qword ptr [{value}]",
                "fistp dword ptr [{got}]",
                "fldcw word ptr [{normal}]",
                control = in(reg) &control,
                value = in(reg) &value,
                got = in(reg) &mut got,
                normal = in(reg) &normal,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        ensure!(got == want, "2.5 with control word {control:#x} rounds to {got}, not {want}");
    }

    // Dividing by zero with the exception masked sets ZE (bit 2) in the status word.
    let status: u16;
    // SAFETY: balanced pushes and pops, the exception flags are cleared again.
    unsafe {
        asm!(
            "fnclex", "fld1", "fldz", "fdivp", "fstp st(0)", "fnstsw ax", "fnclex",
            out("ax") status,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    ensure!(status & 4 != 0, "1/0 left the status word at {status:#x}");
    Ok(())
}

/// SSE arithmetic on exact values, conversions, and the MXCSR flags.
pub fn sse() -> Outcome {
    let mut x = black_box(1.0f64);
    let mut harmonic = 0.0f64;
    while x <= 4096.0 {
        harmonic += 1.0 / x;
        x *= 2.0;
    }
    ensure!(harmonic == 2.0 - 2f64.powi(-12), "1 + 1/2 + ... + 1/4096 is {harmonic}");
    ensure!(black_box(2.0f64).sqrt().to_bits() == 0x3ff6_a09e_667f_3bcd, "sqrt(2) is off");
    ensure!(black_box(0.1f64) + black_box(0.2) != 0.3, "0.1 + 0.2 is 0.3: not IEEE 754");
    ensure!(black_box(-1.5e300f64) as i64 == i64::MIN, "saturating conversion is off");
    ensure!(black_box(f64::NAN).max(1.0) == 1.0, "max with a NaN is off");

    let mut mxcsr = 0u32;
    let quiet = 0x1f80u32;
    // SAFETY: MXCSR is set to its default, used, read; the default is what Rust expects.
    unsafe {
        asm!(
            "ldmxcsr dword ptr [{quiet}]",
            "xorps {zero}, {zero}",
            "divss {one}, {zero}",
            "stmxcsr dword ptr [{mxcsr}]",
            "ldmxcsr dword ptr [{quiet}]",
            quiet = in(reg) &quiet,
            mxcsr = in(reg) &mut mxcsr,
            zero = out(xmm_reg) _,
            one = inout(xmm_reg) 1.0f32 => _,
        );
    }
    ensure!(mxcsr & 4 != 0, "1/0 left MXCSR at {mxcsr:#x}");
    Ok(())
}

/// AVX (upper halves of the registers) and FMA (a single rounding), if CPUID says they are there.
pub fn avx_and_fma() -> Outcome {
    if std::is_x86_feature_detected!("avx") {
        let input: [f64; 4] = black_box([1.0, 2.0, 3.0, 4.0]);
        let mut output = [0.0f64; 4];
        // SAFETY: AVX was detected; both operands are 32 bytes of live locals.
        unsafe {
            asm!(
                "vmovupd ymm0, ymmword ptr [{input}]",
                "vmulpd ymm0, ymm0, ymm0",
                "vperm2f128 ymm0, ymm0, ymm0, 1",
                "vmovupd ymmword ptr [{output}], ymm0",
                "vzeroupper",
                out("xmm0") _,
                input = in(reg) &input,
                output = in(reg) &mut output,
            );
        }
        ensure!(output == [9.0, 16.0, 1.0, 4.0], "vmulpd + vperm2f128 gave {output:?}");
    }
    if std::is_x86_feature_detected!("fma") {
        // (1 + e)^2 - (1 + 2e) = e^2: lost if the product is rounded before the subtraction.
        let e = 2f64.powi(-40);
        let mut product = black_box(1.0 + e);
        let minus = black_box(-(1.0 + 2.0 * e));
        // SAFETY: FMA was detected; register operands only.
        unsafe {
            asm!(
                "vfmadd213sd {p}, {p}, {m}",
                p = inout(xmm_reg) product,
                m = in(xmm_reg) minus,
            );
        }
        ensure!(product == 2f64.powi(-80), "fused multiply-add rounded twice: {product:e}");
    }
    Ok(())
}
