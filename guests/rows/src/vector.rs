//! Rows of vector code: in registers only, with a good deal of memory, and memory alone.
//!
//! Plain Rust that the compiler makes vectors of, once for AVX2 with FMA and once for what
//! every x86-64 has.

use std::hint::black_box;

use crate::stopwatch::{chose, fastest, say};

/// Whether the wide way is open, which is also said.
fn wide(name: &str) -> bool {
    let wide = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    chose(name, if wide { "AVX2+FMA" } else { "SSE2" });
    wide
}

/// `a * b + c`, in one step where that is an instruction.
#[inline(always)]
fn fused<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Points a side, and how long each is followed.
const SIDE: usize = 512;
const STEPS: u32 = 200;
/// Points at a time.
const LANES: usize = 16;

/// How many steps all points of the set's surroundings stay near: no memory to speak of.
pub(crate) fn mandelbrot(name: &str) {
    #[target_feature(enable = "avx2,fma")]
    fn with_avx2() -> u64 {
        steps::<true>()
    }
    let count: fn() -> u64 = match wide(name) {
        // SAFETY: the CPU has both, says `wide`.
        true => || unsafe { with_avx2() },
        false => steps::<false>,
    };
    // Rounding differs, which decides a few points at the border.
    let plain = steps::<false>();
    assert!(count().abs_diff(plain) < plain / 1000, "{} steps, not {plain}", count());
    say(name, fastest(|| _ = black_box(count())), 1, "ms");
}

#[inline(always)]
fn steps<const FMA: bool>() -> u64 {
    let mut all = 0_u64;
    for row in 0..SIDE {
        for first in (0..SIDE).step_by(LANES) {
            let scale = 2.5 / SIDE as f32;
            let im = row as f32 * scale - 1.25;
            let re: [f32; LANES] = std::array::from_fn(|i| (first + i) as f32 * scale - 2.0);
            let (mut x, mut y) = ([0_f32; LANES], [0_f32; LANES]);
            let mut inside = [0_u32; LANES];
            for _ in 0..black_box(STEPS) {
                for i in 0..LANES {
                    let re = fused::<FMA>(x[i], x[i], fused::<FMA>(-y[i], y[i], re[i]));
                    let im = fused::<FMA>(x[i] + x[i], y[i], im);
                    let near = fused::<FMA>(re, re, im * im) < 4.0;
                    inside[i] += u32::from(near);
                    // Points that left stay out, and finite.
                    x[i] = if near { re } else { 2.0 };
                    y[i] = if near { im } else { 2.0 };
                }
            }
            all += inside.iter().map(|steps| u64::from(*steps)).sum::<u64>();
        }
    }
    all
}

/// Rows and columns of the matrices, and products a turn.
const N: usize = 256;
const PRODUCTS: usize = 10;
/// What is summed up in registers at a time.
const HIGH: usize = 4;
const BROAD: usize = 16;

/// Products of two 256 by 256 matrices of 32-bit floats, 256 KiB each.
pub(crate) fn matrix_product(name: &str) {
    #[target_feature(enable = "avx2,fma")]
    fn with_avx2(a: &[f32], b: &[f32], c: &mut [f32]) {
        product::<true>(a, b, c);
    }
    let multiply: fn(&[f32], &[f32], &mut [f32]) = match wide(name) {
        // SAFETY: the CPU has both, says `wide`.
        true => |a, b, c| unsafe { with_avx2(a, b, c) },
        false => product::<false>,
    };
    let a: Vec<f32> = (0..N * N).map(|i| (i % 7) as f32).collect();
    let b: Vec<f32> = (0..N * N).map(|i| (i % 5) as f32).collect();
    let mut c = vec![0.0; N * N];
    multiply(&a, &b, &mut c);
    // Small whole numbers: every order of summing gives the same.
    for at in [0, N + 1, N * N / 2 + 3, N * N - 1] {
        let cell = (0..N).map(|k| a[at / N * N + k] * b[k * N + at % N]).sum::<f32>();
        assert_eq!(c[at], cell);
    }
    let products = || {
        for _ in 0..PRODUCTS {
            multiply(black_box(&a), &b, &mut c);
        }
    };
    say(name, fastest(products), PRODUCTS, "us");
}

#[inline(always)]
fn product<const FMA: bool>(a: &[f32], b: &[f32], c: &mut [f32]) {
    for row in (0..N).step_by(HIGH) {
        for column in (0..N).step_by(BROAD) {
            let mut sums = [[0_f32; BROAD]; HIGH];
            let rows: [&[f32]; HIGH] = std::array::from_fn(|i| &a[(row + i) * N..][..N]);
            for (k, b) in b.chunks_exact(N).enumerate() {
                let Some(b) = b[column..].first_chunk::<BROAD>() else { continue };
                for (a, sums) in rows.iter().zip(&mut sums) {
                    for (b, sum) in b.iter().zip(sums) {
                        *sum = fused::<FMA>(a[k], *b, *sum);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                c[(row + i) * N + column..][..BROAD].copy_from_slice(sums);
            }
        }
    }
}

/// 256 MiB copied, 4 MiB at a time: by what the C library thinks best on this CPU.
pub(crate) fn copies(name: &str) {
    let from = vec![1_u8; 4 << 20];
    let mut to = vec![0; from.len()];
    let copy = || {
        for _ in 0..64 {
            to.copy_from_slice(black_box(&from));
            black_box(&mut to);
        }
    };
    say(name, fastest(copy), 1, "ms");
}
