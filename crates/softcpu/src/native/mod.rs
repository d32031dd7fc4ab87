//! Instructions that the host CPU executes for the guest.
//!
//! The host has the same instruction set, so it knows better than any re-implementation
//! what `fsincos` or `vpmaddubsw` do. For each distinct instruction (registers and
//! immediates, but not the memory operand's address) a small stub is generated once
//! (`emit`), which all vCPUs of a machine share (`stubs`); handlers in `exec` check mode bits,
//! find the memory operand and call it.
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
mod stubs;
mod x87_env;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use iced_x86::Instruction;

use arena::Entry;
use classify::Needs;
pub use classify::Refused;
pub(crate) use classify::{Plan, Traits, Use, normalise, plan, without_prefix};
use features::FeatureSet;
pub(crate) use special::{is_hint, is_special};
use stubs::Maker;
pub use stubs::Stubs;

use crate::decode::op::{Handler, OpFlags};
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
    /// More of `Op::flags`.
    pub(crate) flags: OpFlags,
}

impl Lowered {
    /// Without a stub.
    const fn in_rust(run: Handler, imm: u64) -> Self {
        Self { run, imm, flags: OpFlags::empty() }
    }
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

/// Bytes of a vCPU's own stubs.
const OWN_ROOM: usize = 1 << 20;

/// The stubs that one vCPU uses: those that it shares, and its own for when those are full.
pub(crate) struct NativeCache {
    shared: Arc<Stubs>,
    own: Own,
}

/// Stubs of a vCPU's own. Their code memory is there from the start: later the process may not
/// have any more.
struct Own {
    maker: Maker,
    stubs: Vec<Stub>,
}

impl std::fmt::Debug for NativeCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NativeCache")
            .field("shared", &self.shared)
            .field("own", &self.own.stubs.len())
            .finish()
    }
}

impl NativeCache {
    /// One that uses `shared`, with none of its own yet.
    ///
    /// # Errors
    /// The host's, when it refuses code memory.
    pub(crate) fn new(shared: Arc<Stubs>) -> io::Result<Self> {
        Ok(Self { shared, own: Own { maker: Maker::new(OWN_ROOM)?, stubs: Vec::new() } })
    }

    /// Those that are not its own.
    pub(crate) fn shared(&self) -> &Arc<Stubs> {
        &self.shared
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
    /// [`Refused::Full`] asks for [`NativeCache::reset_own`]; any other reason is final. The
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
        let (number, flags) = match self.shared.number(&key, features) {
            Err(Refused::Full) => (self.own.number(&key, features)?, OpFlags::OWN_STUB),
            number => (number?, OpFlags::empty()),
        };
        let stub = self.stub(number, flags).ok_or(Refused::Full)?;
        let mut imm = u64::from(number);
        if stub.traits.contains(Traits::POINTERS) {
            imm |= u64::from(x87_env::fop(bytes)) << 32;
        }
        Ok(Lowered { run: exec::handler(stub), imm, flags })
    }

    /// The stub that an op with `flags` names by `number`.
    #[inline(always)]
    fn stub(&self, number: u32, flags: OpFlags) -> Option<&Stub> {
        if flags.contains(OpFlags::OWN_STUB) {
            self.own.get(number)
        } else {
            self.shared.get(number)
        }
    }

    /// Forgets the vCPU's own stubs. No op that names one may be run afterwards: the caller
    /// empties the block cache.
    pub(crate) fn reset_own(&mut self) {
        self.own.maker.clear();
        self.own.stubs.clear();
    }
}

impl Own {
    #[cold]
    #[inline(never)]
    fn get(&self, number: u32) -> Option<&Stub> {
        self.stubs.get(number as usize)
    }

    #[cold]
    fn number(&mut self, key: &Instruction, features: &FeatureSet) -> Result<u32, Refused> {
        self.maker.number(key, features, |_, stub| self.stubs.push(stub))
    }
}
