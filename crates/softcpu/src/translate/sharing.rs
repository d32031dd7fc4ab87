//! Which accesses of a trace share one TLB check.
//!
//! Compiled code reaches most of its memory through a register that stays as it is for a
//! while: a frame's stack pointer, a pointer to a structure. The first access of such a
//! *group* checks that all of it lies in one page and may be accessed, and keeps where that
//! is in host memory; the others go straight there. A register that moves by constants
//! (pushes and pops, pointers that are stepped) is followed.
//!
//! What is checked holds until the trace is left: only the run loop and instructions that end
//! the trace forget translations. A group never reaches over the head of a loop.

use iced_x86::{Code, OpKind};

use super::block::{Block, is_division};
use super::copy::is_nothing;
use super::stack::{RBP, RSP};
use super::trace::{Step, Then, Trace};
use crate::decode::op::Op;
use crate::native::Traits;
use crate::state::{GPR_ZERO, SEG_FLAT};

/// Most bytes from the first to the last of a group: what goes further is likely to cross
/// into another page.
const SPAN: i64 = 1024;

/// Accesses that share a check. Distances are from what the register is when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) base: u8,
    /// The first byte.
    pub(super) first: i64,
    /// The last byte.
    pub(super) last: i64,
    /// Some of them store.
    pub(super) stores: bool,
    /// What must be aligned, and by which mask.
    pub(super) aligned: Option<(i64, u8)>,
    /// What the distances of the others are from.
    pub(super) origin: i64,
    members: u32,
}

impl Group {
    /// From `first` to `last` byte, through register `base`.
    #[cfg(test)]
    pub(super) fn of(base: u8, first: i64, last: i64, stores: bool) -> Self {
        Self { base, first, last, stores, aligned: None, origin: 0, members: 2 }
    }

    /// The same, for when the register has moved by `distance`.
    pub(super) fn seen_from(self, distance: i64) -> Self {
        let moved = |at: i64| at.wrapping_sub(distance);
        Self {
            first: moved(self.first),
            last: moved(self.last),
            aligned: self.aligned.map(|(at, mask)| (moved(at), mask)),
            origin: moved(self.origin),
            ..self
        }
    }

    /// The group with another access, if that may be.
    fn with(self, access: &Simple, at: i64) -> Option<Self> {
        let first = self.first.min(at);
        let last = self.last.max(at.checked_add(access.len)?.checked_sub(1)?);
        let aligned = match (self.aligned, access.align_mask) {
            (aligned, 0) => aligned,
            (None, mask) => Some((at, mask)),
            (Some((other, mask)), wanted) => {
                let alike = at.wrapping_sub(other) & i64::from(wanted) == 0;
                (wanted <= mask && alike).then_some(Some((other, mask)))?
            }
        };
        (last.checked_sub(first)? < SPAN).then_some(Self {
            first,
            last,
            stores: self.stores || access.stores,
            aligned,
            members: self.members.saturating_add(1),
            ..self
        })
    }
}

/// How the access of a step is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// It is checked for itself.
    None,
    /// It checks this for others too; the register is moved by `moves` behind it.
    Leads { group: Group, at: i64, moves: i64 },
    /// It was checked, at this distance from what the register was then.
    Follows { base: u8, at: i64 },
}

/// An access at a distance from a register.
struct Simple {
    base: u8,
    displacement: i64,
    len: i64,
    stores: bool,
    align_mask: u8,
}

/// How a register changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    By(i64),
    Anyhow,
}

/// A register that accesses are made through.
#[derive(Clone, Copy, Debug, Default)]
struct Base {
    /// The group that the next access may join, and how far the register has moved since.
    group: Option<usize>,
    moved: i64,
}

impl Block<'_> {
    /// Which steps of `trace` share checks: one entry each.
    pub(super) fn shares_of(&self, trace: &Trace) -> Vec<Share> {
        let mut groups: Vec<Group> = Vec::new();
        let mut bases = [Base::default(); 16];
        // The group of each step, the distance, and how the register moves with the step.
        let mut joined: Vec<Option<(usize, i64, i64)>> = Vec::new();
        for (n, (step, op)) in trace.steps.iter().zip(&trace.ops).enumerate() {
            if self.heads.contains_key(&op.rip) {
                bases = [Base::default(); 16];
            }
            let access = simple(step, op);
            let mut joins = None;
            if let Some(access) = &access
                && let Some(base) = bases.get_mut(usize::from(access.base))
            {
                let open = base.group.and_then(|group| groups.get_mut(group));
                let at = base.moved.wrapping_add(access.displacement);
                let wider = open.as_ref().and_then(|open| open.with(access, at));
                match (open, wider, base.group) {
                    (Some(open), Some(wider), Some(group)) => {
                        *open = wider;
                        joins = Some((group, at));
                    }
                    _ => {
                        *base = Base { group: Some(groups.len()), moved: 0 };
                        joins = Some((groups.len(), access.displacement));
                        groups.push(alone(access));
                    }
                }
            }
            let writes = self.writes_of(n);
            let mut moves = 0;
            for (number, base) in (0_u8..).zip(&mut bases) {
                if writes & 1 << number == 0 {
                    continue;
                }
                match change(step, op, number) {
                    Change::By(distance) => {
                        base.moved = base.moved.wrapping_add(distance);
                        if access.as_ref().is_some_and(|access| access.base == number) {
                            moves = distance;
                        }
                    }
                    Change::Anyhow => *base = Base::default(),
                }
            }
            joined.push(joins.map(|(group, at)| (group, at, moves)));
        }
        let mut led = vec![false; groups.len()];
        let share = |joined: Option<(usize, i64, i64)>| {
            let Some((number, at, moves)) = joined else { return Share::None };
            match (groups.get(number), led.get_mut(number)) {
                (Some(group), Some(led)) if group.members > 1 => {
                    if std::mem::replace(led, true) {
                        Share::Follows { base: group.base, at }
                    } else {
                        Share::Leads { group: *group, at, moves }
                    }
                }
                _ => Share::None,
            }
        };
        joined.into_iter().map(share).collect()
    }
}

fn alone(access: &Simple) -> Group {
    let Simple { base, displacement, len, stores, align_mask } = *access;
    Group {
        base,
        first: displacement,
        last: displacement.wrapping_add(len).wrapping_sub(1),
        stores,
        aligned: (align_mask != 0).then_some((displacement, align_mask)),
        origin: 0,
        members: 1,
    }
}

/// The access that `step` makes, if it is through one register.
fn simple(step: &Step, op: &Op) -> Option<Simple> {
    let word = |base, displacement, stores| {
        Some(Simple { base, displacement, len: 8, stores, align_mask: 0 })
    };
    match (step.then, step.instruction.code(), &step.plan) {
        (Then::Next, Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32, _)
        | (Then::Last, Code::Call_rel32_64, _) => word(RSP, -8, true),
        (Then::Next, Code::Pop_r64, _) | (Then::Last, Code::Retnq | Code::Retnq_imm16, _) => {
            word(RSP, 0, false)
        }
        (Then::Next, Code::Leaveq, _) => word(RBP, 0, false),
        (Then::Next, code, Some(plan))
            if plan.traits.contains(Traits::MEMORY)
                && !is_division(code)
                && !is_nothing(&step.instruction) =>
        {
            let simple = op.index == GPR_ZERO
                && op.base != GPR_ZERO
                && op.seg == SEG_FLAT
                && op.addr_mask == u64::MAX;
            let displacement = op.disp as i64;
            i32::try_from(displacement).ok()?;
            simple.then_some(Simple {
                base: op.base,
                displacement,
                len: i64::try_from(plan.size).ok()?,
                stores: plan.traits.contains(Traits::STORES),
                align_mask: u8::try_from(plan.alignment.saturating_sub(1)).ok()?,
            })
        }
        _ => None,
    }
}

/// How `step` changes register `number`, which it may change.
fn change(step: &Step, op: &Op, number: u8) -> Change {
    let it = &step.instruction;
    let same = it.op_count() > 0
        && it.op0_kind() == OpKind::Register
        && it.op0_register().is_gpr64()
        && it.op0_register().number() == usize::from(number);
    let immediate = |sign: i64| {
        let value = it.try_immediate(1).unwrap_or(0) as i64;
        i32::try_from(value).map_or(Change::Anyhow, |_| Change::By(value.wrapping_mul(sign)))
    };
    match (it.code(), number) {
        (Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32, RSP) => Change::By(-8),
        (Code::Pop_r64, RSP) if !same => Change::By(8),
        (Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32, _) if same => {
            immediate(1)
        }
        (Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32, _) if same => {
            immediate(-1)
        }
        (Code::Inc_rm64, _) if same => Change::By(1),
        (Code::Dec_rm64, _) if same => Change::By(-1),
        (Code::Lea_r64_m, _)
            if same
                && op.base == number
                && op.index == GPR_ZERO
                && op.seg == SEG_FLAT
                && op.addr_mask == u64::MAX
                && i32::try_from(op.disp as i64).is_ok() =>
        {
            Change::By(op.disp as i64)
        }
        _ => Change::Anyhow,
    }
}
