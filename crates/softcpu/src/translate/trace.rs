//! Which blocks are translated together: a *trace*, the way the guest mostly goes on from a
//! hot block, as far as it stays in one page.
//!
//! Blocks are followed over direct jumps and, at conditional ones, to the side that has run
//! more often. A trace ends at what it cannot foresee, at blocks that are seldom run or have
//! translations of their own, and where it comes back to itself, which makes it a loop.
//! All of it is in one frame and one version of it, so whatever makes one of its blocks
//! stale makes all of them so.

use iced_x86::{FlowControl, Instruction};

use super::copy::Copier;
use crate::addr::{GuestVirtAddr, PAGE_SHIFT};
use crate::decode::cache::{Block, BlockCache};
use crate::decode::op::Op;
use crate::native::Plan;

/// Most instructions in a trace.
const MOST_STEPS: usize = 96;
/// Most blocks in one.
const MOST_BLOCKS: usize = 12;

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
#[derive(Debug)]
pub(super) struct Step {
    pub(super) instruction: Instruction,
    /// How it is copied, if it is.
    pub(super) plan: Option<Plan>,
    pub(super) then: Then,
}

/// Instructions that are translated together.
#[derive(Debug)]
pub(super) struct Trace {
    pub(super) steps: Vec<Step>,
    /// The ops of the steps.
    pub(super) ops: Box<[Op]>,
    /// Where it goes on behind the last step, if that does not say so itself.
    pub(super) goes_on: Option<u64>,
}

/// Makes a trace.
pub(super) struct Tracer<'a, 'b> {
    pub(super) blocks: &'a BlockCache,
    /// Those that have run at least so often are worth following.
    pub(super) warm: u32,
    /// Which filling of the code memory translations are in.
    pub(super) generation: u32,
    /// What of the vector unit may be used anyway.
    pub(super) vectors: u8,
    pub(super) copier: &'a mut Copier<'b>,
    /// Whether no other vCPU can change code unseen that was decoded at this epoch.
    pub(super) settled: &'a dyn Fn(u64) -> bool,
    /// The instructions of a block, if memory still has those that it was decoded from.
    pub(super) decode: &'a dyn Fn(&Block) -> Option<Vec<Instruction>>,
}

impl<'a> Tracer<'a, '_> {
    /// The trace that begins with `head`. `None` if its code is not what it was.
    pub(super) fn from(&mut self, head: &'a Block) -> Option<Trace> {
        let mut steps: Vec<Step> = Vec::new();
        let mut ops: Vec<Op> = Vec::new();
        let mut rips: Vec<u64> = Vec::new();
        let mut vectors = 0;
        let mut goes_on = None;
        let mut blocks = 0_usize;
        let mut next = Some(head);
        while let Some(block) = next.take() {
            let Some(instructions) = (self.decode)(block) else {
                if steps.is_empty() {
                    return None;
                }
                goes_on = Some(block.rip);
                break;
            };
            let plans: Vec<_> = instructions.iter().map(|it| self.copier.plan(it).ok()).collect();
            let pairs = instructions.iter().zip(&plans);
            let need = pairs.fold(0, |need, (it, plan)| need | super::copy::vector_need(it, plan));
            if steps.is_empty() {
                vectors = need | self.vectors;
            }
            let too_long = steps.len().saturating_add(instructions.len()) > MOST_STEPS;
            if need & !vectors != 0 || too_long && !steps.is_empty() {
                goes_on = Some(block.rip);
                break;
            }
            blocks = blocks.saturating_add(1);
            for ((instruction, plan), op) in instructions.into_iter().zip(plans).zip(&block.ops) {
                rips.push(op.rip);
                steps.push(Step { instruction, plan, then: Then::Next });
                ops.push(*op);
            }
            let (Some(step), Some(op)) = (steps.last_mut(), ops.last()) else { return None };
            // What ends a block without a jump has one more op, which goes on.
            let tail = block.ops.last().filter(|last| last.len == 0);
            let (then, onwards) = if let Some(tail) = tail {
                (Then::Next, Some(tail.imm))
            } else {
                self.onwards(&step.instruction, op, head, &rips)
            };
            step.then = then;
            let Some(onwards) = onwards else { break };
            next = self.follow(head, onwards, &rips).filter(|_| blocks < MOST_BLOCKS);
            if next.is_none() {
                goes_on = Some(onwards);
            }
        }
        (!steps.is_empty()).then(|| Trace { steps, ops: ops.into_boxed_slice(), goes_on })
    }

    /// What comes after the branch `it`, and where the trace goes on, if it does.
    fn onwards(
        &self,
        it: &Instruction,
        op: &Op,
        head: &Block,
        rips: &[u64],
    ) -> (Then, Option<u64>) {
        let canonical = GuestVirtAddr(op.imm).is_canonical();
        match it.flow_control() {
            FlowControl::UnconditionalBranch if it.is_jmp_short_or_near() && canonical => {
                (Then::Followed, Some(op.imm))
            }
            FlowControl::ConditionalBranch if it.is_jcc_short_or_near() && canonical => {
                let (taken, next) = (op.imm, op.next_rip());
                let weight = |rip| match self.follow(head, rip, rips) {
                    Some(block) => block.runs.get(),
                    None => 0,
                };
                // A jump back into the trace is a loop's: what follows is behind it.
                if rips.contains(&taken) || weight(taken) <= weight(next) {
                    (Then::Unless { taken: true, exit: taken }, Some(next))
                } else {
                    (Then::Unless { taken: false, exit: next }, Some(taken))
                }
            }
            _ => (Then::Last, None),
        }
    }

    /// The block at `rip`, if a trace from `head` goes on with it.
    fn follow(&self, head: &Block, rip: u64, rips: &[u64]) -> Option<&'a Block> {
        if rip >> PAGE_SHIFT != head.rip >> PAGE_SHIFT || rips.contains(&rip) {
            return None;
        }
        let block = self.blocks.get(BlockCache::slot(rip))?;
        let alike = block.linear == rip
            && block.rip == rip
            && block.size == head.size
            && block.frame == head.frame
            && block.version == head.version
            && block.tail.is_none()
            && block.unsettled.as_ref().is_none_or(|unsettled| (self.settled)(unsettled.epoch));
        let translated = block.entry.get().is_some_and(|it| it.generation == self.generation);
        (alike && !translated && block.runs.get() >= self.warm).then_some(block)
    }
}
