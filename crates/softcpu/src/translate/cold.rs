//! Code that is rarely run, and lies behind its block: what a TLB check or a look for events
//! goes to when it does not hold, and the ways out.

use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::context::{AVX, SSE, X87};
use super::fields;
use super::flags::{Flags, Producer};
use super::gs_pages::Distant;
use super::registers::{ADDRESS, Homes, VALUE};
use super::relocate::Kind;
use super::sharing::{GroupNumber, Groups};
use super::thunks::Thunks;
use super::trace::Trace;

/// How such a piece brings the flags into the context first.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fix {
    /// They are there.
    None,
    /// They are in the host's flags.
    Keep,
    /// This makes them.
    Make(Producer),
}

impl Fix {
    pub(super) fn write(&self, code: &mut Assembler, trace: &Trace) -> Result<(), NotCopied> {
        match self {
            Self::None => return Ok(()),
            Self::Keep => {}
            Self::Make(producer) => producer.write(code, trace)?,
        }
        keep_flags(code);
        Ok(())
    }
}

/// The host's flags into the context.
pub(super) fn keep_flags(code: &mut Assembler) {
    // lahf; seto al; mov [flags], ax
    code.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x65, 0x66, 0x89, 0x04, 0x25]);
    code.bytes(&fields::FLAGS.0.to_le_bytes());
}

/// One such piece.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cold {
    /// Interprets an op and goes on at `resume`, with flags in host flags if asked, and what is
    /// kept at place `again` at hand.
    Interpret { op: u64, resume: Label, to_host: bool, again: Option<u8> },
    /// Interprets an op that was to check what others access too, checks `group`, which is that
    /// as seen from behind the op, and goes on at `resume`, or else leaves for `next`.
    Lead { op: u64, group: GroupNumber, next: u64, resume: Label, to_host: bool },
    /// Finds the page that `group` is in now, keeps it for `stream` and looks `again`, or goes
    /// to `slow`.
    Fill { group: GroupNumber, stream: u8, again: Label, slow: Label },
    /// Looks into the TLB for `group`, which the mirror does not have, and goes on where that is
    /// `found`, or to `slow`.
    Look { group: GroupNumber, found: Label, slow: Label },
    /// Looks into the TLB for what is `distant` from the base of GS, and goes on where that is
    /// `found`, or to `slow`.
    LookBehindGs { distant: Distant, found: Label, slow: Label },
    /// Interprets the last op.
    Last { op: u64 },
    /// Leaves with RIP at `rip`.
    Leave { rip: u64 },
    /// Leaves with RIP at `rip`: the translation is closed.
    Closed { rip: u64 },
    /// Leaves with RIP at what is in RAX, XORed with the jump context.
    LeaveByKey,
    /// Leaves with RIP at the address whose slot is in R13.
    LeaveBySlot,
    /// Leaves with RIP at the address that the last call which was noted is returned from to.
    LeaveByReturn,
    /// Forgets all calls that were noted, and goes on at `resume`.
    ForgetCalls { resume: Label },
    /// Returns, as `op` does, to the address in RAX, for which no call was noted. The stack
    /// pointer is moved by `by`.
    Unforeseen { op: u64, by: i64 },
    /// Leaves the trace for `target`, from the branch at `from`, with flags as they were there.
    Exit { target: u64, from: u64, flags: Flags, producer: Option<Producer> },
    /// Leaves with RIP at `rip`: the trace is hot.
    Hot { rip: u64 },
    /// Leaves by link `number`.
    Link { number: u32 },
    /// Loads the vector and x87 units and goes on at `resume`, if `need` of it may be used.
    Vectors { need: u8, resume: Label },
}

impl Cold {
    /// Writes it, for a block that begins at `rip` and has `groups`, where guest registers are in
    /// `homes`.
    ///
    /// # Errors
    /// None, unless the assembler is wrong.
    pub(super) fn write(
        self,
        code: &mut Assembler,
        thunks: &Thunks,
        (rip, groups): (u64, &Groups),
        homes: Homes,
    ) -> Result<(), NotCopied> {
        code.homes = homes;
        code.give_back();
        match self {
            Self::Interpret { op, resume, to_host, again } => {
                code.moving_constant(VALUE, op, Kind::Op);
                code.call(thunks.interpret);
                code.lend_again(homes);
                if let Some(place) = again {
                    code.load(ADDRESS, fields::shared(place));
                }
                if to_host {
                    load_flags(code);
                }
                code.jump(resume);
            }
            Self::Lead { op, group, next, resume, to_host } => {
                code.moving_constant(VALUE, op, Kind::Op);
                code.call(thunks.interpret);
                code.lend_again(homes);
                let (split, group) = (code.label(), groups.get(group)?);
                code.check_group(group, split)?;
                if to_host {
                    load_flags(code);
                }
                code.jump(resume);
                code.bind(split);
                if group.is_wide() {
                    // In one page nowhere.
                    code.store_constant(fields::SPLIT_AT, -1);
                } else {
                    code.sum(VALUE, group.origin, group.first)?;
                    code.store(fields::SPLIT_AT, VALUE);
                }
                code.give_back();
                leave_trace(code, rip, next, thunks.leave_split);
            }
            Self::Hot { rip: next } => leave_trace(code, rip, next, thunks.leave_hot),
            Self::Last { op } => {
                code.moving_constant(VALUE, op, Kind::Op);
                code.call(thunks.interpret_last);
            }
            Self::Leave { rip } => {
                code.guest_address(VALUE, rip);
                code.jump_to(thunks.leave_at);
            }
            Self::Closed { rip } => {
                code.guest_address(VALUE, rip);
                code.jump_to(thunks.leave_closed);
            }
            Self::LeaveByKey => {
                code.xor(VALUE, fields::JUMP_CONTEXT);
                code.jump_to(thunks.leave_at);
            }
            Self::LeaveBySlot => {
                // mov rax, gs:[r13 * 8 + keys]
                code.bytes(&[0x65, 0x4a, 0x8b, 0x04, 0xed]);
                code.bytes(&fields::JUMP_KEYS.0.to_le_bytes());
                code.xor(VALUE, fields::JUMP_CONTEXT);
                code.jump_to(thunks.leave_at);
            }
            // The block writes them, which knows its edges, and where registers stay.
            Self::Exit { .. }
            | Self::Fill { .. }
            | Self::Look { .. }
            | Self::LookBehindGs { .. }
            | Self::ForgetCalls { .. }
            | Self::Unforeseen { .. } => {}
            Self::LeaveByReturn => {
                code.last_call();
                code.jump_to(thunks.leave_at);
            }
            Self::Link { number } => {
                code.moving_constant(VALUE, number.into(), Kind::Link);
                code.jump_to(thunks.leave_by_link);
            }
            Self::Vectors { need, resume } => {
                for (units, load) in [(SSE | AVX, thunks.load_vectors), (X87, thunks.load_x87)] {
                    if need & units != 0 {
                        code.call(load);
                    }
                }
                code.load(VALUE, fields::VECTORS);
                require(code, need);
                code.jump_if(Condition::EQUAL, resume);
                code.guest_address(VALUE, rip);
                code.jump_to(thunks.leave_to_interpret);
            }
        }
        Ok(())
    }
}

/// Leaves the trace at `rip` for `next` by `thunk`, which wants to know both.
fn leave_trace(code: &mut Assembler, rip: u64, next: u64, thunk: u64) {
    code.guest_address(VALUE, rip);
    code.store(fields::SPARE, VALUE);
    code.guest_address(VALUE, next);
    code.jump_to(thunk);
}

/// `and eax, need; cmp eax, need`
pub(super) fn require(code: &mut Assembler, need: u8) {
    code.bytes(&[0x83, 0xe0, need, 0x83, 0xf8, need]);
}

/// The context's flags into the host's.
pub(super) fn load_flags(code: &mut Assembler) {
    // movzx eax, word [flags]; add al, 0x7f; sahf
    code.bytes(&[0x65, 0x0f, 0xb7, 0x04, 0x25]);
    code.bytes(&fields::FLAGS.0.to_le_bytes());
    code.bytes(&[0x04, 0x7f, 0x9e]);
}
