//! Which instructions the host may execute for the guest, and what each needs.
//!
//! [`plan`] looks at one decoded instruction and either refuses it (control flow,
//! privilege, implicit memory operands, anything that could fault or leak on the
//! host) or says which registers, flags and checks its stub is to be built around.
//! Everything is taken from iced-x86's tables; by hand are only the short lists of
//! what those tables do not say.

use iced_x86::{
    Code, CpuidFeature as F, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, Mnemonic as M, OpAccess, OpCodeOperandKind, OpKind, Register,
    RflagsBits,
};
use smallvec::SmallVec;

use super::features::FeatureSet;
use crate::state::control::{Cr0, Cr4};
use crate::state::fpu::{XCR0_AVX, XCR0_SSE};
use crate::state::rflags::RFlags;

/// Why an instruction gets no stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refused {
    /// The guest's CPU model does not have it (or nobody's does any more): `#UD`.
    #[error("not offered by the guest's CPU model")]
    NotOffered,
    /// EVEX, XOP, 3DNow! and other encodings that no model has: `#UD`.
    #[error("an encoding no model offers")]
    Encoding,
    /// Branches, calls, interrupts, system calls.
    #[error("control flow")]
    ControlFlow,
    /// Needs or may need privilege, or reads or writes system state.
    #[error("system instruction")]
    System,
    /// Works on the stack.
    #[error("stack instruction")]
    Stack,
    /// Strings, XLAT, and bit tests whose register operand moves the address.
    #[error("implicit memory operand")]
    ImplicitMemory,
    /// DIV, IDIV and AAM raise `#DE`, which must not happen on the host.
    #[error("may raise #DE on the host")]
    DivideError,
    /// LEA and moves from and to absolute addresses: no memory operand to put in its place.
    #[error("address arithmetic")]
    Address,
    /// No equivalent in 64-bit code.
    #[error("not encodable in 64-bit code")]
    NotEncodable,
    /// There is no room left: the vCPU's own stubs and every block that names one must be
    /// dropped (`NativeCache::reset_own`).
    #[error("no room for another stub")]
    Full,
}

bitflags::bitflags! {
    /// What the handlers need to know about a stub.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub(crate) struct Traits: u32 {
        /// Has a memory operand.
        const MEMORY = 1 << 0;
        /// Its old value matters.
        const LOADS = 1 << 1;
        /// It is changed.
        const STORES = 1 << 2;
        /// Atomic: `lock` prefix, or XCHG with memory.
        const LOCK = 1 << 3;
        /// Uses x87 or MMX registers.
        const X87 = 1 << 4;
        /// Pending x87 exceptions come first.
        const WAITS = 1 << 5;
        /// Uses MMX registers.
        const MMX = 1 << 6;
        /// Legacy-encoded, uses XMM registers.
        const SSE = 1 << 7;
        /// VEX-encoded, uses XMM or YMM registers.
        const AVX = 1 << 8;
        /// VEX-encoded, any registers.
        const VEX = 1 << 9;
        /// Reads and writes MXCSR.
        const SIMD_FP = 1 << 10;
        /// x87, and not a control instruction: sets the last-instruction pointers.
        const POINTERS = 1 << 11;
        /// x87: resets the last-instruction pointers.
        const RESETS_POINTERS = 1 << 12;
    }
}

/// What a stub is built from.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The instruction as it will be executed, but for the memory operand's base.
    pub(crate) instruction: Instruction,
    /// General registers it uses, by number.
    pub(crate) gprs: Uses,
    /// Vector registers it uses, by number.
    pub(crate) vectors: Uses,
    /// Loads whole YMM registers.
    pub(crate) wide: bool,
    /// Status flags must be the guest's before.
    pub(crate) flags_in: bool,
    /// Status flags to take over.
    pub(crate) flags_out: u64,
    /// See [`Traits`].
    pub(crate) traits: Traits,
    /// Size of the memory operand, bytes.
    pub(crate) size: usize,
    /// Alignment the memory operand must have, bytes; a power of two.
    pub(crate) alignment: usize,
}

/// Registers of one kind. Few instructions use more than four, and a translation has one of
/// these for each of its instructions.
pub(crate) type Uses = SmallVec<[Use; 4]>;

/// A register an instruction uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) number: u8,
    /// Its old value, or part of it, matters.
    pub(crate) loaded: bool,
    pub(crate) written: bool,
}

impl Use {
    pub(crate) fn index(self) -> usize {
        usize::from(self.number)
    }
}

/// The mode bits an instruction needs: all checked in one go before it runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Needs {
    pub(crate) cr0_mask: u64,
    pub(crate) cr0_value: u64,
    pub(crate) cr4: u64,
    pub(crate) xcr0: u64,
}

impl Needs {
    /// What an instruction with `traits` needs (SDM vol. 2, 2.4 "exception
    /// classification"; vol. 3, tables 2-2 and 24-1..3).
    pub(crate) const fn of(traits: Traits) -> Self {
        let mut needs = Self { cr0_mask: 0, cr0_value: 0, cr4: 0, xcr0: 0 };
        if traits.intersects(Traits::X87.union(Traits::SSE)) {
            needs.cr0_mask |= Cr0::EM.bits() | Cr0::TS.bits();
        }
        if traits.contains(Traits::SSE) {
            needs.cr4 |= Cr4::OSFXSR.bits();
        }
        if traits.contains(Traits::VEX) {
            needs.cr0_mask |= Cr0::PE.bits();
            needs.cr0_value |= Cr0::PE.bits();
        }
        if traits.contains(Traits::AVX) {
            needs.cr0_mask |= Cr0::TS.bits();
            needs.cr4 |= Cr4::OSXSAVE.bits();
            needs.xcr0 |= XCR0_SSE | XCR0_AVX;
        }
        needs
    }
}

/// Says what `instruction` needs of its stub.
///
/// # Errors
/// [`Refused`], with the reason.
pub(crate) fn plan(
    instruction: &Instruction,
    features: &FeatureSet,
    factory: &mut InstructionInfoFactory,
) -> Result<Plan, Refused> {
    let instruction = normalise(instruction);
    offered(&instruction, features)?;
    admissible(&instruction)?;
    let info = factory.info_options(&instruction, InstructionInfoOptions::NONE);

    let mut traits = Traits::empty();
    let (mut size, mut alignment) = (0, 1);
    if has_memory(&instruction) {
        let [memory] = info.used_memory() else { return Err(Refused::ImplicitMemory) };
        size = memory.memory_size().size();
        if size == 0 || size > super::exec::LARGEST {
            return Err(Refused::Address);
        }
        traits |= Traits::MEMORY;
        traits |= match memory.access() {
            OpAccess::Read | OpAccess::CondRead => Traits::LOADS,
            OpAccess::Write => Traits::STORES,
            OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
                Traits::LOADS | Traits::STORES
            }
            OpAccess::None | OpAccess::NoMemAccess => return Err(Refused::Address),
        };
        if instruction.has_lock_prefix() || instruction.mnemonic() == M::Xchg {
            traits |= Traits::LOCK;
        }
        alignment = required_alignment(&instruction, size);
    } else if !info.used_memory().is_empty() {
        return Err(Refused::ImplicitMemory);
    }

    let (mut gprs, mut vectors) = (Uses::new(), Uses::new());
    let mut wide = false;
    for used in info.used_registers() {
        let register = used.register();
        let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
        let loaded = used.access() != OpAccess::Write || register.size() < 4;
        if register.is_gpr() {
            note(
                &mut gprs,
                Use { number: register.full_register().number() as u8, loaded, written },
            );
        } else if register.is_vector_register() {
            note(&mut vectors, Use { number: register.number() as u8, loaded, written });
            wide |= register.is_ymm();
        } else if register.is_mm() {
            traits |= Traits::MMX | Traits::X87;
        } else if register.is_st() {
            traits |= Traits::X87;
        } else if register.is_segment_register() && has_memory(&instruction) {
            // DS of the memory operand.
        } else {
            return Err(Refused::System);
        }
    }
    traits |= kind(&instruction, !vectors.is_empty(), traits);
    let status = RFlags::STATUS.bits();
    let mut flags_out = rflags(instruction.rflags_modified()) & status;
    // Undefined flags shall be as the host leaves them, which may be unchanged; the
    // same goes for shifts by zero.
    let mut flags_in =
        rflags(instruction.rflags_read() | instruction.rflags_undefined()) & status != 0;
    if shifts(instruction.mnemonic()) {
        // Which flags these change depends on the count in ways no table has.
        (flags_in, flags_out) = (true, status);
    }
    Ok(Plan { instruction, gprs, vectors, wide, flags_in, flags_out, traits, size, alignment })
}

/// The instruction without what does not matter to its stub, so that equal stubs have
/// equal keys: address, length, and how the memory operand is addressed.
pub(crate) fn normalise(instruction: &Instruction) -> Instruction {
    let mut it = *instruction;
    it.set_len(0);
    it.set_next_ip(0);
    it.set_code_size(iced_x86::CodeSize::Code64);
    // Repeat prefixes that mean something are part of the code; XACQUIRE and XRELEASE
    // would start a transaction on hosts that have them.
    it.set_has_rep_prefix(false);
    it.set_has_repne_prefix(false);
    it.set_segment_prefix(Register::None);
    if has_memory(&it) {
        it.set_memory_base(Register::None);
        it.set_memory_index(Register::None);
        it.set_memory_index_scale(1);
        it.set_memory_displacement64(0);
        it.set_memory_displ_size(0);
    }
    it.set_code(match it.code() {
        // One-byte forms whose opcodes are REX prefixes in 64-bit code.
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        // The alias of opcode 80h that 64-bit code does not have.
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        code => code,
    });
    it
}

/// Whether there is an explicit memory operand.
pub(super) fn has_memory(instruction: &Instruction) -> bool {
    instruction.op_kinds().any(|kind| kind == OpKind::Memory)
}

/// Without LZCNT and BMI1, their prefix is ignored and BSR and BSF are what remains.
pub(crate) fn without_prefix(code: Code, features: &FeatureSet) -> Code {
    match code {
        Code::Lzcnt_r16_rm16 if !features.contains(F::LZCNT) => Code::Bsr_r16_rm16,
        Code::Lzcnt_r32_rm32 if !features.contains(F::LZCNT) => Code::Bsr_r32_rm32,
        Code::Lzcnt_r64_rm64 if !features.contains(F::LZCNT) => Code::Bsr_r64_rm64,
        Code::Tzcnt_r16_rm16 if !features.contains(F::BMI1) => Code::Bsf_r16_rm16,
        Code::Tzcnt_r32_rm32 if !features.contains(F::BMI1) => Code::Bsf_r32_rm32,
        Code::Tzcnt_r64_rm64 if !features.contains(F::BMI1) => Code::Bsf_r64_rm64,
        other => other,
    }
}

pub(super) fn offered(instruction: &Instruction, features: &FeatureSet) -> Result<(), Refused> {
    let encoding = instruction.encoding();
    if !matches!(encoding, EncodingKind::Legacy | EncodingKind::VEX) || instruction.is_invalid() {
        return Err(Refused::Encoding);
    }
    let all = instruction.cpuid_features().iter().all(|feature| features.contains(*feature));
    if all { Ok(()) } else { Err(Refused::NotOffered) }
}

fn admissible(instruction: &Instruction) -> Result<(), Refused> {
    let op_code = instruction.op_code();
    if instruction.flow_control() != FlowControl::Next {
        return Err(Refused::ControlFlow);
    }
    let registers =
        || (0..instruction.op_count()).filter_map(|i| instruction.try_op_register(i).ok());
    if registers().any(|r| r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr()) {
        return Err(Refused::System);
    }
    if instruction.is_privileged()
        || instruction.is_save_restore_instruction()
        || op_code.is_input_output()
    {
        return Err(Refused::System);
    }
    if instruction.is_stack_instruction() {
        return Err(Refused::Stack);
    }
    for kind in instruction.op_kinds() {
        if !matches!(kind, OpKind::Register | OpKind::Memory) && !is_immediate(kind) {
            return Err(Refused::ImplicitMemory);
        }
    }
    if op_code.op_kinds().contains(&OpCodeOperandKind::mem_offs) {
        return Err(Refused::Address);
    }
    match instruction.mnemonic() {
        M::Div | M::Idiv | M::Aam => Err(Refused::DivideError),
        M::Xlatb => Err(Refused::ImplicitMemory),
        M::Lea => Err(Refused::Address),
        M::Bt | M::Btc | M::Btr | M::Bts
            if instruction.op0_kind() == OpKind::Memory
                && instruction.op1_kind() == OpKind::Register =>
        {
            Err(Refused::ImplicitMemory)
        }
        M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Sldt
        | M::Str
        | M::Sgdt
        | M::Sidt
        | M::Smsw
        | M::Lmsw
        | M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::Cli
        | M::Sti
        | M::Cld
        | M::Std
        | M::Clac
        | M::Stac
        | M::Cpuid
        | M::Rdtsc
        | M::Rdtscp
        | M::Rdpmc
        | M::Rdpid
        | M::Rdfsbase
        | M::Rdgsbase
        | M::Wrfsbase
        | M::Wrgsbase
        | M::Rdmsr
        | M::Wrmsr
        | M::Xgetbv
        | M::Xsetbv
        | M::Ldmxcsr
        | M::Stmxcsr
        | M::Vldmxcsr
        | M::Vstmxcsr
        | M::Wait
        | M::Monitor
        | M::Mwait
        | M::Fnstenv
        | M::Fldenv
        | M::Fnsave
        | M::Frstor => Err(Refused::System),
        _ => Ok(()),
    }
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

fn note(uses: &mut Uses, it: Use) {
    match uses.iter_mut().find(|known| known.number == it.number) {
        Some(known) => {
            known.loaded |= it.loaded;
            known.written |= it.written;
        }
        None => uses.push(it),
    }
}

fn shifts(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Rcl | M::Rcr | M::Rol | M::Ror | M::Sal | M::Sar | M::Shl | M::Shr | M::Shld | M::Shrd
    )
}

/// The unit an instruction belongs to.
fn kind(instruction: &Instruction, vectors: bool, so_far: Traits) -> Traits {
    let mut traits = Traits::empty();
    let features = instruction.cpuid_features();
    let mnemonic = instruction.mnemonic();
    let vex = instruction.encoding() == EncodingKind::VEX;
    if vex {
        traits |= Traits::VEX;
    }
    // Conversions from memory to general or MMX registers name no vector register.
    let vectors = vectors || is_conversion(mnemonic);
    if vectors {
        traits |= if vex { Traits::AVX } else { Traits::SSE };
    }
    if so_far.contains(Traits::MMX) || features.contains(&F::MMX) || mnemonic == M::Cvtpi2ps {
        // Memory forms switch to MMX state too.
        traits |= Traits::MMX | Traits::X87 | Traits::WAITS;
    } else if is_x87(instruction) {
        traits |= Traits::X87;
        if !instruction.op_code().is_fpu_no_wait() {
            traits |= Traits::WAITS;
        }
        traits |= match mnemonic {
            M::Fninit => Traits::RESETS_POINTERS,
            M::Fldcw | M::Fnstcw | M::Fnstsw | M::Fnclex | M::Fneni | M::Fndisi | M::Fnsetpm => {
                Traits::empty()
            }
            _ => Traits::POINTERS,
        };
    }
    if vectors && computes(mnemonic) {
        traits |= Traits::SIMD_FP;
    }
    traits
}

fn is_conversion(mnemonic: M) -> bool {
    let name = format!("{mnemonic:?}");
    name.starts_with("Cvt") || name.starts_with("Vcvt")
}

fn is_x87(instruction: &Instruction) -> bool {
    let op_code = instruction.op_code();
    instruction.encoding() == EncodingKind::Legacy
        && op_code.table() == iced_x86::OpCodeTableKind::Normal
        && matches!(op_code.op_code() >> if op_code.op_code() > 0xff { 8 } else { 0 }, 0xd8..=0xdf)
}

/// Whether a vector instruction rounds or can raise `#XM`: then it needs the guest's
/// MXCSR. Moves, logic, shuffles and integer arithmetic do not.
fn computes(mnemonic: M) -> bool {
    let name = format!("{mnemonic:?}").to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    const OPERATIONS: [&str; 19] = [
        "add", "addsub", "sub", "mul", "div", "min", "max", "sqrt", "cmp", "comi", "ucomi", "hadd",
        "hsub", "round", "dpp", "fmadd", "fmsub", "fnm", "cvt",
    ];
    let typed = ["ps", "pd", "ss", "sd"].iter().any(|kind| name.ends_with(kind));
    name.starts_with("cvt")
        || name.starts_with("fmadd")
        || name.starts_with("fmsub")
        || name.starts_with("fnm")
        || typed && OPERATIONS.iter().any(|operation| name.starts_with(operation))
}

/// Legacy SSE wants its 16-byte operands aligned, with exceptions; VEX does not, with
/// exceptions (SDM vol. 1, 14.9; vol. 2, tables 2-18 to 2-22).
fn required_alignment(instruction: &Instruction, size: usize) -> usize {
    match instruction.mnemonic() {
        M::Cmpxchg16b => 16,
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => size,
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu => 1,
        M::Pcmpestri
        | M::Pcmpestri64
        | M::Pcmpestrm
        | M::Pcmpestrm64
        | M::Pcmpistri
        | M::Pcmpistrm => 1,
        _ if instruction.encoding() == EncodingKind::Legacy && size == 16 => 16,
        _ => 1,
    }
}

/// iced-x86's flag bits as the CPU has them.
fn rflags(bits: u32) -> u64 {
    let pairs = [
        (RflagsBits::CF, RFlags::CF),
        (RflagsBits::PF, RFlags::PF),
        (RflagsBits::AF, RFlags::AF),
        (RflagsBits::ZF, RFlags::ZF),
        (RflagsBits::SF, RFlags::SF),
        (RflagsBits::OF, RFlags::OF),
    ];
    pairs.iter().filter(|(theirs, _)| bits & theirs != 0).map(|(_, ours)| ours.bits()).sum()
}
