//! The follower comes after the leader: interprets from where the leader started until it is
//! where the leader is, with the same state.
//!
//! How many instructions the leader took is not known, so the follower looks at every one
//! that lies where the leader is. Agreement there, in everything, is agreement, even if the
//! leader went around a loop once more that changes nothing.

use super::Ended;
use super::compare::{same_memory, same_questions, same_registers};
use crate::decode::cache::BlockCache;
use crate::decode::op::Op;
use crate::memory::overlay::Before;
use crate::vcpu::{Abort, Vcpu};

/// How it came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caught {
    /// All is the same.
    Agrees,
    /// The follower was where the leader is, and had another state.
    Differs,
    /// The follower ended in an exception or an exit, and the leader did not, or differently.
    Ended(Ended),
    /// The follower asked the machine something that the leader had not.
    Asked,
    /// It is not to be found.
    Nowhere,
}

/// Whom the follower is after.
pub(super) struct Chase<'a> {
    leader: &'a Vcpu,
    before: &'a Before,
    ended: Ended,
    limit: u64,
    taken: u64,
    /// The first instruction where the leader is decides.
    strict: bool,
    /// Where the follower has been.
    path: Option<&'a mut Vec<u64>>,
}

/// More of a path is not kept.
const LONGEST_PATH: usize = 64;

impl<'a> Chase<'a> {
    /// After `leader`, for `limit` instructions at most.
    pub(super) fn new(leader: &'a Vcpu, before: &'a Before, ended: Ended, limit: u64) -> Self {
        Self { leader, before, ended, limit, taken: 0, strict: false, path: None }
    }

    /// The same after a leader that goes around no loop: the first meeting decides. The
    /// instructions on the way are noted in `path`.
    pub(super) fn strict(self, path: &'a mut Vec<u64>) -> Self {
        path.clear();
        Self { strict: true, path: Some(path), ..self }
    }

    /// Instructions taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// `follower` is at an instruction: whether the chase is over.
    fn look(&self, follower: &Vcpu) -> Option<Caught> {
        if self.ended != Ended::Between || follower.state.rip != self.leader.state.rip {
            return None;
        }
        if self.same(follower) {
            return Some(Caught::Agrees);
        }
        (self.strict && self.taken > 0).then_some(Caught::Differs)
    }

    fn same(&self, follower: &Vcpu) -> bool {
        same_registers(self.leader, follower)
            && same_questions(self.leader, follower)
            && same_memory(self.leader, follower, self.before)
    }

    /// `follower` has ended in an exception or exit.
    fn end(&self, follower: &Vcpu, ended: Ended) -> Caught {
        let alike = match ended {
            Ended::Between => true,
            Ended::Fault => self.leader.fault == follower.fault,
            Ended::Exit => self.leader.exit == follower.exit,
        };
        if ended == self.ended && alike && self.same(follower) {
            Caught::Agrees
        } else {
            Caught::Ended(ended)
        }
    }

    /// `follower` is about to run `op`.
    fn note(&mut self, op: &Op) {
        // The synthetic op that ends a block is no instruction.
        if let Some(path) = &mut self.path
            && path.len() < LONGEST_PATH
            && op.len != 0
        {
            path.push(op.rip);
        }
        self.taken = self.taken.saturating_add(1);
    }
}

impl Vcpu {
    /// Follows `chase`'s leader.
    pub(super) fn chase(&mut self, chase: &mut Chase<'_>) -> Caught {
        self.with_blocks(|cpu, blocks| cpu.chase_by_blocks(blocks, chase))
    }

    fn chase_by_blocks(&mut self, blocks: &mut BlockCache, chase: &mut Chase<'_>) -> Caught {
        loop {
            if self.tape.as_ref().is_some_and(|tape| tape.lost().is_some()) {
                return Caught::Asked;
            }
            if let Some(caught) = chase.look(self) {
                return caught;
            }
            if chase.taken >= chase.limit {
                return Caught::Nowhere;
            }
            let outcome = if self.stepping() {
                if let Ok(block) = self.find_block(blocks)
                    && let Some(op) = block.ops.first()
                {
                    chase.note(op);
                }
                self.step(blocks)
            } else {
                match self.chase_block(blocks, chase) {
                    Ok(Some(caught)) => return caught,
                    Ok(None) => Ok(()),
                    Err(abort) => Err(abort),
                }
            };
            match outcome {
                Ok(()) | Err(Abort::EndBlock) => {}
                Err(Abort::Fault) => return chase.end(self, Ended::Fault),
                Err(Abort::Exit) => return chase.end(self, Ended::Exit),
            }
        }
    }

    /// As the run loop runs a block, with a look at each instruction.
    fn chase_block(
        &mut self,
        blocks: &mut BlockCache,
        chase: &mut Chase<'_>,
    ) -> Result<Option<Caught>, Abort> {
        let block = self.find_block(blocks)?;
        let (start, goal) = (self.state.rip, chase.leader.state.rip);
        for (n, op) in block.ops.iter().enumerate() {
            if n > 0 && op.rip == goal {
                self.state.rip = op.rip;
                if let Some(caught) = chase.look(self) {
                    return Ok(Some(caught));
                }
                self.state.rip = start;
            }
            chase.note(op);
            let outcome = (op.run)(self, op);
            if outcome == Err(Abort::Fault) {
                self.faulted_at(op);
            }
            let hit = std::mem::take(&mut self.code_hit);
            outcome?;
            if hit {
                // The store may have hit the rest of this very block.
                if n.saturating_add(1) < block.ops.len() {
                    self.state.rip = op.next_rip();
                }
                break;
            }
        }
        Ok(None)
    }
}
