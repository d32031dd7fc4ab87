//! Model-specific registers that read as a constant.
//!
//! Kernels read these to learn about the processor and write some of them to work around
//! errata this CPU does not have. Reads give a sane constant; writes, where accepted, are
//! dropped. The registers with behaviour are in [`msr`](super::msr).

/// What a write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnWrite {
    /// `#GP(0)`: read-only.
    Refuse,
    /// Accepted without effect if only these bits are set.
    Drop(u64),
}

/// A register of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Constant {
    pub(crate) index: u32,
    /// What a read gives.
    pub(crate) value: u64,
    pub(crate) on_write: OnWrite,
}

const fn read_only(index: u32, value: u64) -> Constant {
    Constant { index, value, on_write: OnWrite::Refuse }
}

const fn dropped(index: u32, value: u64) -> Constant {
    Constant { index, value, on_write: OnWrite::Drop(u64::MAX) }
}

/// IA32_ARCH_CAPABILITIES (SDM vol. 4): why nothing needs to be mitigated here. A CPU in
/// software does not speculate; the host's own mitigations guard the host.
pub(crate) const ARCH_CAPABILITIES: u64 = bit(&[
    0,  // RDCL_NO
    1,  // IBRS_ALL
    3,  // SKIP_L1DFL_VMENTRY
    4,  // SSB_NO
    5,  // MDS_NO
    6,  // IF_PSCHANGE_MC_NO
    8,  // TAA_NO
    13, // SBDR_SSDP_NO
    14, // FBSDP_NO
    15, // PSDP_NO
    20, // BHI_NO
    24, // PBRSB_NO
    26, // GDS_NO
    27, // RFDS_NO
    62, // ITS_NO
]);

/// A legacy performance counter or its event select: every AMD part has eight of these, so
/// CPUID cannot say that there are none. They stand still at zero and take nothing else.
const fn stopped_counter(index: u32) -> Constant {
    Constant { index, value: 0, on_write: OnWrite::Drop(0) }
}

const fn bit(numbers: &[u32]) -> u64 {
    let mut value = 0;
    let mut rest = numbers;
    while let Some((first, tail)) = rest.split_first() {
        value |= 1_u64.wrapping_shl(*first);
        rest = tail;
    }
    value
}

/// HWCR.TscFreqSel: the TSC counts at the nominal frequency. Linux asks for it whenever
/// CPUID says the TSC is invariant.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// DE_CFG.LFENCE_SERIALIZE.
const DE_CFG_LFENCE_SERIALIZE: u64 = 1 << 1;

/// The microcode patch level, in the low half as AMD has it: past every fix that kernels
/// ask of this family and model.
const PATCH_LEVEL: u64 = 0x0a10_11ff;

/// In ascending order of index.
const TABLE: &[Constant] = &[
    read_only(0x17, 0),                         // IA32_PLATFORM_ID
    dropped(0x2a, 0),                           // EBL_CR_POWERON
    read_only(0x8b, PATCH_LEVEL),               // PATCH_LEVEL
    read_only(0xfe, super::mtrr::CAPABILITIES), // IA32_MTRRCAP
    read_only(0x10a, ARCH_CAPABILITIES),        // IA32_ARCH_CAPABILITIES
    read_only(0x179, 0),                        // IA32_MCG_CAP
    Constant { index: 0x17a, value: 0, on_write: OnWrite::Drop(7) }, // IA32_MCG_STATUS
    dropped(0x1db, 0),                          // LASTBRANCHFROMIP
    dropped(0x1dc, 0),                          // LASTBRANCHTOIP
    dropped(0x1dd, 0),                          // LASTINTFROMIP
    dropped(0x1de, 0),                          // LASTINTTOIP
    stopped_counter(0xc001_0000),               // PERF_LEGACY_CTL0
    stopped_counter(0xc001_0001),
    stopped_counter(0xc001_0002),
    stopped_counter(0xc001_0003),
    stopped_counter(0xc001_0004), // PERF_LEGACY_CTR0
    stopped_counter(0xc001_0005),
    stopped_counter(0xc001_0006),
    stopped_counter(0xc001_0007),
    dropped(0xc001_0010, 0),                       // SYSCFG
    dropped(0xc001_0015, HWCR_TSC_FREQ_SEL),       // HWCR
    dropped(0xc001_001a, 0),                       // TOP_MEM
    dropped(0xc001_001d, 0),                       // TOP_MEM2
    dropped(0xc001_001f, 0),                       // NB_CFG
    dropped(0xc001_0020, 0),                       // PATCH_LOADER
    dropped(0xc001_0055, 0),                       // INT_PENDING
    read_only(0xc001_0061, 0),                     // PSTATE_CURRENT_LIMIT
    dropped(0xc001_0062, 0),                       // PSTATE_CONTROL
    read_only(0xc001_0063, 0),                     // PSTATE_STATUS
    dropped(0xc001_1022, 0),                       // DC_CFG
    dropped(0xc001_1029, DE_CFG_LFENCE_SERIALIZE), // DE_CFG
    dropped(0xc001_102a, 0),                       // BU_CFG2
];

/// Finds the constant register `index`.
pub(crate) fn find(index: u32) -> Option<&'static Constant> {
    TABLE
        .binary_search_by_key(&index, |constant| constant.index)
        .ok()
        .and_then(|place| TABLE.get(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_can_be_searched() {
        assert!(TABLE.is_sorted_by(|a, b| a.index < b.index));
        assert_eq!(find(0xc001_0015).map(|constant| constant.value), Some(HWCR_TSC_FREQ_SEL));
        assert!(find(0x18).is_none());
        assert_eq!(ARCH_CAPABILITIES & 0x3f, 0b11_1011);
    }
}
