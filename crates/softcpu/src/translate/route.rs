//! Which blocks are translated together: the way the guest mostly goes on from a hot block, and
//! what leaves it and has been run too, as far as all of it lies in one page.
//!
//! Blocks are followed over direct jumps and, at conditional ones, to the side that has run
//! more often. A way ends at what it cannot foresee, at blocks that are seldom run or have
//! translations of their own, at those that mean something to this vCPU only (they name stubs
//! of its own), and where it comes back to itself. The other sides of its conditional jumps
//! are followed then, one after the other: so loops have their branches in them, and both arms
//! of a condition meet again without leaving.
//! All of it is in one frame and one version of it, so whatever makes one of its blocks
//! stale makes all of them so.
//!
//! A route has all that a translation is made of, and nothing of the vCPU's: it may be given to
//! whoever has time ([`super::workshop`]).

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

use super::mode::{CodeSegment, Mode};
use super::trace::Then;
use super::translations::Entry;
use crate::decode::build::copy_block;
use crate::decode::cache::{Block, BlockCache};
use crate::decode::op::Op;

/// Most blocks on a route, of which so many may be on its first way.
const MOST_BLOCKS: usize = 24;
const FIRST_WAY: usize = 12;
/// Instructions of an ordinary one.
const USUAL: usize = 40;

/// Blocks in the order in which they are translated, with their code.
#[derive(Clone, Debug, Default)]
pub(super) struct Route {
    stops: Vec<Stop>,
    ops: Vec<Op>,
    bytes: Vec<u8>,
    /// What of the vector unit may be used anyway.
    pub(super) vectors: u8,
    /// The mode that the code is in, and where it is.
    pub(super) mode: Mode,
    pub(super) segment: CodeSegment,
    /// Bits of the code.
    pub(super) bitness: u32,
}

/// A block on a route.
#[derive(Clone, Copy, Debug)]
struct Stop {
    /// Its instructions and bytes.
    ops: usize,
    len: usize,
    then: Then,
    onwards: Option<u64>,
    begins: bool,
}

/// A block on a route, to be looked at.
pub(super) struct Leg<'a> {
    /// Where its code is, and where in the route's bytes that is.
    pub(super) rip: u64,
    at: usize,
    /// Its instructions, as the interpreter has them.
    pub(super) ops: &'a [Op],
    pub(super) then: Then,
    /// Where the guest goes on, if that is not for the block's last instruction to say.
    pub(super) onwards: Option<u64>,
    /// It begins a way: the one before it does not come here.
    pub(super) begins: bool,
}

impl Leg<'_> {
    /// Hands its instructions, as the route's `decoder` finds them, to `take`, one after the other.
    /// Says whether they are what the interpreter has.
    pub(super) fn decode(
        &self,
        decoder: &mut Decoder<'_>,
        mut take: impl FnMut(Instruction),
    ) -> bool {
        if decoder.set_position(self.at).is_err() {
            return false;
        }
        decoder.set_ip(self.rip);
        let alike = self.ops.iter().all(|op| {
            let instruction = decoder.decode();
            let alike = instruction.ip() == op.rip
                && instruction.code() as u16 == op.code
                && instruction.len() == usize::from(op.len);
            take(instruction);
            alike
        });
        alike && !self.ops.is_empty()
    }
}

impl Route {
    /// Where its code begins.
    pub(super) fn rip(&self) -> u64 {
        self.ops.first().map_or(0, |op| op.rip)
    }

    /// Decodes its blocks, for each of which it must be told where that is.
    pub(super) fn decoder(&self) -> Decoder<'_> {
        Decoder::new(self.bitness, &self.bytes, DecoderOptions::NONE)
    }

    /// Its blocks.
    pub(super) fn legs(&self) -> impl Iterator<Item = Leg<'_>> {
        let (mut ops, mut behind) = (self.ops.as_slice(), 0_usize);
        self.stops.iter().map_while(move |stop| {
            let (mine, others) = ops.split_at_checked(stop.ops)?;
            let at = behind;
            (ops, behind) = (others, behind.saturating_add(stop.len));
            let Stop { then, onwards, begins, .. } = *stop;
            Some(Leg { rip: mine.first()?.rip, at, ops: mine, then, onwards, begins })
        })
    }

    /// Where its blocks begin, the first one aside.
    pub(super) fn others(&self) -> impl Iterator<Item = u64> {
        self.legs().skip(1).map(|leg| leg.rip)
    }
}

/// How far a route goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// As far as to what has a translation of its own: it is the rest of a turn, after which all
    /// is as usual.
    Rest,
    /// The same, but it may come back to itself.
    Usual,
    /// Everywhere, to all sides.
    Hot,
}

/// Finds routes.
pub(super) struct Router<'a> {
    pub(super) blocks: &'a BlockCache,
    /// Those that have run at least so often are worth following.
    pub(super) warm: u32,
    pub(super) extent: Extent,
    /// What of the vector unit may be used anyway.
    pub(super) vectors: u8,
    /// The mode that code is in, and where it is.
    pub(super) mode: Mode,
    pub(super) segment: CodeSegment,
    /// Whether a translation is still there.
    pub(super) is_there: &'a dyn Fn(Entry) -> bool,
    /// Whether no other vCPU can change code unseen that was decoded at this epoch.
    pub(super) settled: &'a dyn Fn(u64) -> bool,
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

impl<'a> Router<'a> {
    /// The route that begins with `head`, in the memory of `route`. The code is in the page at
    /// `host`, and for a block that goes on in another in the one at `tail_host`.
    pub(super) fn find(
        &self,
        head: &'a Block,
        (host, tail_host): (u64, Option<u64>),
        route: &mut Route,
    ) {
        let Route { stops, ops, bytes, .. } = route;
        stops.clear();
        ops.clear();
        bytes.clear();
        for Part { block, then, onwards, begins } in self.ways(head) {
            let (first, before) = (ops.len(), bytes.len());
            ops.extend(self.blocks.ops(block).iter().filter(|op| op.len != 0));
            let ops = ops.get(first..).unwrap_or_default();
            let len = ops.iter().map(|op| usize::from(op.len)).sum();
            let tail_host = tail_host.filter(|_| block.tail().is_some());
            copy_block(block, len, host, tail_host, bytes);
            let len = bytes.len().saturating_sub(before);
            stops.push(Stop { ops: ops.len(), len, then, onwards, begins });
        }
        (route.vectors, route.mode, route.segment) = (self.vectors, self.mode, self.segment);
        route.bitness = head.size as u32;
    }

    /// The blocks that the guest takes from `head` on: first those that it mostly does.
    fn ways(&self, head: &'a Block) -> Vec<Part<'a>> {
        let mut parts: Vec<Part<'a>> = Vec::with_capacity(FIRST_WAY);
        let mut rips: Vec<u64> = Vec::with_capacity(USUAL);
        self.follow(head, FIRST_WAY, &mut parts, &mut rips);
        let mut at = 0;
        while let Some(part) = parts.get(at)
            && self.extent == Extent::Hot
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
            // Other vCPUs may run what becomes of the route.
            if self.blocks.ops(block).iter().any(Op::names_own_stub) {
                break;
            }
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
        match self.extent {
            Extent::Hot => return,
            Extent::Usual => {}
            Extent::Rest => returning = 1,
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
            let weight = |rip| self.warm(block, rip).map_or(0, Block::runs);
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
        (alike && block.runs() >= self.warm).then_some(block)
    }
}
