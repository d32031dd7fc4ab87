//! What is translated together: a *trace*, instruction by instruction, with what comes after each.
//! It is made of a [`Route`] through the guest's blocks, by whoever translates it.

use iced_x86::Instruction;

use super::mode::{CodeSegment, Mode};
use super::route::Route;
use super::shapes::{Shape, Shapes};
use crate::decode::op::Op;
use crate::native::features::FeatureSet;

/// Most instructions in a trace.
const MOST_STEPS: usize = 160;

/// What comes after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The next one, which is the one behind it.
    Next,
    /// The next one, which is where it jumps to.
    Followed,
    /// The next one, or another place: a conditional jump.
    Unless {
        /// Leaves the trace if the condition holds (or else if it does not).
        taken: bool,
        /// Where it goes then.
        exit: u64,
    },
    /// Whatever it says: the trace ends.
    Last,
}

/// One instruction of a trace.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// As it is copied, if it is; else as the guest has it.
    pub(super) instruction: Instruction,
    pub(super) shape: Shape,
    pub(super) then: Then,
    /// Where the trace goes on behind it, if that is not the next step and nothing that the
    /// instruction says itself.
    pub(super) onwards: Option<u64>,
}

impl Step {
    /// Where it may go on besides the next step, as far as it does not say so itself.
    pub(super) fn goes_to(&self) -> impl Iterator<Item = u64> + use<> {
        let exit = match self.then {
            Then::Unless { exit, .. } => Some(exit),
            _ => None,
        };
        exit.into_iter().chain(self.onwards)
    }
}

/// Instructions that are translated together.
#[derive(Clone, Debug, Default)]
pub(super) struct Trace {
    pub(super) steps: Vec<Step>,
    /// The ops of the steps.
    pub(super) ops: Vec<Op>,
    /// The mode that it is for, and where its code is.
    pub(super) mode: Mode,
    pub(super) segment: CodeSegment,
}

impl Trace {
    /// The trace that `route` becomes, in the memory of `spare`. `None` if its code was changing
    /// when it was copied.
    pub(super) fn of(
        route: &Route,
        shapes: &mut Shapes,
        features: &FeatureSet,
        spare: Self,
    ) -> Option<Self> {
        let Self { mut steps, mut ops, .. } = spare;
        steps.clear();
        ops.clear();
        let mut vectors = route.vectors;
        let mut lost = false;
        let mut decoder = route.decoder();
        for leg in route.legs() {
            let first = steps.is_empty();
            // What comes after a part that has no place is lost too, unless one that has jumps
            // there.
            let goes_to =
                |step: &Step| matches!(step.then, Then::Unless { exit, .. } if exit == leg.rip);
            lost = if leg.begins { !first && !steps.iter().any(goes_to) } else { lost };
            if lost {
                continue;
            }
            lost = true;
            let before = steps.len();
            if before.saturating_add(leg.ops.len()) > MOST_STEPS && !first {
                continue;
            }
            let mut need = 0;
            let decoded = leg.decode(&mut decoder, |mut instruction| {
                let shape = shapes.of(&mut instruction, features);
                need |= shape.need;
                steps.push(Step { instruction, shape, then: Then::Next, onwards: None });
            });
            if !decoded {
                steps.truncate(before);
                continue;
            }
            if first {
                vectors |= need;
            }
            if need & !vectors != 0 {
                steps.truncate(before);
                continue;
            }
            lost = false;
            ops.extend(leg.ops);
            let last = steps.last_mut()?;
            (last.then, last.onwards) = (leg.then, leg.onwards);
        }
        for (step, next) in steps.iter_mut().zip(ops.iter().skip(1)) {
            step.onwards = step.onwards.filter(|onwards| *onwards != next.rip);
        }
        (!steps.is_empty()).then_some(Self { steps, ops, mode: route.mode, segment: route.segment })
    }

    /// Bytes of guest code in it.
    pub(super) fn bytes(&self) -> u64 {
        self.ops.iter().map(|op| u64::from(op.len)).sum()
    }

    /// The number of the step at `rip`.
    pub(super) fn step_at(&self, rip: u64) -> Option<usize> {
        self.ops.iter().position(|op| op.rip == rip)
    }

    /// The steps that a jump backwards in the trace goes over, from its target on.
    pub(super) fn loops(&self) -> impl Iterator<Item = std::ops::RangeInclusive<usize>> {
        self.steps.iter().enumerate().flat_map(|(n, step)| {
            step.goes_to()
                .filter_map(|rip| self.step_at(rip))
                .filter(move |to| *to <= n)
                .map(move |to| to..=n)
        })
    }
}
