//! Which blocks are translated together: a *trace*, the way the guest mostly goes on from a
//! hot block, as far as it stays in one page.
//!
//! Blocks are followed over direct jumps and, at conditional ones, to the side that has run
//! more often. A trace ends at what it cannot foresee, at blocks that are seldom run or have
//! translations of their own, and where it comes back to itself, which makes it a loop.
//! All of it is in one frame and one version of it, so whatever makes one of its blocks
//! stale makes all of them so.

use iced_x86::{Code, Instruction};

use super::copy::{Copier, vector_need};
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

/// A block on the way, and what comes after it.
struct Part<'a> {
    block: &'a Block,
    then: Then,
    /// Where the guest goes on, if that is not for the block's last instruction to say.
    onwards: Option<u64>,
}

impl<'a> Tracer<'a, '_> {
    /// The trace that begins with `head`. `None` if its code is not what it was.
    pub(super) fn from(&mut self, head: &'a Block) -> Option<Trace> {
        let mut trace = Trace { steps: Vec::new(), ops: Box::default(), goes_on: None };
        let mut ops: Vec<Op> = Vec::new();
        let mut vectors = self.vectors;
        for part in self.way(head) {
            let block = part.block;
            trace.goes_on = Some(block.rip);
            let Some(instructions) = (self.decode)(block) else { break };
            let plans: Vec<_> = instructions.iter().map(|it| self.copier.plan(it).ok()).collect();
            let pairs = instructions.iter().zip(&plans);
            let need = pairs.fold(0, |need, (it, plan)| need | vector_need(it, plan));
            let first = trace.steps.is_empty();
            if first {
                vectors |= need;
            }
            let too_long = trace.steps.len().saturating_add(instructions.len()) > MOST_STEPS;
            if need & !vectors != 0 || too_long && !first {
                break;
            }
            for ((instruction, plan), op) in instructions.into_iter().zip(plans).zip(&block.ops) {
                trace.steps.push(Step { instruction, plan, then: Then::Next });
                ops.push(*op);
            }
            trace.steps.last_mut()?.then = part.then;
            trace.goes_on = part.onwards;
        }
        trace.ops = ops.into_boxed_slice();
        (!trace.steps.is_empty()).then_some(trace)
    }

    /// The blocks that the guest mostly takes from `head` on.
    fn way(&self, head: &'a Block) -> Vec<Part<'a>> {
        let mut parts: Vec<Part<'a>> = Vec::new();
        let mut rips: Vec<u64> = Vec::new();
        // How many of the parts are in a loop, or before one.
        let mut looping = 0;
        let mut next = Some(head);
        while let Some(block) = next.take() {
            rips.extend(block.ops.iter().filter(|op| op.len != 0).map(|op| op.rip));
            let (then, onwards) = self.onwards(block, &rips);
            let onwards_again = onwards.is_some_and(|onwards| rips.contains(&onwards));
            let exit_again = matches!(then, Then::Unless { exit, .. } if rips.contains(&exit));
            parts.push(Part { block, then, onwards });
            if onwards_again || exit_again {
                looping = parts.len();
            }
            if let Some(onwards) = onwards
                && !onwards_again
                && parts.len() < MOST_BLOCKS
            {
                next = self.warm(head, onwards);
            }
        }
        // What has a translation of its own is gone to, not translated again; but a loop
        // is better whole.
        let own = parts.iter().skip(looping.max(1)).position(|part| self.is_translated(part.block));
        if let Some(own) = own {
            parts.truncate(own.saturating_add(looping.max(1)));
        }
        parts
    }

    /// What comes after `block`, and where the guest mostly goes on, if that is known.
    fn onwards(&self, block: &Block, rips: &[u64]) -> (Then, Option<u64>) {
        let Some(op) = block.ops.last() else { return (Then::Last, None) };
        // What ends a block without a jump has one more op, which goes on.
        if op.len == 0 {
            return (Then::Next, Some(op.imm));
        }
        let mut it = Instruction::default();
        it.set_code(Code::try_from(usize::from(op.code)).unwrap_or_default());
        if !GuestVirtAddr(op.imm).is_canonical() {
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
        block.entry.get().is_some_and(|entry| entry.generation == self.generation)
    }

    /// The block at `rip`, if it has run a few times and can be translated with `head`.
    fn warm(&self, head: &Block, rip: u64) -> Option<&'a Block> {
        if rip >> PAGE_SHIFT != head.rip >> PAGE_SHIFT {
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
        (alike && block.runs.get() >= self.warm).then_some(block)
    }
}
