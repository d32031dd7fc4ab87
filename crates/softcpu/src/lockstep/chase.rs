//! The follower comes after the leader: interprets from where the leader started until it is
//! where the leader is, with the same state.
//!
//! How many instructions the leader took is not known, so the follower looks at every one
//! that lies where the leader is. Agreement there, in everything, is agreement, even if the
//! leader went around a loop once more that changes nothing.

use super::Ended;
use super::compare::{self, Bytes, same_memory, same_questions, same_registers};
use super::undefined::Undefined;
use crate::decode::cache::BlockCache;
use crate::decode::op::Op;
use crate::interp::BURST;
use crate::memory::overlay::Before;
use crate::state::VcpuState;
use crate::vcpu::{Abort, Vcpu};

/// How it came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caught {
    /// All is the same.
    Agrees,
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
    fine: bool,
    taken: u64,
    notes: Option<&'a mut Notes>,
}

/// What is noted of a chase for a report.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// The instructions that the follower took, to begin with.
    pub(super) path: Vec<u64>,
    /// When the follower was where the leader is, and had least to do to be the same.
    pub(super) nearest: Option<Nearest>,
    /// Flags that are nobody's fault.
    pub(super) undefined: Undefined,
    meetings: usize,
}

impl Notes {
    /// None yet, with these flags undefined.
    pub(super) fn after(undefined: Undefined) -> Self {
        Self { undefined, ..Self::default() }
    }
}

/// A follower where its leader is, but not the same.
#[derive(Debug)]
pub(super) struct Nearest {
    pub(super) state: VcpuState,
    /// Where memory differs: follower, leader.
    pub(super) memory: Vec<Bytes>,
    /// The part of the path that it had behind it.
    pub(super) taken: usize,
    differences: usize,
}

/// More of a path is not kept.
const LONGEST_PATH: usize = 64;
/// More meetings are not looked at closely.
const MOST_MEETINGS: usize = 64;

impl<'a> Chase<'a> {
    /// After `leader`, for `limit` instructions at most.
    /// Repeated string instructions are taken element by element where the leader is, if
    /// `fine`: it may have stopped within one.
    pub(super) fn new(
        leader: &'a Vcpu,
        before: &'a Before,
        ended: Ended,
        limit: u64,
        fine: bool,
    ) -> Self {
        Self { leader, before, ended, limit, fine, taken: 0, notes: None }
    }

    /// The same with `notes` taken.
    pub(super) fn noting(self, notes: &'a mut Notes) -> Self {
        Self { notes: Some(notes), ..self }
    }

    /// Instructions taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// `follower` is at an instruction: whether the chase is over.
    fn look(&mut self, follower: &mut Vcpu) -> Option<Caught> {
        if follower.state.rip != self.leader.state.rip {
            return None;
        }
        if self.ended == Ended::Between && self.same_but_for_undefined(follower) {
            return Some(Caught::Agrees);
        }
        self.meet(follower);
        None
    }

    /// Notes that `follower` is where the leader is, and how far from being the same.
    fn meet(&mut self, follower: &Vcpu) {
        let Some(notes) = &mut self.notes else { return };
        if notes.meetings >= MOST_MEETINGS {
            return;
        }
        notes.meetings = notes.meetings.saturating_add(1);
        let memory = compare::memory(follower, self.leader, self.before);
        let registers = compare::registers(&follower.state, &self.leader.state);
        let differences = registers.saturating_add(memory.len());
        if notes.nearest.as_ref().is_none_or(|nearest| differences < nearest.differences) {
            let (state, taken) = (follower.state.clone(), notes.path.len());
            notes.nearest = Some(Nearest { state, memory, taken, differences });
        }
    }

    fn same(&self, follower: &Vcpu) -> bool {
        same_registers(self.leader, follower)
            && same_questions(self.leader, follower)
            && same_memory(self.leader, follower, self.before)
    }

    /// As `same`, where flags that are undefined are made the same.
    fn same_but_for_undefined(&mut self, follower: &mut Vcpu) -> bool {
        let (theirs, ours) = (self.leader.state.rflags, follower.state.rflags);
        let differ = theirs ^ ours;
        let undefined = self.notes.as_ref().is_some_and(|it| it.undefined.flags().contains(differ));
        if differ.is_empty() || !undefined {
            return self.same(follower);
        }
        follower.state.rflags = theirs;
        let same = self.same(follower);
        if same {
            self.notes.iter_mut().for_each(|notes| notes.undefined.note_difference());
        } else {
            follower.state.rflags = ours;
        }
        same
    }

    /// `follower` has ended in an exception or exit.
    fn end(&mut self, follower: &mut Vcpu, ended: Ended) -> Caught {
        let alike = match ended {
            Ended::Between => true,
            Ended::Fault => self.leader.fault == follower.fault,
            Ended::Exit => self.leader.exit == follower.exit,
        };
        if ended == self.ended && alike && self.same_but_for_undefined(follower) {
            Caught::Agrees
        } else {
            Caught::Ended(ended)
        }
    }

    /// `follower` is about to run `op`.
    fn note(&mut self, op: &Op) {
        // The synthetic op that ends a block is no instruction.
        if let Some(notes) = &mut self.notes
            && notes.path.len() < LONGEST_PATH
            && op.len != 0
        {
            notes.path.push(op.rip);
        }
        self.taken = self.taken.saturating_add(1);
    }

    /// `follower` has run `op`.
    fn done(&mut self, op: &Op) {
        if let Some(notes) = &mut self.notes {
            notes.undefined.run(op);
        }
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
                if let Ok((_, ops)) = self.find_block(blocks)
                    && let Some(op) = ops.first()
                {
                    chase.note(op);
                    chase.done(op);
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
        let (_, ops) = self.find_block(blocks)?;
        let (start, goal) = (self.state.rip, chase.leader.state.rip);
        for (n, op) in ops.iter().enumerate() {
            if n > 0 && op.rip == goal {
                self.state.rip = op.rip;
                if let Some(caught) = chase.look(self) {
                    return Ok(Some(caught));
                }
                self.state.rip = start;
            }
            self.burst = if chase.fine && op.rip == goal { 1 } else { BURST };
            chase.note(op);
            let outcome = (op.run)(self, op);
            if outcome == Err(Abort::Fault) {
                self.faulted_at(op);
            } else {
                chase.done(op);
            }
            let hit = std::mem::take(&mut self.code_hit);
            outcome?;
            if hit {
                // The store may have hit the rest of this very block.
                if n.saturating_add(1) < ops.len() {
                    self.state.rip = op.next_rip();
                }
                break;
            }
        }
        Ok(None)
    }
}
