//! The leaves themselves.
//!
//! Sources: SDM vol. 2, CPUID; AMD APM vol. 3, appendix E. Bits that name instruction
//! sets come from the [`FeatureSet`]; bits that name system features are those the rest
//! of [`crate::system`] and [`crate::mmu`] implement.

use iced_x86::CpuidFeature as F;

use super::model::{CpuModel, Topology};
use super::table::CpuidTable;
use super::{XSAVE_AVX, XSAVE_LEGACY, identity};
use crate::mmu::PHYS_BITS;
use crate::native::features::FeatureSet;

/// A system feature: always there.
const ALWAYS: Option<F> = None;

/// A bit of a feature word and the instruction set it announces, if it is one.
type Bit = (u32, Option<F>);

const LEAF_1_ECX: &[Bit] = &[
    (0, Some(F::SSE3)),
    (1, Some(F::PCLMULQDQ)),
    (9, Some(F::SSSE3)),
    (12, Some(F::FMA)),
    (13, Some(F::CMPXCHG16B)),
    (17, ALWAYS), // PCID
    (19, Some(F::SSE4_1)),
    (20, Some(F::SSE4_2)),
    (21, ALWAYS), // x2APIC
    (22, Some(F::MOVBE)),
    (23, Some(F::POPCNT)),
    (24, ALWAYS), // TSC deadline
    (25, Some(F::AES)),
    (26, Some(F::XSAVE)),
    (28, Some(F::AVX)),
    (29, Some(F::F16C)),
    (30, Some(F::RDRAND)),
    (31, ALWAYS), // hypervisor
];

const LEAF_1_EDX: &[Bit] = &[
    (0, Some(F::FPU)),
    (2, ALWAYS), // DE
    (3, ALWAYS), // PSE
    (4, Some(F::TSC)),
    (5, Some(F::MSR)),
    (6, ALWAYS), // PAE
    (7, ALWAYS), // MCE
    (8, Some(F::CX8)),
    (9, ALWAYS), // APIC
    (11, Some(F::SEP)),
    (12, ALWAYS), // MTRR
    (13, ALWAYS), // PGE
    (14, ALWAYS), // MCA
    (15, Some(F::CMOV)),
    (16, ALWAYS), // PAT
    (17, ALWAYS), // PSE-36
    (19, Some(F::CLFSH)),
    (23, Some(F::MMX)),
    (24, Some(F::FXSR)),
    (25, Some(F::SSE)),
    (26, Some(F::SSE2)),
];

const LEAF_7_EBX: &[Bit] = &[
    (0, Some(F::FSGSBASE)),
    (1, ALWAYS), // TSC_ADJUST
    (3, Some(F::BMI1)),
    (5, Some(F::AVX2)),
    (6, ALWAYS), // FDP_EXCPTN_ONLY: FDP is only updated for x87 exceptions that are not masked
    (7, ALWAYS), // SMEP
    (8, Some(F::BMI2)),
    (9, ALWAYS), // ERMS
    (10, Some(F::INVPCID)),
    (18, Some(F::RDSEED)),
    (19, Some(F::ADX)),
    (20, Some(F::SMAP)),
    (23, Some(F::CLFLUSHOPT)),
    (24, Some(F::CLWB)),
    (29, Some(F::SHA)),
];

const LEAF_7_ECX: &[Bit] = &[
    (2, ALWAYS), // UMIP
    (8, Some(F::GFNI)),
    (9, Some(F::VAES)),
    (10, Some(F::VPCLMULQDQ)),
    (22, ALWAYS), // RDPID: done in software
];

const LEAF_7_EDX: &[Bit] = &[
    (4, ALWAYS),  // fast short REP MOVSB
    (29, ALWAYS), // IA32_ARCH_CAPABILITIES
];

const LEAF_D_1_EAX: &[Bit] = &[(0, Some(F::XSAVEOPT)), (1, Some(F::XSAVEC))];

const LEAF_8000_0001_ECX: &[Bit] = &[
    (0, ALWAYS), // LAHF and SAHF in 64-bit mode
    (5, Some(F::LZCNT)),
    (8, Some(F::PREFETCHW)),
    (22, ALWAYS), // topology extensions
];

/// Of leaf 8000_0001h EDX, what is not a copy of leaf 1 EDX.
const LEAF_8000_0001_EDX: &[Bit] = &[
    (11, Some(F::SYSCALL)),
    (20, ALWAYS),       // NX
    (22, Some(F::SSE)), // MMX extensions, part of SSE
    (26, ALWAYS),       // 1 GiB pages
    (27, Some(F::RDTSCP)),
    (29, Some(F::X64)),
];

/// The bits of leaf 1 EDX that leaf 8000_0001h EDX repeats on AMD's processors.
const REPEATED_EDX: u32 = 0x0183_f3ff;

/// Leaf 8000_0008h EBX: x87 error pointers always saved and restored, IBRS, SSB_NO (a CPU
/// that does not speculate stores), BTC_NO.
const LEAF_8000_0008_EBX: &[Bit] = &[(2, ALWAYS), (14, ALWAYS), (26, ALWAYS), (29, ALWAYS)];

/// Leaf 8000_0021h EAX: no nested data breakpoints, LFENCE always serialising, null
/// selectors clear bases, automatic IBRS, not affected by SRSO.
const LEAF_8000_0021_EAX: &[Bit] =
    &[(0, ALWAYS), (2, ALWAYS), (6, ALWAYS), (8, ALWAYS), (29, ALWAYS)];

/// Leaf 8000_0021h ECX: not affected by transient scheduler attacks.
const LEAF_8000_0021_ECX: &[Bit] = &[(1, ALWAYS), (2, ALWAYS)];

fn word(bits: &[Bit], features: &FeatureSet) -> u32 {
    bits.iter()
        .filter(|(_, feature)| feature.is_none_or(|feature| features.contains(feature)))
        .fold(0, |word, (bit, _)| word | 1_u32.wrapping_shl(*bit))
}

/// Leaf 1 EDX: more than one logical processor.
const MULTITHREADED: u32 = 1 << 28;

/// Puts every leaf of `model` into `table`.
pub(super) fn fill(
    table: &mut CpuidTable,
    model: CpuModel,
    features: &FeatureSet,
    topology: &Topology,
) {
    let [ebx, edx, ecx] = identity::VENDOR;
    table.insert(0, None, [0, ebx, ecx, edx]);
    table.insert(0x8000_0000, None, [0x8000_0000, ebx, ecx, edx]);
    basic(table, features, topology);
    extended(table, model, features, topology);
}

fn basic(table: &mut CpuidTable, features: &FeatureSet, topology: &Topology) {
    let cpus = topology.cpus.min(255);
    let multithreaded = if topology.cpus > 1 { MULTITHREADED } else { 0 };
    // Cache line of 8 quadwords, number of logical processors, initial APIC ID.
    let ebx = 8 << 8 | cpus << 16 | topology.apic_id << 24;
    table.insert(1, None, [identity::SIGNATURE, ebx, 0, multithreaded]);
    // Leaf 6: the APIC timer never stops.
    table.insert(6, None, [1 << 2, 0, 0, 0]);
    table.insert(7, Some(0), [0; 4]);
    announce(table);
    // Leaf B: one level of threads (one each), one of cores, then nothing.
    let id = topology.apic_id;
    table.insert(0xb, Some(0), [0, 1, 1 << 8, id]);
    table.insert(0xb, Some(1), [topology.core_bits(), topology.cpus, 2 << 8 | 1, id]);
    for subleaf in 2..4 {
        table.insert(0xb, Some(subleaf), [0, 0, subleaf, id]);
    }
    xsave(table, features);
}

/// Puts the instruction sets that `table` has into leaves 1 and 7.
pub(super) fn announce(table: &mut CpuidTable) {
    let features = *table.features();
    let [signature, topology, _, edx] = table.get(1, 0);
    let (known, multithreaded) = (word(LEAF_1_EDX, &features), edx & MULTITHREADED);
    let ecx = word(LEAF_1_ECX, &features);
    table.insert(1, None, [signature, topology, ecx, known | multithreaded]);
    let [ebx, ecx, edx] = [LEAF_7_EBX, LEAF_7_ECX, LEAF_7_EDX].map(|bits| word(bits, &features));
    table.insert(7, Some(0), [0, ebx, ecx, edx]);
}

fn xsave(table: &mut CpuidTable, features: &FeatureSet) {
    // The leaf number must be there to be the highest, even when it is empty.
    table.insert(0xd, None, [0; 4]);
    if !table.has_xsave() {
        return;
    }
    let supported = table.xcr0_supported() as u32;
    let avx = features.contains(F::AVX);
    let most = if avx { XSAVE_LEGACY + XSAVE_AVX } else { XSAVE_LEGACY };
    table.insert(0xd, Some(0), [supported, XSAVE_LEGACY, most, 0]);
    table.insert(0xd, Some(1), [word(LEAF_D_1_EAX, features), XSAVE_LEGACY, 0, 0]);
    if avx {
        table.insert(0xd, Some(2), [XSAVE_AVX, XSAVE_LEGACY, 0, 0]);
    }
}

fn extended(table: &mut CpuidTable, model: CpuModel, features: &FeatureSet, topology: &Topology) {
    let repeated = word(LEAF_1_EDX, features) & REPEATED_EDX;
    let edx = word(LEAF_8000_0001_EDX, features) | repeated;
    table.insert(
        0x8000_0001,
        None,
        [identity::SIGNATURE, 0, word(LEAF_8000_0001_ECX, features), edx],
    );
    for (leaf, registers) in (0x8000_0002..).zip(identity::brand(model.name())) {
        table.insert(leaf, None, registers);
    }
    // Caches in the old form: L1 of 32 KiB, 8 ways, 64-byte lines; L2 of 1 MiB; L3 of 32 MiB.
    let l1 = 32 << 24 | 8 << 16 | 1 << 8 | 64;
    table.insert(0x8000_0005, None, [0xff48_ff40, 0xff48_ff40, l1, l1]);
    table.insert(
        0x8000_0006,
        None,
        [
            0x5c00_2200,
            0x6c00_4200,
            1024 << 16 | 6 << 12 | 1 << 8 | 64,
            64 << 18 | 9 << 12 | 1 << 8 | 64,
        ],
    );
    // Invariant TSC.
    table.insert(0x8000_0007, None, [0, 0, 0, 1 << 8]);
    let sizes = PHYS_BITS | 48 << 8;
    let cores = topology.cpus.saturating_sub(1).min(255) | topology.core_bits() << 12;
    table.insert(0x8000_0008, None, [sizes, word(LEAF_8000_0008_EBX, features), cores, 0]);
    caches(table, topology);
    // Extended APIC ID; core number, one thread; one node.
    table.insert(0x8000_001e, None, [topology.apic_id, topology.apic_id & 0xff, 0, 0]);
    let (eax, ecx) = (word(LEAF_8000_0021_EAX, features), word(LEAF_8000_0021_ECX, features));
    table.insert(0x8000_0021, None, [eax, 0, ecx, 0]);
}

/// Leaf 8000_001Dh: caches in the new form. The L3 is shared by all cores.
fn caches(table: &mut CpuidTable, topology: &Topology) {
    const DATA: u32 = 1;
    const CODE: u32 = 2;
    const UNIFIED: u32 = 3;
    let sharing = topology.cpus.saturating_sub(1).min(0xfff);
    let levels = [
        (DATA, 1, 8, 64, 0),
        (CODE, 1, 8, 64, 0),
        (UNIFIED, 2, 8, 2048, 0),
        (UNIFIED, 3, 16, 32768, sharing),
    ];
    for (subleaf, (kind, level, ways, sets, sharing)) in (0_u32..).zip(levels) {
        // Self-initialising, 64-byte lines, one partition.
        let eax = kind | level << 5 | 1 << 8 | sharing << 14;
        let ebx = 63 | u32::wrapping_sub(ways, 1) << 22;
        table.insert(0x8000_001d, Some(subleaf), [eax, ebx, u32::wrapping_sub(sets, 1), 0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(model: CpuModel) -> CpuidTable {
        CpuidTable::for_model(model, Topology { cpus: 4, apic_id: 2 }).unwrap()
    }

    #[test]
    fn the_ranges_report_their_highest_leaf() {
        let mut table = table(CpuModel::V2);
        assert_eq!(table.get(0, 0)[0], 0xd);
        assert_eq!(table.get(0x8000_0000, 7)[0], 0x8000_0021);
        table.insert(0x15, None, [1, 2, 3, 0]);
        table.insert(0x4000_0000, None, [0x4000_0001, 0, 0, 0]);
        assert_eq!(table.get(0, 0)[0], 0x15);
        assert_eq!(table.get(0x8000_0000, 0)[0], 0x8000_0021);
        assert_eq!(table.get(0x1234, 0), [0; 4]);
    }

    #[test]
    fn identity_is_fixed() {
        let table = table(CpuModel::V2);
        let [_, ebx, ecx, edx] = table.get(0, 0);
        let vendor = [ebx, edx, ecx].map(u32::to_le_bytes).concat();
        assert_eq!(vendor, b"AuthenticAMD");
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|leaf| table.get(leaf, 0))
            .flat_map(u32::to_le_bytes)
            .collect();
        assert!(brand.starts_with(b"lguest x86-64-v2\0"));
        assert_eq!(table.signature() >> 20 & 0xff, 0xa);
        assert_ne!(table.get(1, 0)[2] >> 31, 0, "hypervisor bit");
    }

    #[test]
    fn models_differ_by_what_they_promise() {
        let v2 = table(CpuModel::V2);
        assert_eq!(v2.get(1, 0)[2] & 1 << 28, 0, "no AVX in v2");
        assert_eq!(v2.xcr0_supported(), 1);
        assert_ne!(v2.get(0x8000_0001, 0)[3] & 1 << 29, 0, "long mode");
        if FeatureSet::host_has_v3() {
            let v3 = table(CpuModel::V3);
            assert_ne!(v3.get(7, 0)[1] & 1 << 5, 0, "AVX2");
            assert_eq!(v3.get(0xd, 0)[..3], [7, 576, 832]);
            assert!(v3.allows(F::AVX2) && !v3.allows(F::AVX512F));
        } else {
            assert!(CpuModel::V3.features().is_err());
        }
    }

    #[test]
    fn topology_is_consistent_between_its_leaves() {
        let table = table(CpuModel::V2);
        assert_eq!(table.get(0xb, 1), [2, 4, 0x201, 2]);
        assert_eq!(table.get(1, 0)[1] >> 16, 0x0204);
        assert_eq!(table.get(0x8000_0008, 0)[2], 0x2003);
        assert_eq!(table.get(0x8000_001d, 3)[0] >> 14, 3);
    }
}
