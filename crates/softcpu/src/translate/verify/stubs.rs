//! What is known where an instruction was interpreted instead of the code that stands for it.
//!
//! Such a stub is jumped to, gives lent registers back, calls, takes them again and goes to where
//! that code goes on. The interpreter changes the registers that the code changes, in the same
//! way: so what was known of them where the stub begins is taken to hold where it ends, and
//! only what is known behind the code itself too is left when the two meet.

use foldhash::HashMap;
use iced_x86::{Code, Instruction, Register as R};

use super::operands::field;
use super::pointers::Pointers;

#[derive(Debug)]
pub(super) struct Stubs {
    /// The fields that lent registers come from, as the beginning of the code has them.
    lent: HashMap<R, u64>,
    /// What was known where the stub began, if this may be one.
    begun: Option<Pointers>,
    /// It has called, and takes registers again.
    returning: bool,
}

/// The register that `it` loads from a field of the vCPU, and where that is.
fn loaded(it: &Instruction) -> Option<(R, u64)> {
    let loads = it.code() == Code::Mov_r64_rm64;
    field(it).filter(|_| loads).map(|at| (it.op0_register(), at))
}

impl Stubs {
    /// Those of this code.
    pub(super) fn of(code: &[Instruction]) -> Self {
        let mut lent = HashMap::default();
        for (register, field) in code.iter().filter_map(loaded) {
            lent.entry(register).or_insert(field);
        }
        Self { lent, begun: None, returning: false }
    }

    /// Some jump leads here; nothing else does, and this is known, if a stub may begin.
    pub(super) fn arrive(&mut self, known: Option<Pointers>) {
        (self.begun, self.returning) = (known, false);
    }

    /// Whether a stub may have begun.
    pub(super) fn may_have_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// Whether `it` brings a register back that was lent.
    pub(super) fn brings_back(&self, it: &Instruction) -> bool {
        let lent = |(register, field)| self.lent.get(&register) == Some(&field);
        self.returning && loaded(it).is_some_and(lent)
    }

    /// `it` changes a register of the guest's.
    pub(super) fn changes(&mut self, it: &Instruction) {
        if loaded(it).is_none() {
            self.begun = None;
        }
    }

    /// An instruction is interpreted where `now` is known: what is behind it.
    pub(super) fn interpreted(&mut self, now: Pointers) -> Pointers {
        let begun = self.begun.take();
        self.returning = begun.is_some();
        begun.unwrap_or_else(|| now.without_addends())
    }
}
