//! Leaves by number.

use std::collections::BTreeMap;

use iced_x86::CpuidFeature;

use super::leaves;
use super::model::{CpuModel, CpuidError, Topology};
use crate::native::features::FeatureSet;
use crate::state::fpu::{XCR0_AVX, XCR0_SSE, XCR0_X87};

/// The range of hypervisor leaves.
const HYPERVISOR: u32 = 0x4000_0000;
/// The range of extended leaves.
const EXTENDED: u32 = 0x8000_0000;

/// What CPUID answers on one vCPU.
#[derive(Clone, Debug)]
pub struct CpuidTable {
    /// EAX, EBX, ECX, EDX by leaf and subleaf; `None` where the subleaf does not matter.
    leaves: BTreeMap<(u32, Option<u32>), [u32; 4]>,
    features: FeatureSet,
    model: CpuModel,
}

impl CpuidTable {
    /// The table of `model` for the vCPU at `topology`.
    ///
    /// # Errors
    /// [`CpuidError`] when this host cannot execute what the model promises.
    pub fn for_model(model: CpuModel, topology: Topology) -> Result<Self, CpuidError> {
        let features = model.features()?;
        let mut table = Self { leaves: BTreeMap::new(), features, model };
        leaves::fill(&mut table, model, &features, &topology);
        Ok(table)
    }

    /// The same CPU without RDRAND and RDSEED.
    #[must_use]
    pub fn without_random(mut self) -> Self {
        self.features = self.features.without(CpuidFeature::RDRAND).without(CpuidFeature::RDSEED);
        leaves::announce(&mut self);
        self
    }

    /// Adds or replaces a leaf: EAX, EBX, ECX, EDX. With `subleaf` of `None` it answers
    /// whatever ECX is. The highest leaf number that its range reports follows.
    pub fn insert(&mut self, leaf: u32, subleaf: Option<u32>, registers: [u32; 4]) {
        self.leaves.insert((leaf, subleaf), registers);
        let range = match leaf {
            0..HYPERVISOR => 0,
            HYPERVISOR..EXTENDED => return,
            _ => EXTENDED,
        };
        if let Some([highest, ..]) = self.leaves.get_mut(&(range, None)) {
            *highest = (*highest).max(leaf);
        }
    }

    /// The answer for `leaf` and `subleaf`: all zero for what is not there.
    #[must_use]
    pub fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let exact = self.leaves.get(&(leaf, Some(subleaf)));
        exact.or_else(|| self.leaves.get(&(leaf, None))).copied().unwrap_or([0; 4])
    }

    /// Family, model and stepping: what EDX holds after reset.
    #[must_use]
    pub fn signature(&self) -> u32 {
        let [signature, ..] = self.get(1, 0);
        signature
    }

    /// The model it was made for.
    #[must_use]
    pub fn model(&self) -> CpuModel {
        self.model
    }

    /// The instruction-set extensions it reports.
    #[must_use]
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// Whether instructions of `feature` are reported, and so must be executed.
    #[must_use]
    pub fn allows(&self, feature: CpuidFeature) -> bool {
        self.features.contains(feature)
    }

    /// Whether XSAVE and CR4.OSXSAVE exist.
    #[must_use]
    pub fn has_xsave(&self) -> bool {
        self.allows(CpuidFeature::XSAVE)
    }

    /// The state components XCR0 may name.
    #[must_use]
    pub fn xcr0_supported(&self) -> u64 {
        match (self.has_xsave(), self.allows(CpuidFeature::AVX)) {
            (false, _) => XCR0_X87,
            (true, false) => XCR0_X87 | XCR0_SSE,
            (true, true) => XCR0_X87 | XCR0_SSE | XCR0_AVX,
        }
    }
}
