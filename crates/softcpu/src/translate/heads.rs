//! Heads: the places within a trace that it jumps to.
//!
//! Whoever comes to one has all that was known on the way forgotten: flags are in the context if
//! anybody wants them, and no host address is left in a register.

use super::assembler::{Label, NotCopied};
use super::block::Block;
use super::flags::Flags;
use super::trace::Trace;

/// A place that the trace jumps to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) label: Label,
    /// Whether the context must have the flags there.
    pub(super) wants_flags: bool,
}

/// All of a trace, by RIP: a few.
#[derive(Debug, Default)]
pub(super) struct Heads(Vec<(u64, Head)>);

impl Heads {
    /// The head at `rip`.
    pub(super) fn get(&self, rip: u64) -> Option<Head> {
        self.0.iter().find(|(known, _)| *known == rip).map(|(_, head)| *head)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn has(&self, rip: u64) -> bool {
        self.get(rip).is_some()
    }
}

impl Block<'_> {
    /// Finds the places that the trace jumps to.
    pub(super) fn find_heads(&mut self, trace: &Trace) {
        self.heads.0.clear();
        for step in &trace.steps {
            for rip in step.goes_to() {
                if !self.heads.has(rip)
                    && let Some(n) = trace.step_at(rip)
                {
                    let (label, wants_flags) = (self.code.label(), self.wanted_from(Some(n)));
                    self.heads.0.push((rip, Head { label, wants_flags }));
                }
            }
        }
    }

    /// The step at `rip` comes next, from the one before it if the way is `open`; the trace
    /// may jump here too.
    pub(super) fn arrive(&mut self, rip: u64, open: bool) -> Result<(), NotCopied> {
        let Some(head) = self.heads.get(rip) else { return Ok(()) };
        if head.wants_flags {
            if open {
                self.save_flags()?;
            }
            self.flags = Flags::Context;
        } else {
            self.flags = Flags::Dead;
        }
        self.producer = None;
        self.in_address = None;
        if self.manner.hot {
            // The loops in it are where the time goes.
            self.code.align();
        }
        self.code.bind(head.label);
        Ok(())
    }
}
