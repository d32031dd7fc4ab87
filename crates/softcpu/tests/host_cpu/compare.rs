//! One instruction, run on both sides, and what came of it.

use iced_x86::{
    Code, CpuidFeature as F, EncodingKind, Instruction, Mnemonic as M, OpKind, Register as R,
    RflagsBits,
};
use softcpu::cpuid::CpuModel;
use softcpu::native::features::FeatureSet;
use softcpu::state::VcpuState;
use softcpu::state::fpu::Pointers;
use softcpu::state::rflags::RFlags;
use softcpu::state::segment::SegReg;

use crate::encode::{Encoded, encode};
use crate::guest::Guest;
use crate::layout::{DATA, DATA_LEN, Mode};
use crate::oracle::{End, Oracle};
use crate::prepare::prepare;
use crate::random::{self, Random};

/// `#BR`.
const BOUND_RANGE: u8 = 5;
/// `#UD`.
const INVALID_OPCODE: u8 = 6;
/// `#SS`.
const STACK_FAULT: u8 = 12;
/// `#GP`.
const GENERAL_PROTECTION: u8 = 13;
/// `#PF`.
const PAGE_FAULT: u8 = 14;

/// What a comparison said.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Both completed, alike.
    Same,
    /// Both raised this exception, alike.
    SameFault(u8),
    /// Not compared, and why.
    Refused(String),
    /// A mistake in the interpreter (or in this test).
    Different(String),
}

/// Both sides.
pub(crate) struct Bench {
    oracle: Oracle,
    guest: Guest,
    translator: Guest,
    /// How the translator last differed.
    translation: String,
    features: FeatureSet,
    ldt: bool,
    amd: bool,
    data: Box<[u8; DATA_LEN]>,
}

/// Whether `code` works on x87 or vector registers.
pub(crate) fn is_vector(code: Code) -> bool {
    use iced_x86::OpCodeOperandKind as K;
    code.encoding() == EncodingKind::VEX
        || code.op_code().op_kinds().iter().any(|kind| {
            matches!(
                kind,
                K::mm_reg
                    | K::mm_or_mem
                    | K::xmm_reg
                    | K::xmm_or_mem
                    | K::xmm_rm
                    | K::st0
                    | K::sti_opcode
            )
        })
}

impl Bench {
    pub(crate) fn new() -> Self {
        let features =
            CpuModel::best_for_host().features().expect("the best model is one the host can run");
        let mut data = Box::new([0; DATA_LEN]);
        random::memory(&mut data[..], &mut Random(0x9e37_79b9_7f4a_7c15));
        Self {
            oracle: Oracle::new(),
            guest: Guest::new(),
            translator: Guest::translating(),
            translation: String::new(),
            features,
            ldt: false,
            amd: is_amd(),
            data,
        }
    }

    /// Whether the host runs such code; says so if not.
    pub(crate) fn offers(&mut self, mode: Mode) -> bool {
        let state = self.guest.state(mode);
        let offered = self.oracle.offers(mode, &state);
        self.ldt |= offered && mode != Mode::Long && mode != Mode::Flat32;
        if !offered {
            println!("{mode:?} code is not compared: this host's kernel has no segments for it");
        }
        offered
    }

    /// Runs one random instruction of `code` in `mode` on both.
    pub(crate) fn compare(&mut self, code: Code, mode: Mode, random: &mut Random) -> Verdict {
        let seed = random.0;
        if let Some(why) = self.not_compared(code) {
            return Verdict::Refused(why);
        }
        let it = match encode(code, mode, random) {
            Ok(it) => it,
            Err(why) => return Verdict::Refused(why.to_owned()),
        };
        if let Some(why) = self.not_here(&it) {
            return Verdict::Refused(why.to_owned());
        }
        let mut before = self.guest.state(mode);
        prepare(&it, self.ldt, &mut before, &mut self.data, random);
        if mode != Mode::Long && random.one_in(2) {
            Guest::legacy(&mut before);
        }
        self.guest.put_data(&self.data);
        self.oracle.data().copy_from_slice(&self.data[..]);
        let (mut ours, mut theirs) = (before.clone(), before.clone());
        let end = self.guest.run(it.placed, &it.bytes, &mut ours);
        if !offered(&it.instruction, &self.features) {
            return match end {
                Some(End::Fault { vector: INVALID_OPCODE, .. }) => {
                    Verdict::Refused(format!("#UD, {}", missing(&it.instruction, &self.features)))
                }
                // Encodings that were no-operations before they meant something.
                Some(End::Next)
                    if unchanged(&before, &ours) && self.guest.data() == &self.data[..] =>
                {
                    Verdict::Refused(format!(
                        "no-operation, {}",
                        missing(&it.instruction, &self.features)
                    ))
                }
                Some(End::Fault { vector: GENERAL_PROTECTION, .. }) if code == Code::Wbnoinvd => {
                    Verdict::Refused("WBINVD, to a CPU that ignores its prefix".to_owned())
                }
                _ => Verdict::Different(describe(
                    &it,
                    seed,
                    &format!("not offered, but ended in {end:?}"),
                )),
            };
        }
        let expected = self.oracle.run(it.placed, &it.bytes, &mut theirs);
        let difference = match end {
            None => Some(format!("ended up at {:#x}, the host's end is {expected:?}", ours.rip)),
            Some(end) => self.difference(&it, end, expected, &ours, &theirs),
        };
        match (difference, end) {
            (Some(difference), _) => {
                let detail = format!(
                    "{difference}\n  before: {}\n  host:   {}\n  ours:   {}",
                    brief(&before),
                    brief(&theirs),
                    brief(&ours)
                );
                Verdict::Different(describe(&it, seed, &detail))
            }
            (None, _) if self.translator_differs(&it, &before, &ours, end) => {
                Verdict::Different(describe(&it, seed, &self.translation))
            }
            (None, Some(End::Fault { vector, .. })) => Verdict::SameFault(vector),
            (None, _) => Verdict::Same,
        }
    }

    /// Whether the translator makes anything else of `it` than the interpreter, which went from
    /// `before` to `ours`; what it is, is kept.
    fn translator_differs(
        &mut self,
        it: &Encoded,
        before: &VcpuState,
        ours: &VcpuState,
        end: Option<End>,
    ) -> bool {
        self.translator.put_data(&self.data);
        let mut state = before.clone();
        let translated = self.translator.run(it.placed, &it.bytes, &mut state);
        // What the manuals leave undefined may differ, but not by an instruction that faults.
        let faulted = matches!(end, Some(End::Fault { .. }));
        let undefined = if faulted { 0 } else { undefined_flags(&it.instruction) };
        let what = if translated != end {
            format!("ended in {translated:x?}")
        } else if state.gpr != ours.gpr || (state.rflags ^ ours.rflags).bits() & !undefined != 0 {
            format!("registers {:x?} flags {:?}", state.gpr, state.rflags)
        } else if state.vec != ours.vec || state.mxcsr != ours.mxcsr {
            format!("vector registers {:x?}, MXCSR {:#x}", state.vec, state.mxcsr)
        } else if state.fpu != ours.fpu {
            format!("x87 {:?}", state.fpu)
        } else if state.seg.map(|s| (s.selector, s.base)) != ours.seg.map(|s| (s.selector, s.base))
        {
            "segments".to_owned()
        } else if self.translator.data() != self.guest.data() {
            "memory".to_owned()
        } else {
            return false;
        };
        self.translation = format!(
            "translated: {what}\n  interpreted: {end:x?} {}\n  before: {}",
            brief(ours),
            brief(before)
        );
        true
    }

    /// What the translator did.
    pub(crate) fn counters(&self) -> softcpu::translate::Counters {
        self.translator.counters()
    }

    /// Encodings that cannot be compared at all.
    fn not_compared(&self, code: Code) -> Option<String> {
        let mnemonic = code.mnemonic();
        let why = match mnemonic {
            M::Syscall | M::Sysenter | M::Int | M::Int3 | M::Int1 => "enters the host's kernel",
            M::Vmcall | M::Vmmcall => "calls the host's own hypervisor",
            M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Rdpid
            | M::Cpuid
            | M::Xgetbv
            | M::Rdrand
            | M::Rdseed => "not a function of its operands",
            M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
                "shows system registers, which differ"
            }
            M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64
            | M::Fnsave
            | M::Frstor
            | M::Fnstenv
            | M::Fldenv => "whole register images: compared by native::tests::save",
            M::Sysret => "where it may be used depends on the vendor",
            M::Reservednop => "no-operation on one vendor's CPUs, undefined on another's",
            _ => return None,
        };
        Some(why.to_owned())
    }

    /// Instructions that cannot be compared on this host.
    fn not_here(&self, it: &Encoded) -> Option<&'static str> {
        let instruction = &it.instruction;
        let bases = matches!(instruction.segment_prefix(), R::FS | R::GS)
            || matches!(
                instruction.mnemonic(),
                M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase | M::Lfs | M::Lgs
            )
            || (0..instruction.op_count()).any(|n| {
                instruction.op_kind(n) == OpKind::Register
                    && matches!(instruction.op_register(n), R::FS | R::GS)
            });
        if bases && !self.oracle.has_fsgsbase {
            return Some("FS and GS: the host does not let user mode restore their bases");
        }
        let far64 = matches!(
            instruction.code(),
            Code::Jmp_m1664
                | Code::Call_m1664
                | Code::Lss_r64_m1664
                | Code::Lfs_r64_m1664
                | Code::Lgs_r64_m1664
        );
        if far64 && self.amd {
            return Some("far pointers of 64 bits, which AMD's CPUs do not have");
        }
        let narrow = it.placed.mode.base() == 0 && is_narrow_branch(instruction.code());
        narrow
            .then_some("a 16-bit branch out of a flat segment: nothing may be mapped where it goes")
    }

    fn difference(
        &mut self,
        it: &Encoded,
        ours: End,
        theirs: End,
        state: &VcpuState,
        expected: &VcpuState,
    ) -> Option<String> {
        let mode = it.placed.mode;
        let faulted = matches!(ours, End::Fault { .. });
        match (ours, theirs) {
            (End::Fault { .. }, End::Fault { .. }) if same_fault(it, ours, theirs) => {}
            // AMD's SHA instructions take misaligned operands, Intel's do not; so ours do not.
            (End::Fault { vector: GENERAL_PROTECTION, .. }, _)
                if it.instruction.cpuid_features() == [F::SHA] =>
            {
                return None;
            }
            // Some CPUs read no more of a selector on the stack than there is of it.
            (End::Fault { vector: STACK_FAULT, .. }, End::Taken)
                if it.instruction.mnemonic() == M::Retf =>
            {
                return None;
            }
            (End::Next, End::Fault { vector, .. })
                if vector >= STACK_FAULT && may_fault(&it.instruction) =>
            {
                return None;
            }
            _ if ours != theirs => {
                return Some(format!("ended in {ours:x?}, on the host in {theirs:x?}"));
            }
            _ => {}
        }
        let half_done = faulted.then(|| HalfDone::of(&it.instruction));
        let cuts = cuts_addresses(&it.instruction);
        // Ours leaves them all, as the manual suggests; some CPUs have popped a few.
        let popped = faulted && matches!(it.instruction.mnemonic(), M::Popa | M::Popad);
        for i in 0..16 {
            // Ours leaves what it does not come to; some CPUs cut addresses short all the same.
            let cut = cuts && matches!(i, 1 | 6 | 7);
            let mask = if cut { 0xffff_ffff } else { mode.register_mask() };
            if !(popped && i != 4) && (state.gpr[i] ^ expected.gpr[i]) & mask != 0 {
                return Some(format!(
                    "general register {i}: {:#x}, should be {:#x}",
                    state.gpr[i], expected.gpr[i]
                ));
            }
            let alike = half_done.is_some_and(|half_done| half_done.has_gathered);
            if state.vec[i] != expected.vec[i] && !alike {
                return Some(format!(
                    "vector register {i}: {:x?}, should be {:x?}",
                    state.vec[i], expected.vec[i]
                ));
            }
        }
        let undefined = if faulted { 0 } else { undefined_flags(&it.instruction) };
        let compared = (RFlags::STATUS | RFlags::DF | RFlags::ID | RFlags::NT).bits() & !undefined;
        let flags = (state.rflags.bits() ^ expected.rflags.bits()) & compared;
        if flags != 0 && !half_done.is_some_and(|half_done| half_done.takes_flags_back) {
            return Some(format!("flags {:?}, should be {:?}", state.rflags, expected.rflags));
        }
        let noted = half_done.is_some_and(|half_done| half_done.has_noted_exceptions);
        if state.mxcsr != expected.mxcsr && !noted {
            return Some(format!("MXCSR {:#x}, should be {:#x}", state.mxcsr, expected.mxcsr));
        }
        // An interrupt of the host's makes zeroes of null selectors with an RPL, on its way back.
        let null = |selector: u16| if selector <= 3 { 0 } else { selector };
        for i in [0, 2, 3, 4, 5] {
            if null(state.seg[i].selector) != null(expected.seg[i].selector) {
                let (a, b) = (state.seg[i].selector, expected.seg[i].selector);
                return Some(format!("segment register {i}: {a:#x}, should be {b:#x}"));
            }
        }
        for i in [4, 5] {
            // Vendors differ in what becomes of the base when a null selector is loaded.
            let bases = (state.seg[i].base, expected.seg[i].base);
            if mode == Mode::Long
                && state.seg[i].selector > 3
                && self.oracle.has_fsgsbase
                && bases.0 != bases.1
            {
                return Some(format!(
                    "base of segment register {i}: {:#x}, should be {:#x}",
                    bases.0, bases.1
                ));
            }
        }
        let entered = half_done.is_some_and(|half_done| half_done.has_entered_mmx);
        if !entered && let Some(difference) = x87(state, expected) {
            return Some(difference);
        }
        if half_done.is_some_and(|half_done| half_done.has_stored) {
            return None;
        }
        // Half a word may be all that is pushed of a selector: the rest stays what it was, or is
        // zero.
        let rest = match it.instruction.code() {
            Code::Pushd_ES
            | Code::Pushd_CS
            | Code::Pushd_SS
            | Code::Pushd_DS
            | Code::Pushd_FS
            | Code::Pushd_GS => 2..4,
            Code::Pushq_FS | Code::Pushq_GS => 2..8,
            _ => 0..0,
        };
        let stack = state.segment(SegReg::Ss).base.wrapping_sub(DATA);
        let pushed =
            [0xffff, mode.register_mask()].map(|mask| (state.gpr[4] & mask).wrapping_add(stack));
        let before = &self.data;
        let (here, there) = (self.guest.data(), self.oracle.data());
        let differs = |at: usize| {
            let within = |from: &u64| rest.contains(&(at as u64).wrapping_sub(*from));
            let left = pushed.iter().any(within) && there[at] == before[at];
            here[at] != there[at] && !left
        };
        let at = (0..DATA_LEN).find(|at| differs(*at))?;
        let end = (at + 16).min(DATA_LEN);
        Some(format!(
            "memory at {:#x}: {:02x?}, should be {:02x?}",
            DATA + at as u64,
            &here[at..end],
            &there[at..end]
        ))
    }
}

/// Whether `it` is a string instruction with addresses of 32 bits.
fn cuts_addresses(it: &Instruction) -> bool {
    let narrow = |n| matches!(it.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI);
    it.is_string_instruction() && (0..it.op_count()).any(narrow)
}

/// What CPUs that are not ours may have done of an instruction by the time it faults.
#[derive(Clone, Copy, Debug)]
struct HalfDone {
    /// Taken flags back to what they were before a repetition that compares.
    takes_flags_back: bool,
    /// Made MMX registers of the x87 unit's.
    has_entered_mmx: bool,
    /// Noted what a conversion has come to.
    has_noted_exceptions: bool,
    /// Gathered some elements more, or fewer.
    has_gathered: bool,
    /// Stored below the stack pointer, or a part of a number.
    has_stored: bool,
}

impl HalfDone {
    fn of(it: &Instruction) -> Self {
        let strings = it.is_string_instruction();
        let compares = matches!(
            it.mnemonic(),
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq
        );
        let mmx = (0..it.op_count()).any(|n| it.op_register(n).is_mm());
        Self {
            takes_flags_back: strings && compares,
            has_entered_mmx: mmx || it.mnemonic() == M::Maskmovq,
            has_noted_exceptions: it.mnemonic() == M::Vcvtps2ph,
            has_gathered: it.memory_index().is_vector_register(),
            has_stored: matches!(it.mnemonic(), M::Pusha | M::Pushad | M::Enter | M::Fbstp)
                || it.code() == Code::Fstp_m80fp,
        }
    }
}

/// Whether two exceptions are the same, as far as manuals say what they are.
fn same_fault(it: &Encoded, ours: End, theirs: End) -> bool {
    let (
        End::Fault { vector: a, code: c, address: d },
        End::Fault { vector: b, code: e, address: f },
    ) = (ours, theirs)
    else {
        return false;
    };
    // An operand that is both misaligned and beyond the stack's limit may raise either.
    let either = |vector| matches!(vector, STACK_FAULT | GENERAL_PROTECTION);
    let alignment = it.instruction.memory_size().size().max(16) as u64;
    let misaligned = !it.operand.is_multiple_of(alignment);
    if is_vector(it.instruction.code()) && misaligned && either(a) && either(b) {
        return true;
    }
    // Where both operands of a comparison of strings cannot be read, either may be met first.
    let compares = matches!(it.instruction.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq);
    let of_an_operand = |vector| either(vector) || vector == PAGE_FAULT;
    if compares && it.instruction.is_string_instruction() && of_an_operand(a) && of_an_operand(b) {
        return true;
    }
    // One bound may be looked at before the other is read.
    if it.instruction.mnemonic() == M::Bound && [a, b].contains(&BOUND_RANGE) {
        return true;
    }
    // Which byte of a masked store or of a frame faults first is up to the CPU; its page is not.
    let masked = matches!(
        it.instruction.mnemonic(),
        M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Retf
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
    );
    let place = |address: u64| if masked { address >> 12 } else { address };
    a == b && c == e && (a != PAGE_FAULT || place(d) == place(f))
}

/// Whether CPUs may touch memory here that the instruction does not need: bytes that are
/// masked out, and the upper half of what a 16-bit MOVSXD is given.
fn may_fault(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
        || instruction.code() == Code::Movsxd_r16_rm16
}

/// Whether nothing but RIP has changed.
fn unchanged(before: &VcpuState, after: &VcpuState) -> bool {
    before.gpr == after.gpr
        && before.rflags == after.rflags
        && before.vec == after.vec
        && x87(before, after).is_none()
}

/// Control, status, tags and registers; pointers depend on the vendor.
fn x87(ours: &VcpuState, theirs: &VcpuState) -> Option<String> {
    let (mut ours, mut theirs) = (ours.fpu.clone(), theirs.fpu.clone());
    ours.set_pointers(Pointers::default());
    theirs.set_pointers(Pointers::default());
    if ours.fxsave[..24] != theirs.fxsave[..24] {
        return Some(format!(
            "x87 {:02x?}, should be {:02x?}",
            &ours.fxsave[..5],
            &theirs.fxsave[..5]
        ));
    }
    let i = (0..8).find(|i| ours.st(*i) != theirs.st(*i))?;
    Some(format!("ST{i}: {:02x?}, should be {:02x?}", ours.st(i), theirs.st(i)))
}

fn offered(instruction: &Instruction, features: &FeatureSet) -> bool {
    matches!(instruction.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && instruction.cpuid_features().iter().all(|feature| features.contains(*feature))
}

fn missing(instruction: &Instruction, features: &FeatureSet) -> String {
    match instruction.encoding() {
        EncodingKind::Legacy | EncodingKind::VEX => {
            let missing =
                instruction.cpuid_features().iter().find(|feature| !features.contains(**feature));
            format!("as no model offers {:?}", missing.expect("one is missing"))
        }
        other => format!("as no model offers {other:?} encodings"),
    }
}

/// Branches whose operand size truncates IP to 16 bits.
fn is_narrow_branch(code: Code) -> bool {
    matches!(
        code,
        Code::Retnw
            | Code::Retnw_imm16
            | Code::Retfw
            | Code::Retfw_imm16
            | Code::Iretw
            | Code::Jmp_rm16
            | Code::Call_rm16
            | Code::Jmp_m1616
            | Code::Call_m1616
    )
}

fn undefined_flags(instruction: &Instruction) -> u64 {
    let pairs = [
        (RflagsBits::CF, RFlags::CF),
        (RflagsBits::PF, RFlags::PF),
        (RflagsBits::AF, RFlags::AF),
        (RflagsBits::ZF, RFlags::ZF),
        (RflagsBits::SF, RFlags::SF),
        (RflagsBits::OF, RFlags::OF),
    ];
    let bits = instruction.rflags_undefined();
    pairs.iter().filter(|(theirs, _)| bits & theirs != 0).map(|(_, ours)| ours.bits()).sum()
}

fn describe(it: &Encoded, seed: u64, what: &str) -> String {
    let Encoded { instruction, bytes, placed, operand, .. } = it;
    format!(
        "{:?} `{instruction}` {bytes:02x?} in {:?} code at {:#x}, operand at {operand:#x}, seed {seed}: {what}",
        instruction.code(),
        placed.mode,
        instruction.ip()
    )
}

fn brief(state: &VcpuState) -> String {
    format!("{:x?} flags {:#x} rip {:#x}", &state.gpr[..16], state.rflags.bits(), state.rip)
}

fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    leaf.ecx == u32::from_le_bytes(*b"cAMD")
}
