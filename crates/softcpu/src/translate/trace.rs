//! Which blocks are translated together: a *trace*, the way the guest mostly goes on from a
//! hot block, and what leaves it and has been run too, as far as all of it lies in one page.
//!
//! Blocks are followed over direct jumps and, at conditional ones, to the side that has run
//! more often. A way ends at what it cannot foresee, at blocks that are seldom run or have
//! translations of their own, and where it comes back to the trace. The other sides of its
//! conditional jumps are followed then, one after the other: so loops have their branches in
//! them, and both arms of a condition meet again without leaving.
//! All of it is in one frame and one version of it, so whatever makes one of its blocks
//! stale makes all of them so.

use iced_x86::{Code, Instruction};

use super::cache::Entry;
use super::copy::vector_need;
use super::mode::{CodeSegment, Mode};
use super::plans::{Known, Plans};
use crate::decode::cache::{Block, BlockCache};
use crate::decode::op::Op;
use crate::native::Plan;
use crate::native::features::FeatureSet;

/// Most instructions in a trace.
const MOST_STEPS: usize = 160;
/// Most blocks in one, of which so many may be on its first way.
const MOST_BLOCKS: usize = 24;
const FIRST_WAY: usize = 12;

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
    pub(super) instruction: Instruction,
    pub(super) known: Known,
    pub(super) then: Then,
    /// Where the trace goes on behind it, if that is not the next step and nothing that the
    /// instruction says itself.
    pub(super) onwards: Option<u64>,
}

impl Step {
    /// How it is copied, if it is.
    pub(super) fn plan(&self) -> Option<&Plan> {
        self.known.plan()
    }

    /// Whether it does nothing that a guest can see.
    pub(super) fn is_nothing(&self) -> bool {
        matches!(self.known, Known::Nothing)
    }

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

/// Makes a trace.
pub(super) struct Tracer<'a> {
    pub(super) blocks: &'a BlockCache,
    /// Those that have run at least so often are worth following.
    pub(super) warm: u32,
    /// It is worth following all sides.
    pub(super) hot: bool,
    /// What of the vector unit may be used anyway.
    pub(super) vectors: u8,
    /// The mode that code is in, and where it is.
    pub(super) mode: Mode,
    pub(super) segment: CodeSegment,
    pub(super) plans: &'a mut Plans,
    pub(super) features: &'a FeatureSet,
    /// Whether a translation is still there.
    pub(super) is_there: &'a dyn Fn(Entry) -> bool,
    /// Whether no other vCPU can change code unseen that was decoded at this epoch.
    pub(super) settled: &'a dyn Fn(u64) -> bool,
    /// Finds the instructions of a block, if memory still has those that it was decoded from.
    pub(super) decode: &'a dyn Fn(&Block, &mut Vec<Instruction>) -> bool,
}

/// A block on the way, and what comes after it.
struct Part<'a> {
    block: &'a Block,
    then: Then,
    /// Where the guest goes on, if that is not for the block's last instruction to say.
    onwards: Option<u64>,
    /// It begins a way: the part before it does not come here.
    begins: bool,
}

impl<'a> Tracer<'a> {
    /// The trace that begins with `head`, in the memory of `spare`. `None` if its code is not
    /// what it was.
    pub(super) fn from(&mut self, head: &'a Block, spare: Trace) -> Option<Trace> {
        let Trace { mut steps, mut ops, .. } = spare;
        steps.clear();
        ops.clear();
        let mut instructions = Vec::with_capacity(MOST_STEPS / 4);
        let mut vectors = self.vectors;
        let mut lost = false;
        for part in self.ways(head) {
            let block = part.block;
            let first = steps.is_empty();
            // What comes after a part that has no place is lost too, unless one that has jumps
            // there.
            let goes_to =
                |step: &Step| matches!(step.then, Then::Unless { exit, .. } if exit == block.rip);
            lost = if part.begins { !first && !steps.iter().any(goes_to) } else { lost };
            if lost {
                continue;
            }
            lost = true;
            if !(self.decode)(block, &mut instructions) {
                continue;
            }
            let before = steps.len();
            if before.saturating_add(instructions.len()) > MOST_STEPS && !first {
                continue;
            }
            let mut need = 0;
            steps.extend(instructions.iter().map(|instruction| {
                let known = self.plans.known(instruction, self.features);
                need |= vector_need(instruction, known.plan());
                Step { instruction: *instruction, known, then: Then::Next, onwards: None }
            }));
            if first {
                vectors |= need;
            }
            if need & !vectors != 0 {
                steps.truncate(before);
                continue;
            }
            lost = false;
            ops.extend(self.blocks.ops(block).iter().take(instructions.len()));
            let last = steps.last_mut()?;
            (last.then, last.onwards) = (part.then, part.onwards);
        }
        for (step, next) in steps.iter_mut().zip(ops.iter().skip(1)) {
            step.onwards = step.onwards.filter(|onwards| *onwards != next.rip);
        }
        (!steps.is_empty()).then_some(Trace { steps, ops, mode: self.mode, segment: self.segment })
    }

    /// The blocks that the guest takes from `head` on: first those that it mostly does.
    fn ways(&self, head: &'a Block) -> Vec<Part<'a>> {
        let mut parts: Vec<Part<'a>> = Vec::with_capacity(FIRST_WAY);
        let mut rips: Vec<u64> = Vec::with_capacity(MOST_STEPS / 4);
        self.follow(head, FIRST_WAY, &mut parts, &mut rips);
        let mut at = 0;
        while let Some(part) = parts.get(at)
            && self.hot
            && parts.len() < MOST_BLOCKS
        {
            at = at.saturating_add(1);
            if let Then::Unless { exit, .. } = part.then
                && !rips.contains(&exit)
                && let Some(side) = self.warm(head, exit)
                && !side.is_hollow()
            {
                self.follow(side, MOST_BLOCKS, &mut parts, &mut rips);
            }
        }
        parts
    }

    /// Puts the blocks behind `parts` that the guest mostly takes from `head` on, until there
    /// are `most`; `rips` are where the instructions of `parts` are.
    fn follow(&self, head: &'a Block, most: usize, parts: &mut Vec<Part<'a>>, rips: &mut Vec<u64>) {
        let begin = parts.len();
        // How many of the parts come back to the trace, or are before one that does.
        let mut returning = if begin == 0 { 1 } else { begin };
        let mut next = Some(head);
        while let Some(block) = next.take() {
            rips.extend(self.blocks.ops(block).iter().filter(|op| op.len != 0).map(|op| op.rip));
            let (then, onwards) = self.onwards(block, rips);
            let onwards_again = onwards.is_some_and(|onwards| rips.contains(&onwards));
            let exit_again = matches!(then, Then::Unless { exit, .. } if rips.contains(&exit));
            parts.push(Part { block, then, onwards, begins: parts.len() == begin });
            if onwards_again || exit_again {
                returning = parts.len();
            }
            if let Some(onwards) = onwards
                && !onwards_again
                && parts.len() < most
            {
                next = self.warm(head, onwards).filter(|block| !block.is_hollow());
            }
        }
        // What has a translation of its own is gone to, not translated again; but a loop
        // is better whole, and what is hot too.
        if self.hot {
            return;
        }
        let own = parts.iter().skip(returning).position(|part| self.is_translated(part.block));
        if let Some(own) = own {
            parts.truncate(own.saturating_add(returning));
            *rips = parts
                .iter()
                .flat_map(|part| self.blocks.ops(part.block))
                .filter(|op| op.len != 0)
                .map(|op| op.rip)
                .collect();
        }
    }

    /// What comes after `block`, and where the guest mostly goes on, if that is known.
    fn onwards(&self, block: &Block, rips: &[u64]) -> (Then, Option<u64>) {
        let Some(op) = self.blocks.ops(block).last() else { return (Then::Last, None) };
        // What ends a block without a jump has one more op, which goes on.
        if op.len == 0 {
            return (Then::Next, Some(op.imm));
        }
        let mut it = Instruction::default();
        it.set_code(Code::try_from(usize::from(op.code)).unwrap_or_default());
        // Interrupts that it lets in are looked for where it is.
        if it.code() == Code::Sti {
            return (Then::Next, Some(op.next_rip()));
        }
        if !self.segment.reaches(op.imm) {
            return (Then::Last, None);
        }
        if it.is_jmp_short_or_near() {
            return (Then::Followed, Some(op.imm));
        }
        if it.is_jcc_short_or_near() {
            let (taken, next) = (op.imm, op.next_rip());
            let weight = |rip| self.warm(block, rip).map_or(0, |block| block.runs.get());
            // A jump back into the trace is a loop's: what follows is behind it.
            return if rips.contains(&taken) || weight(taken) <= weight(next) {
                (Then::Unless { taken: true, exit: taken }, Some(next))
            } else {
                (Then::Unless { taken: false, exit: next }, Some(taken))
            };
        }
        (Then::Last, None)
    }

    fn is_translated(&self, block: &Block) -> bool {
        let entry = block.entry.get().filter(|entry| entry.mode == self.mode);
        entry.is_some_and(self.is_there)
    }

    /// The block at `rip`, if it has run a few times and can be translated with `head`.
    fn warm(&self, head: &Block, rip: u64) -> Option<&'a Block> {
        if !self.segment.in_one_page(rip, head.rip) || !self.segment.reaches(rip) {
            return None;
        }
        let linear = self.segment.linear(rip);
        let block = self.blocks.get(BlockCache::slot(linear))?;
        let alike = block.linear == linear
            && block.rip == rip
            && block.size == head.size
            && block.frame == head.frame
            && block.version == head.version
            && block.tail().is_none()
            && block.unsettled().is_none_or(|unsettled| (self.settled)(unsettled.epoch));
        (alike && block.runs.get() >= self.warm).then_some(block)
    }
}
