//! Instructions that the host CPU executes for the guest.
//!
//! The host has the same instruction set, so it knows better than any re-implementation
//! what `fsincos` or `vpmaddubsw` do. For each distinct instruction (registers and
//! immediates, but not the memory operand's address) a small stub is generated once
//! (`emit`); handlers in `exec` check mode bits, find the memory operand and call it.
//! What cannot be lifted that way but belongs to the same units is done in Rust: masked
//! and gathering accesses whose elements fault one by one (`masked`), x87 environments
//! that would leak host addresses (`x87_env`), hints (`special`).
//!
//! The decoder calls `NativeCache::lower` with what it has no handler for. No stub may
//! fault on the host, whatever the guest does: `classify` is the list of reasons.

mod arena;
mod classify;
mod emit;
mod exec;
pub mod features;
mod masked;
mod special;
mod x87_env;

#[cfg(test)]
mod tests;

use foldhash::HashMap;
use iced_x86::{Instruction, InstructionInfoFactory};

use arena::{Arena, Entry};
use classify::Needs;
pub use classify::Refused;
pub(crate) use classify::{Plan, Traits, Use, Uses, normalise, plan, without_prefix};
use features::FeatureSet;
pub(crate) use special::{is_hint, is_special};

use crate::decode::op::Handler;
use crate::mmu::Access;
use crate::vcpu::{Step, Vcpu};

/// How an instruction is to be run: what the decoder puts into the
/// [`Op`](crate::decode::op::Op).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lowered {
    /// For `Op::run`.
    pub(crate) run: Handler,
    /// For `Op::imm`.
    pub(crate) imm: u64,
}

/// A part of the CPU that the operating system switches on and off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// x87.
    X87,
    /// XMM registers by legacy encodings.
    Sse,
    /// XMM and YMM registers by VEX encodings.
    Avx,
}

/// Checks that `unit` is switched on: `#UD` or `#NM` if not.
pub(crate) fn require(cpu: &mut Vcpu, unit: Unit) -> Step {
    exec::require(
        cpu,
        match unit {
            Unit::X87 => Traits::X87,
            Unit::Sse => Traits::SSE,
            Unit::Avx => Traits::VEX | Traits::AVX,
        },
    )
}

/// A generated stub with all its handler must know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stub {
    entry: Entry,
    needs: Needs,
    traits: Traits,
    /// Size of the memory operand, bytes.
    size: u16,
    /// Its alignment in bytes, less one.
    align_mask: u16,
}

impl Stub {
    const fn access(&self) -> Access {
        if self.traits.contains(Traits::STORES) { Access::Write } else { Access::Read }
    }
}

/// The stubs of one vCPU.
pub(crate) struct NativeCache {
    arena: Arena,
    stubs: Vec<Stub>,
    known: HashMap<Instruction, Result<u32, Refused>>,
    factory: InstructionInfoFactory,
}

impl std::fmt::Debug for NativeCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NativeCache").field("stubs", &self.stubs.len()).finish_non_exhaustive()
    }
}

/// Refusals are remembered too; a guest that tries them all must not fill the host's
/// memory with them.
const MOST_KNOWN: usize = 1 << 14;

impl NativeCache {
    /// An empty cache with its code memory reserved.
    ///
    /// # Errors
    /// The host's, when it refuses the memory.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            arena: Arena::new()?,
            stubs: Vec::new(),
            known: HashMap::default(),
            factory: InstructionInfoFactory::new(),
        })
    }

    /// Says how to run `instruction`, whose encoding is `bytes`, for a guest that is
    /// offered `features`.
    ///
    /// The handler expects the memory operand in the op as usual, and for MASKMOVQ and
    /// MASKMOVDQU the implicit one: rDI as base with the address size's mask, and the
    /// segment (DS unless overridden). For gathers, `index` must be
    /// [`GPR_ZERO`](crate::state::GPR_ZERO); `base`, `scale`, `disp` and the mask are
    /// used as they are.
    ///
    /// # Errors
    /// [`Refused::Full`] asks for [`NativeCache::reset`]; any other reason is final. The
    /// caller then raises `#UD` (or has a handler of its own).
    pub(crate) fn lower(
        &mut self,
        instruction: &Instruction,
        bytes: &[u8],
        features: &FeatureSet,
    ) -> Result<Lowered, Refused> {
        let mut instruction = *instruction;
        instruction.set_code(classify::without_prefix(instruction.code(), features));
        if let Some(lowered) = special::lower(&instruction, features)? {
            return Ok(lowered);
        }
        let key = classify::normalise(&instruction);
        let index = match self.known.get(&key) {
            Some(known) => (*known)?,
            None => self.make(&key, features)?,
        };
        let stub = self.stubs.get(index as usize).ok_or(Refused::Full)?;
        let mut imm = u64::from(index);
        if stub.traits.contains(Traits::POINTERS) {
            imm |= u64::from(x87_env::fop(bytes)) << 32;
        }
        Ok(Lowered { run: exec::handler(stub), imm })
    }

    /// Forgets every stub. No op that names one may be run afterwards: the caller
    /// empties the block cache.
    pub(crate) fn reset(&mut self) {
        self.arena.clear();
        self.stubs.clear();
        self.known.clear();
    }

    fn make(&mut self, key: &Instruction, features: &FeatureSet) -> Result<u32, Refused> {
        if self.known.len() >= MOST_KNOWN {
            return Err(Refused::Full);
        }
        let made =
            classify::plan(key, features, &mut self.factory).and_then(|plan| self.generate(&plan));
        if made != Err(Refused::Full) {
            self.known.insert(*key, made);
        }
        made
    }

    fn generate(&mut self, plan: &Plan) -> Result<u32, Refused> {
        let code = emit::stub(plan)?;
        let index = u32::try_from(self.stubs.len()).map_err(|_| Refused::Full)?;
        // SAFETY: `emit` writes leaf functions of this convention; `classify` lets only
        // instructions through that touch nothing but their operands, all of which the
        // stub takes from the state and the memory operand.
        let entry = unsafe { self.arena.push(&code) }.map_err(|_| Refused::Full)?;
        self.stubs.push(Stub {
            entry,
            needs: Needs::of(plan.traits),
            traits: plan.traits,
            size: plan.size as u16,
            align_mask: (plan.alignment as u16).saturating_sub(1),
        });
        Ok(index)
    }
}
