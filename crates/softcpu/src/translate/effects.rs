//! What the steps of a trace do to flags and registers, and so whether anybody still wants what
//! there is of them.

use iced_x86::{Instruction, Register as R};

use super::block::Block;
use super::copy::Copying;
use super::privileged::Touches;
use super::registers::GprSet;
use super::shapes::How;
use super::stack::{RBP, RSP, StackUse};
use super::trace::{Step, Then, Trace};
use super::x87;
use crate::decode::op::Op;

/// What translating a step may do to flags and registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effects {
    /// It must find the flags as they are: it reads them, or may fault or leave.
    pub(super) wants: bool,
    /// It makes all of them.
    makes: bool,
    /// It sets the x87 unit's FIP and FOP.
    sets_pointers: bool,
    /// Guest registers it changes.
    writes: GprSet,
    /// The step it goes on with, if it is in the trace.
    next: Option<u16>,
}

impl Effects {
    const ANYTHING: Self =
        Self { wants: true, makes: false, sets_pointers: false, writes: GprSet::ALL, next: None };

    /// Those of all steps of `trace`, into `effects`.
    pub(super) fn of_all(trace: &Trace, effects: &mut Vec<Self>) {
        effects.clear();
        effects.extend(trace.steps.iter().zip(&trace.ops).enumerate().map(|(n, (step, op))| {
            let next = match (step.onwards, step.then) {
                (_, Then::Last) => None,
                (Some(onwards), _) => trace.step_at(onwards),
                (None, _) => Some(n.saturating_add(1)),
            };
            let next = next.and_then(|next| u16::try_from(next).ok());
            Self { next, ..Self::of(step, op) }
        }));
    }

    fn of(step: &Step, op: &Op) -> Self {
        match step.then {
            Then::Next => step.shape.effects,
            // One backwards looks for events, and may leave.
            Then::Followed => {
                Self { wants: op.imm <= op.rip, writes: GprSet::NONE, ..Self::ANYTHING }
            }
            Then::Unless { .. } => Self { writes: GprSet::NONE, ..Self::ANYTHING },
            Then::Last => Self::ANYTHING,
        }
    }

    /// Those of an instruction that is done like that, if the next one follows it.
    pub(super) fn of_shape(how: &How, it: &Instruction) -> Self {
        let only = |register: R| GprSet::of(register.full_register().number() as u8);
        let stack = GprSet::of(RSP);
        match how {
            How::Stack(StackUse::Pop, _) => {
                Self { writes: stack.or(only(it.op0_register())), ..Self::ANYTHING }
            }
            How::Stack(StackUse::Leave, _) => {
                Self { writes: stack.or(GprSet::of(RBP)), ..Self::ANYTHING }
            }
            How::Stack(..) => Self { writes: stack, ..Self::ANYTHING },
            How::String(string) => {
                Self { makes: string.makes_flags(), writes: string.writes(), ..Self::ANYTHING }
            }
            How::Lea => Self { wants: false, writes: only(it.op0_register()), ..Self::ANYTHING },
            How::ZeroUpper | How::Nothing => {
                Self { wants: false, writes: GprSet::NONE, ..Self::ANYTHING }
            }
            How::X87Control => Self { writes: GprSet::NONE, ..Self::ANYTHING },
            How::Privileged(Touches { flags, registers }) => {
                Self { wants: *flags, writes: *registers, ..Self::ANYTHING }
            }
            How::Copied(copying) => {
                let Copying { flags, access, .. } = copying;
                Self {
                    wants: flags.reads || access.is_some(),
                    makes: !flags.reads && !flags.leaves,
                    sets_pointers: x87::sets_pointers(copying),
                    writes: copying.written,
                    next: None,
                }
            }
            How::Divide | How::Other => Self::ANYTHING,
        }
    }
}

impl Block<'_> {
    /// The guest registers that step `n` may change.
    pub(super) fn writes_of(&self, n: usize) -> GprSet {
        self.effects.get(n).map_or(GprSet::ALL, |effects| effects.writes)
    }

    /// Whether some step changes guest register `number`, or may.
    pub(super) fn writes(&self, number: u8) -> bool {
        self.effects.iter().any(|effects| effects.writes.has(number))
    }

    /// The step that step `n` goes on with, if it is in the trace.
    pub(super) fn step_behind(&self, n: usize) -> Option<usize> {
        self.effects.get(n)?.next.map(usize::from)
    }

    /// Whether somebody may want the flags that step `n` finds.
    pub(super) fn wanted_from(&self, n: Option<usize>) -> bool {
        let mut at = n;
        for _ in 0..self.effects.len() {
            let Some(effects) = at.and_then(|n| self.effects.get(n)) else { return true };
            if effects.wants {
                return true;
            }
            if effects.makes {
                return false;
            }
            at = effects.next.map(usize::from);
        }
        true
    }

    /// Whether making the flags again when they are wanted is better than keeping them now:
    /// their makings must last until they are wanted no more.
    pub(super) fn worth_deferring(&self) -> bool {
        let Some(producer) = &self.producer else { return false };
        let mut lost = false;
        let mut at = Some(self.step);
        for _ in 0..self.effects.len() {
            let Some(effects) = at.and_then(|n| self.effects.get(n)) else { break };
            if lost && effects.wants {
                return false;
            }
            if effects.makes {
                return true;
            }
            lost |= effects.writes.meets(producer.reads);
            at = effects.next.map(usize::from);
        }
        !lost
    }

    /// Whether the next step is sure to come next, and sets the x87 unit's FIP and FOP.
    pub(super) fn sets_pointers_next(&self) -> bool {
        let next =
            self.step.checked_add(1).filter(|next| self.step_behind(self.step) == Some(*next));
        next.and_then(|next| self.effects.get(next)).is_some_and(|effects| effects.sets_pointers)
    }

    /// Whether somebody may want the flags that the step leaves.
    pub(super) fn wants_flags_later(&self) -> bool {
        self.wanted_from(self.step_behind(self.step))
    }
}
