//! Which instruction-set extensions a guest is offered.
//!
//! A [`FeatureSet`] is what CPUID advertises (the `cpuid` module turns it into bits)
//! and what the decoder accepts: both must read the same set, or guests would find
//! instructions that are not announced, or announced ones that fault. It is counted
//! in iced-x86's `CpuidFeature`, because that is what a decoded instruction names.

use iced_x86::CpuidFeature as F;
use std::arch::is_x86_feature_detected;

const WORDS: usize = 4;

/// A set of instruction-set extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FeatureSet {
    bits: [u64; WORDS],
}

/// What every x86-64 CPU has, and what this engine executes whatever the host has.
const BASE: &[F] = &[
    F::INTEL8086,
    F::INTEL186,
    F::INTEL286,
    F::INTEL386,
    F::INTEL486,
    F::X64,
    F::CPUID,
    F::CX8,
    F::CMOV,
    F::FPU,
    F::FPU287,
    F::FPU387,
    F::FXSR,
    F::MMX,
    F::MSR,
    F::MULTIBYTENOP,
    F::PAUSE,
    F::SEP,
    F::SYSCALL,
    F::SSE,
    F::SSE2,
    F::TSC,
    F::CLFSH,
    F::RDPMC,
    F::PREFETCHW,
    F::RDTSCP,
    F::FSGSBASE,
    F::INVPCID,
    F::SMAP,
];

/// What x86-64-v2 adds (System V ABI, x86-64 supplement, 3.1.1).
const V2: &[F] = &[F::CMPXCHG16B, F::POPCNT, F::SSE3, F::SSE4_1, F::SSE4_2, F::SSSE3];

/// What x86-64-v3 adds, with the XSAVE variants this engine has.
const V3: &[F] = &[
    F::AVX,
    F::AVX2,
    F::BMI1,
    F::BMI2,
    F::F16C,
    F::FMA,
    F::LZCNT,
    F::MOVBE,
    F::XSAVE,
    F::XSAVEOPT,
    F::XSAVEC,
];

/// In no level, but offered with each where the host has them.
const EXTRAS: &[F] =
    &[F::AES, F::PCLMULQDQ, F::SHA, F::RDRAND, F::RDSEED, F::ADX, F::CLFLUSHOPT, F::CLWB, F::GFNI];

/// The same, for models with AVX.
const AVX_EXTRAS: &[F] = &[F::VAES, F::VPCLMULQDQ];

impl FeatureSet {
    /// Nothing at all.
    #[must_use]
    pub const fn empty() -> Self {
        Self { bits: [0; WORDS] }
    }

    /// Exactly `features`.
    #[must_use]
    pub fn of(features: &[F]) -> Self {
        features.iter().fold(Self::empty(), |set, feature| set.with(*feature))
    }

    /// Model `v2`: x86-64-v2 and the extras the host has.
    #[must_use]
    pub fn v2() -> Self {
        let host = Self::host();
        Self::of(BASE).union(Self::of(V2)).union(Self::of(EXTRAS)).intersection(host)
    }

    /// Model `v3`: x86-64-v3 and the extras the host has.
    #[must_use]
    pub fn v3() -> Self {
        let extras = Self::of(V3).union(Self::of(AVX_EXTRAS)).intersection(Self::host());
        Self::v2().union(extras)
    }

    /// Whether this host can execute all that x86-64-v2 promises.
    #[must_use]
    pub fn host_has_v2() -> bool {
        Self::host().contains_all(&Self::of(V2))
    }

    /// Whether this host can execute all that x86-64-v3 promises.
    #[must_use]
    pub fn host_has_v3() -> bool {
        Self::host_has_v2() && Self::host().contains_all(&Self::of(V3))
    }

    /// What can be executed on this host: its own extensions as far as this engine
    /// knows them, and those that are done in software.
    #[must_use]
    pub fn host() -> Self {
        let mut set = Self::of(BASE);
        macro_rules! detect {
            ($($name:tt => $feature:ident),* $(,)?) => {
                $(if is_x86_feature_detected!($name) { set = set.with(F::$feature); })*
            };
        }
        detect! {
            "cmpxchg16b" => CMPXCHG16B, "popcnt" => POPCNT, "sse3" => SSE3, "ssse3" => SSSE3,
            "sse4.1" => SSE4_1, "sse4.2" => SSE4_2, "avx" => AVX, "avx2" => AVX2, "bmi1" => BMI1,
            "bmi2" => BMI2, "f16c" => F16C, "fma" => FMA, "lzcnt" => LZCNT, "movbe" => MOVBE,
            "aes" => AES, "pclmulqdq" => PCLMULQDQ, "sha" => SHA, "rdrand" => RDRAND,
            "rdseed" => RDSEED, "adx" => ADX, "gfni" => GFNI, "vaes" => VAES, "vpclmulqdq" => VPCLMULQDQ,
        }
        // Cache-line flushes only check their operand here, so any host will do; XSAVE
        // is software, but pointless without vector state to save.
        set = set.with(F::CLFLUSHOPT).with(F::CLWB);
        if set.contains(F::AVX) {
            set = set.with(F::XSAVE).with(F::XSAVEOPT).with(F::XSAVEC);
        }
        set
    }

    /// Whether `feature` is in the set.
    #[inline]
    #[must_use]
    pub fn contains(&self, feature: F) -> bool {
        let (word, bit) = Self::position(feature);
        self.bits.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// Whether all of `other` is in the set.
    #[must_use]
    pub fn contains_all(&self, other: &Self) -> bool {
        self.intersection(*other) == *other
    }

    /// The set and `feature`.
    #[must_use]
    pub fn with(mut self, feature: F) -> Self {
        let (word, bit) = Self::position(feature);
        if let Some(bits) = self.bits.get_mut(word) {
            *bits |= bit;
        }
        self
    }

    /// The set without `feature`.
    #[must_use]
    pub fn without(mut self, feature: F) -> Self {
        let (word, bit) = Self::position(feature);
        if let Some(bits) = self.bits.get_mut(word) {
            *bits &= !bit;
        }
        self
    }

    /// What is in either.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self { bits: std::array::from_fn(|i| self.word(i) | other.word(i)) }
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self { bits: std::array::from_fn(|i| self.word(i) & other.word(i)) }
    }

    fn word(&self, i: usize) -> u64 {
        self.bits.get(i).copied().unwrap_or(0)
    }

    const fn position(feature: F) -> (usize, u64) {
        let number = feature as usize;
        (number >> 6, 1 << (number & 63))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_nest_and_never_exceed_the_host() {
        let (v2, v3, host) = (FeatureSet::v2(), FeatureSet::v3(), FeatureSet::host());
        assert!(v3.contains_all(&v2) && host.contains_all(&v3));
        assert!(v2.contains(F::SSE2) && !v2.contains(F::AVX) && !v3.contains(F::AVX512F));
        assert_eq!(FeatureSet::host_has_v3(), v3.contains_all(&FeatureSet::of(V3)));
        assert!(!v2.without(F::SSE2).contains(F::SSE2));
    }
}
