//! Named CPU models and a vCPU's place among its siblings.

use std::fmt;
use std::str::FromStr;

use crate::native::features::FeatureSet;

/// A CPU model: one of the levels of the x86-64 psABI, plus those extras (AES, SHA, RDRAND
/// and so on) that the host can execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuModel {
    /// x86-64-v2: up to SSE4.2, POPCNT and CMPXCHG16B.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA, F16C, MOVBE and XSAVE too.
    V3,
}

/// The host cannot execute what a model promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this host cannot run CPU model {model}: it lacks {missing}; {remedy}")]
pub struct CpuidError {
    /// The model asked for.
    pub model: CpuModel,
    /// What of it the host does not have.
    pub missing: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

/// The text names no model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such CPU model; there are v2 and v3")]
pub struct ParseModelError;

impl CpuModel {
    /// The best model this host can run.
    #[must_use]
    pub fn best_for_host() -> Self {
        if FeatureSet::host_has_v3() { Self::V3 } else { Self::V2 }
    }

    /// What it offers on this host.
    ///
    /// # Errors
    /// [`CpuidError`] when the host lacks part of what the model promises.
    pub fn features(self) -> Result<FeatureSet, CpuidError> {
        match self {
            Self::V2 if FeatureSet::host_has_v2() => Ok(FeatureSet::v2()),
            Self::V2 => Err(CpuidError {
                model: self,
                missing: "part of x86-64-v2 (SSE4.2, SSSE3, POPCNT, CMPXCHG16B)",
                remedy: "no other model asks for less",
            }),
            Self::V3 if FeatureSet::host_has_v3() => Ok(FeatureSet::v3()),
            Self::V3 => Err(CpuidError {
                model: self,
                missing: "part of x86-64-v3 (AVX2, BMI1, BMI2, FMA, F16C, LZCNT, MOVBE)",
                remedy: "use v2",
            }),
        }
    }

    /// Its name, as the command line has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::V3 => "v3",
        }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CpuModel {
    type Err = ParseModelError;

    fn from_str(text: &str) -> Result<Self, ParseModelError> {
        [Self::V2, Self::V3].into_iter().find(|model| model.name() == text).ok_or(ParseModelError)
    }
}

/// A vCPU's place: one package of single-threaded cores, numbered by APIC ID from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// vCPUs in the machine; at least 1.
    pub cpus: u32,
    /// This one's APIC ID.
    pub apic_id: u32,
}

impl Topology {
    /// Bits of an APIC ID that number cores within the package.
    #[must_use]
    pub const fn core_bits(&self) -> u32 {
        if self.cpus <= 1 {
            0
        } else {
            u32::BITS.wrapping_sub(self.cpus.wrapping_sub(1).leading_zeros())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_back() {
        assert_eq!("v3".parse(), Ok(CpuModel::V3));
        assert_eq!("v2".parse(), Ok(CpuModel::V2));
        assert_eq!("v4".parse::<CpuModel>(), Err(ParseModelError));
    }

    #[test]
    fn core_bits_hold_every_id() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6)] {
            assert_eq!(Topology { cpus, apic_id: 0 }.core_bits(), bits, "{cpus} vCPUs");
        }
    }
}
