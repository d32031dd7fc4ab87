//! Instructions of the lifted units that need no stub: hints, cache-line flushes,
//! register clearing, and the table of those done in Rust elsewhere.

use iced_x86::{Code, CpuidFeature as F, Instruction, Mnemonic as M};

use super::classify::{Refused, Traits, has_memory, offered};
use super::exec::{require, x87_error};
use super::features::FeatureSet;
use super::{Lowered, masked, x87_env};
use crate::decode::op::{Handler, Op, OpFlags};
use crate::exception::Exception;
use crate::mmu::Access;
use crate::state::control::Cr0;
use crate::system::xsave;
use crate::vcpu::{Step, Vcpu};

/// How `instruction` is run without a stub, or `None` if it wants one.
pub(super) fn lower(
    instruction: &Instruction,
    features: &FeatureSet,
) -> Result<Option<Lowered>, Refused> {
    // Encodings that were no-operations before they got a meaning, and still are on
    // CPUs (or for systems) that do not use it: they are never refused.
    if is_hint(instruction) {
        return Ok(Some(Lowered::in_rust(hint, 0)));
    }
    if let Some(lowered) = masked::lower(instruction)? {
        offered(instruction, features)?;
        return Ok(Some(lowered));
    }
    let run: Handler = match instruction.code() {
        Code::Wait => wait,
        Code::VEX_Vzeroupper => vzero::<false>,
        Code::VEX_Vzeroall => vzero::<true>,
        Code::Fnstenv_m14byte => x87_env::fnstenv::<14>,
        Code::Fnstenv_m28byte => x87_env::fnstenv::<28>,
        Code::Fldenv_m14byte => x87_env::fldenv::<14>,
        Code::Fldenv_m28byte => x87_env::fldenv::<28>,
        Code::Fnsave_m94byte => x87_env::fnsave::<94>,
        Code::Fnsave_m108byte => x87_env::fnsave::<108>,
        Code::Frstor_m94byte => x87_env::frstor::<94>,
        Code::Frstor_m108byte => x87_env::frstor::<108>,
        Code::Fxsave_m512byte => xsave::fxsave::<false>,
        Code::Fxsave64_m512byte => xsave::fxsave::<true>,
        Code::Fxrstor_m512byte => xsave::fxrstor::<false>,
        Code::Fxrstor64_m512byte => xsave::fxrstor::<true>,
        Code::Xsave_mem => xsave::xsave::<false>,
        Code::Xsave64_mem => xsave::xsave::<true>,
        Code::Xsaveopt_mem => xsave::xsaveopt::<false>,
        Code::Xsaveopt64_mem => xsave::xsaveopt::<true>,
        Code::Xsavec_mem => xsave::xsavec::<false>,
        Code::Xsavec64_mem => xsave::xsavec::<true>,
        Code::Xrstor_mem => xsave::xrstor::<false>,
        Code::Xrstor64_mem => xsave::xrstor::<true>,
        Code::Ldmxcsr_m32 => xsave::ldmxcsr::<false>,
        Code::VEX_Vldmxcsr_m32 => xsave::ldmxcsr::<true>,
        Code::Stmxcsr_m32 => xsave::stmxcsr::<false>,
        Code::VEX_Vstmxcsr_m32 => xsave::stmxcsr::<true>,
        Code::Clflush_m8 | Code::Clflushopt_m8 | Code::Clwb_m8 => flush_line,
        _ => return Ok(None),
    };
    offered(instruction, features)?;
    Ok(Some(Lowered::in_rust(run, 0)))
}

/// Whether `instruction` is done in Rust: masked, or with state of its own.
pub(crate) fn is_special(instruction: &Instruction, features: &FeatureSet) -> bool {
    !matches!(lower(instruction, features), Ok(None))
}

/// Whether `instruction` is a prefetch or does nothing at all.
pub(crate) fn is_hint(instruction: &Instruction) -> bool {
    let memory = has_memory(instruction);
    match instruction.mnemonic() {
        M::Nop
        | M::Reservednop
        | M::Pause
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq
        | M::Cldemote => true,
        M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchit0
        | M::Prefetchit1 => memory,
        _ => instruction.op_code().is_nop() && instruction.cpuid_features() != [F::FPU],
    }
}

/// Prefetches and no-operations: their operand, if any, is not even looked at.
fn hint(_: &mut Vcpu, _: &Op) -> Step {
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT, CLWB: memory is coherent, so all that is left of them is that
/// they fault as a load does.
fn flush_line(cpu: &mut Vcpu, op: &Op) -> Step {
    let addr = cpu.linear(op, 1, Access::Read)?;
    cpu.in_place(addr, 1, Access::Read).map(|_| ())
}

/// FWAIT: TS counts only together with MP (SDM vol. 3, 2.5).
fn wait(cpu: &mut Vcpu, _: &Op) -> Step {
    if cpu.state.cr0.contains(Cr0::MP | Cr0::TS) {
        return Err(cpu.raise(Exception::device_not_available()));
    }
    if cpu.state.fpu.pending() { Err(x87_error(cpu)) } else { Ok(()) }
}

/// VZEROUPPER, VZEROALL: eight registers outside 64-bit mode, sixteen inside.
fn vzero<const ALL: bool>(cpu: &mut Vcpu, op: &Op) -> Step {
    require(cpu, Traits::VEX | Traits::AVX)?;
    let count = if op.flags.contains(OpFlags::LEGACY) { 8 } else { 16 };
    for register in cpu.state.vec.iter_mut().take(count) {
        if ALL {
            register.0 = [0; 4];
        } else {
            register.clear_upper();
        }
    }
    Ok(())
}
