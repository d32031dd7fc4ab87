//! Which accesses of a trace share one TLB check.
//!
//! Compiled code reaches most of its memory from a place that stays for a while: a frame's
//! stack pointer, a pointer to a structure, an element of an array. The first access of such
//! a *group* checks that all of it lies in one page and may be accessed, and keeps where that
//! is in host memory; the others go straight there. A register that moves by constants
//! (pushes and pops, pointers that are stepped) is followed.
//!
//! What is checked holds until the trace is left: only the run loop and instructions that end
//! the trace forget translations. A group never reaches over the head of a loop.

use iced_x86::{Code, OpKind, Register};

use super::access::Access;
use super::assembler::NotCopied;
use super::block::Block;
use super::mode::Mode;
use super::registers::GprSet;
use super::shapes::How;
use super::stack::{RBP, RSP, StackUse, down, stack_operand};
use super::trace::{Step, Then, Trace};
use crate::decode::op::Op;
use crate::native::Traits;
use crate::state::{GPR_ZERO, SEG_FLAT};

/// Most bytes from the first to the last of a group.
const SPAN: i64 = 1024;
/// Most bytes that an access may make its group longer by: a check is saved each time, but the
/// longer the group, the likelier it lies in two pages, and that is as dear as a hundred checks.
const REACH: i64 = 64;
/// Most bytes of one that is looked for in the mirror, which is as good as a page of any size.
const MIRRORED_SPAN: i64 = 16 << 10;

/// How many groups there can be at a time.
pub(super) const PLACES: u8 = 16;

/// What accesses are made from: the sum of a register and a multiple of another, either of
/// which may be [`GPR_ZERO`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) base: u8,
    pub(super) index: u8,
    /// log2 of the index's factor.
    pub(super) scale: u8,
    /// Addresses made from it have 32 bits, and wrap.
    pub(super) narrow: bool,
}

impl Origin {
    /// What one register points to.
    pub(super) fn register(base: u8) -> Self {
        Self { base, index: GPR_ZERO, scale: 0, narrow: false }
    }

    /// The registers it is made of.
    pub(super) fn registers(self) -> GprSet {
        let part = |number| if number == GPR_ZERO { GprSet::NONE } else { GprSet::of(number) };
        part(self.base).or(part(self.index))
    }

    /// How it moves when guest register `number` changes; `None`: not by a constant.
    fn follows(self, number: u8, change: Change) -> Option<i64> {
        let distance = match change {
            Change::By(distance) => distance,
            Change::Narrowly(distance) if self.narrow => distance,
            _ => return (self.base != number && self.index != number).then_some(0),
        };
        let base = if self.base == number { distance } else { 0 };
        let index =
            if self.index == number { distance.wrapping_shl(u32::from(self.scale & 3)) } else { 0 };
        Some(base.wrapping_add(index))
    }
}

/// Accesses that share a check. Distances are from what the origin is when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) origin: Origin,
    /// Where the host address is kept.
    pub(super) place: u8,
    /// The first byte.
    pub(super) first: i64,
    /// The last byte.
    pub(super) last: i64,
    /// Some of them store.
    pub(super) stores: bool,
    /// What must be aligned, and by which mask.
    pub(super) aligned: Option<(i64, u8)>,
    /// What the distances of the others are from.
    pub(super) zero: i64,
    /// Its page is kept from turn to turn, under this number.
    pub(super) stream: Option<u8>,
    /// It is looked for in the mirror first.
    pub(super) mirrored: bool,
    members: u32,
}

impl Group {
    /// From `first` to `last` byte, from `origin`, kept at `place`.
    #[cfg(test)]
    pub(super) fn of(origin: Origin, place: u8, first: i64, last: i64, stores: bool) -> Self {
        Self {
            origin,
            place,
            first,
            last,
            stores,
            aligned: None,
            zero: 0,
            stream: None,
            mirrored: false,
            members: 2,
        }
    }

    /// One `access` at `first` from `origin`, which is looked for in the mirror.
    pub(super) fn alone(origin: Origin, first: i64, access: Access) -> Self {
        Self {
            origin,
            place: 0,
            first,
            last: first.wrapping_add(i64::from(access.len)).wrapping_sub(1),
            stores: access.stores,
            aligned: None,
            zero: 0,
            stream: None,
            mirrored: true,
            members: 1,
        }
    }

    /// Whether there is more than one access in it.
    pub(super) fn is_shared(&self) -> bool {
        self.members > 1
    }

    /// Whether it is too long to lie in one page, most of the time or ever: only the mirror has it.
    pub(super) fn is_wide(&self) -> bool {
        self.last.wrapping_sub(self.first) >= SPAN
    }

    /// The same, for when the origin has moved by `distance`.
    pub(super) fn seen_from(self, distance: i64) -> Self {
        let moved = |at: i64| at.wrapping_sub(distance);
        Self {
            first: moved(self.first),
            last: moved(self.last),
            aligned: self.aligned.map(|(at, mask)| (moved(at), mask)),
            zero: moved(self.zero),
            ..self
        }
    }

    /// The group with another access, if that may be.
    fn with(self, access: &Simple, at: i64) -> Option<Self> {
        let mirrored = self.mirrored && access.may_fault;
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
        let len = last.checked_sub(first)?;
        let longer = len.checked_sub(self.last.checked_sub(self.first)?)?;
        let (span, reach) = if mirrored { (MIRRORED_SPAN, MIRRORED_SPAN) } else { (SPAN, REACH) };
        (len < span && longer <= reach).then_some(Self {
            first,
            last,
            stores: self.stores || access.stores,
            aligned,
            mirrored,
            members: self.members.saturating_add(1),
            ..self
        })
    }
}

/// The number of a group among those that the code behind a trace is about.
#[derive(Clone, Copy, Debug)]
pub(super) struct GroupNumber(u32);

/// Those groups: there are few of them, and each piece of such code would have to have room for one.
#[derive(Debug, Default)]
pub(super) struct Groups(Vec<Group>);

impl Groups {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// One more.
    pub(super) fn add(&mut self, group: Group) -> GroupNumber {
        let number = GroupNumber(self.0.len() as u32);
        self.0.push(group);
        number
    }

    /// The group of that number.
    ///
    /// # Errors
    /// None: numbers are those of the same trace.
    pub(super) fn get(&self, GroupNumber(number): GroupNumber) -> Result<&Group, NotCopied> {
        self.0.get(number as usize).ok_or(NotCopied)
    }
}

/// How the access of a step is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// It is checked for itself.
    None,
    /// It checks this for others too; the origin is moved by `moves` behind it.
    Leads { group: Group, at: i64, moves: i64 },
    /// It was checked, at this distance from the address that was kept then. What is `mirrored`
    /// may yet fault.
    Follows { place: u8, at: i64, mirrored: bool },
}

impl Share {
    /// Nobody follows it, whatever comes of it.
    pub(super) fn is_alone(&self) -> bool {
        match self {
            Self::None => true,
            Self::Leads { group, .. } => !group.is_shared() && group.stream.is_none(),
            Self::Follows { .. } => false,
        }
    }
}

/// An access at a distance from an origin.
struct Simple {
    origin: Origin,
    displacement: i64,
    len: i64,
    stores: bool,
    align_mask: u8,
    /// Nothing of the instruction is done when it faults, so it may be tried in the mirror.
    may_fault: bool,
}

/// How a register changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    By(i64),
    /// By so much in its lower half; the upper one becomes zero.
    Narrowly(i64),
    Anyhow,
}

/// A group that the next access may join.
#[derive(Clone, Copy, Debug)]
struct Open {
    origin: Origin,
    group: usize,
    place: u8,
    /// How far the origin has moved since the group began.
    moved: i64,
}

/// Memory for finding out which accesses share checks.
#[derive(Debug, Default)]
pub(super) struct Grouping {
    groups: Vec<Group>,
    open: Vec<Open>,
    apart: Vec<Origin>,
    joined: Vec<Option<Joined>>,
}

/// An access that belongs to a group.
#[derive(Clone, Copy, Debug)]
struct Joined {
    /// The group's number.
    group: usize,
    /// The access's distance.
    at: i64,
    /// How far the origin moves with the step.
    moves: i64,
}

impl Block<'_> {
    /// Which steps of `trace` share checks: one entry each in `shares`.
    pub(super) fn shares_of(
        &self,
        trace: &Trace,
        grouping: &mut Grouping,
        shares: &mut Vec<Share>,
    ) {
        self.find_groups(trace, grouping);
        let Grouping { groups, joined, .. } = grouping;
        // The first one leads.
        let mut led = 0;
        shares.clear();
        shares.extend(joined.iter().map(|joined| {
            let Some(Joined { group: number, at, moves }) = *joined else { return Share::None };
            let Some(group) = groups.get(number) else { return Share::None };
            // Groups have their numbers in the order in which they are led.
            if number < led {
                Share::Follows { place: group.place, at, mirrored: false }
            } else {
                led = number.saturating_add(1);
                Share::Leads { group: *group, at, moves }
            }
        }));
        self.find_streams(trace, shares);
        let mut mirrored_at = [false; PLACES as usize];
        for share in shares {
            match share {
                Share::Leads { group, .. } => {
                    if let Some(at) = mirrored_at.get_mut(usize::from(group.place)) {
                        *at = group.mirrored;
                    }
                    if !group.is_shared() && group.stream.is_none() && !group.mirrored {
                        *share = Share::None;
                    }
                }
                Share::Follows { place, mirrored, .. } => {
                    *mirrored = mirrored_at.get(usize::from(*place)).is_some_and(|it| *it);
                }
                Share::None => {}
            }
        }
    }

    /// Finds the groups of the accesses of `trace`.
    fn find_groups(&self, trace: &Trace, grouping: &mut Grouping) {
        let Grouping { groups, open, apart, joined } = grouping;
        groups.clear();
        open.clear();
        apart.clear();
        joined.clear();
        for (n, (step, op)) in trace.steps.iter().zip(&trace.ops).enumerate() {
            if self.heads.has(op.rip) {
                open.clear();
            }
            let access = simple(step, op, trace.mode);
            let copied = step.then == Then::Next && step.shape.stack().is_none();
            if let Some(access) = &access
                && self.manner.apart.has(op.next_rip())
            {
                apart.push(access.origin);
            }
            let mut joins = access.map(|access| {
                let joins = join(groups, open, &access, self.manner.mirrored);
                if apart.contains(&access.origin) {
                    open.retain(|open| open.group != joins.group);
                }
                joins
            });
            let origins = open.iter().map(|open| open.origin.registers());
            let followed = origins.fold(GprSet::NONE, GprSet::or);
            for number in self.writes_of(n).and(followed).iter() {
                let change = change(step, op, number, trace.mode);
                open.retain_mut(|open| {
                    let Some(distance) = open.origin.follows(number, change) else { return false };
                    // What the mirror has is reached from registers as they are, and those are
                    // another thing for whoever does a push instead of translated code.
                    let mirrored = groups.get(open.group).is_some_and(|group| group.mirrored);
                    if mirrored && !copied && distance != 0 {
                        return false;
                    }
                    open.moved = open.moved.wrapping_add(distance);
                    if let Some(joins) = joins.as_mut().filter(|joins| joins.group == open.group) {
                        joins.moves = joins.moves.wrapping_add(distance);
                    }
                    true
                });
            }
            joined.push(joins);
        }
    }
}

/// Puts `access` into a group that is open, or opens one for it. Says which, and the distance.
fn join(groups: &mut Vec<Group>, open: &mut Vec<Open>, access: &Simple, mirrored: bool) -> Joined {
    for open in open.iter().filter(|open| open.origin == access.origin) {
        let at = open.moved.wrapping_add(access.displacement);
        if let Some(begun) = groups.get_mut(open.group)
            && let Some(wider) = begun.with(access, at)
        {
            *begun = wider;
            return Joined { group: open.group, at, moves: 0 };
        }
    }
    if open.len() >= usize::from(PLACES) {
        open.remove(0);
    }
    let taken = |place: u8| open.iter().any(|open| open.place == place);
    let place = (0..PLACES).find(|place| !taken(*place)).unwrap_or(0);
    let group = groups.len();
    let Simple { origin, displacement, len, stores, align_mask, may_fault } = *access;
    let mirrored = mirrored && may_fault && !origin.narrow;
    open.push(Open { origin, group, place, moved: 0 });
    groups.push(Group {
        origin,
        place,
        first: displacement,
        last: displacement.wrapping_add(len).wrapping_sub(1),
        stores,
        aligned: (align_mask != 0).then_some((displacement, align_mask)),
        zero: 0,
        stream: None,
        mirrored,
        members: 1,
    });
    Joined { group, at: displacement, moves: 0 }
}

/// The access that `step` makes in `mode`, if it is from an origin.
fn simple(step: &Step, op: &Op, mode: Mode) -> Option<Simple> {
    let stack = |base, displacement, word, stores| {
        let operand = stack_operand(mode, op, base, displacement);
        Simple::to(&operand, i64::from(word), stores, 0)
    };
    match (step.then, &step.shape.how) {
        (Then::Next, How::Stack(StackUse::Push, word))
        | (Then::Last, How::Stack(StackUse::Call, word)) => stack(RSP, down(*word), *word, true),
        (Then::Next, How::Stack(StackUse::Pop, word))
        | (Then::Last, How::Stack(StackUse::Return, word)) => stack(RSP, 0, *word, false),
        (Then::Next, How::Stack(StackUse::Leave, word)) => stack(RBP, 0, *word, false),
        (Then::Next, How::Copied(copying)) => {
            let Access { len, stores, align_mask } = copying.access?;
            // A store from an MMX register has changed the x87 unit already when it faults.
            let may_fault = !copying.traits.contains(Traits::X87);
            let simple = Simple::to(&mode.operand(op), len.into(), stores, align_mask)?;
            Some(Simple { may_fault, ..simple })
        }
        (Then::Next, How::Privileged(_)) => match step.instruction.code() {
            Code::Pushfq => stack(RSP, down(8), 8, true),
            Code::Popfq => stack(RSP, 0, 8, false),
            _ => None,
        },
        _ => None,
    }
}

impl Simple {
    /// One of `len` bytes to `operand`, if that is at a distance from an origin.
    fn to(operand: &Op, len: i64, stores: bool, align_mask: u8) -> Option<Self> {
        let Op { base, index, scale, disp, .. } = *operand;
        let fixed = index == GPR_ZERO && base == GPR_ZERO;
        let (narrow, displacement) = match operand.addr_mask {
            u64::MAX => (false, disp as i64),
            0xffff_ffff => (true, i64::from(disp as i32)),
            _ => return None,
        };
        i32::try_from(displacement).ok()?;
        let origin = Origin { base, index, scale: scale & 3, narrow };
        let simple = !fixed && operand.seg == SEG_FLAT;
        let may_fault = false;
        simple.then_some(Self { origin, displacement, len, stores, align_mask, may_fault })
    }
}

/// How far `step` moves `origin`, a register of which it may change if it is among `registers`.
/// `None`: by no constant.
pub(super) fn walk(
    step: &Step,
    op: &Op,
    origin: Origin,
    registers: GprSet,
    mode: Mode,
) -> Option<i64> {
    let changed = registers.and(origin.registers());
    changed.iter().try_fold(0_i64, |sum, number| {
        let distance = origin.follows(number, change(step, op, number, mode))?;
        sum.checked_add(distance)
    })
}

/// How `step` changes register `number`, which it may change, in `mode`.
fn change(step: &Step, op: &Op, number: u8, mode: Mode) -> Change {
    let it = &step.instruction;
    let first = if it.op_count() > 0 && it.op0_kind() == OpKind::Register {
        it.op0_register()
    } else {
        Register::None
    };
    let same = matches!(first.size(), 4 | 8)
        && first.is_gpr()
        && first.full_register().number() == usize::from(number);
    let by = |distance: i64| match (first.size(), i32::try_from(distance)) {
        (8, Ok(_)) => Change::By(distance),
        (4, _) => Change::Narrowly(i64::from(distance as i32)),
        _ => Change::Anyhow,
    };
    let immediate = || it.try_immediate(1).unwrap_or(0) as i64;
    match (it.code(), step.shape.stack()) {
        (_, Some((StackUse::Push | StackUse::PushMemory, word))) if number == RSP => {
            moved(mode, down(word))
        }
        (_, Some((StackUse::Pop, word))) if number == RSP && !same => moved(mode, i64::from(word)),
        (Code::Pushfq, _) if number == RSP => Change::By(-8),
        (Code::Popfq, _) if number == RSP => Change::By(8),
        _ if !same => Change::Anyhow,
        (
            Code::Add_rm64_imm8
            | Code::Add_rm64_imm32
            | Code::Add_RAX_imm32
            | Code::Add_rm32_imm8
            | Code::Add_rm32_imm32
            | Code::Add_EAX_imm32,
            _,
        ) => by(immediate()),
        (
            Code::Sub_rm64_imm8
            | Code::Sub_rm64_imm32
            | Code::Sub_RAX_imm32
            | Code::Sub_rm32_imm8
            | Code::Sub_rm32_imm32
            | Code::Sub_EAX_imm32,
            _,
        ) => by(immediate().wrapping_neg()),
        (Code::Inc_rm64 | Code::Inc_rm32 | Code::Inc_r32, _) => by(1),
        (Code::Dec_rm64 | Code::Dec_rm32 | Code::Dec_r32, _) => by(-1),
        (Code::Lea_r64_m | Code::Lea_r32_m, _)
            if op.base == number
                && op.index == GPR_ZERO
                && (op.addr_mask == u64::MAX || first.size() == 4) =>
        {
            by(op.disp as i64)
        }
        _ => Change::Anyhow,
    }
}

/// The stack pointer moves by `distance`.
fn moved(mode: Mode, distance: i64) -> Change {
    match mode.pointer() {
        8 => Change::By(distance),
        4 => Change::Narrowly(distance),
        _ => Change::Anyhow,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(may_fault: bool, displacement: i64) -> Simple {
        let origin = Origin::register(3);
        Simple { origin, displacement, len: 8, stores: false, align_mask: 0, may_fault }
    }

    #[test]
    fn only_what_the_mirror_may_have_is_wide() {
        let groups_of = |mirrored: bool, accesses: &[Simple]| {
            let (mut groups, mut open) = (Vec::new(), Vec::new());
            for access in accesses {
                join(&mut groups, &mut open, access, mirrored);
            }
            groups.iter().map(|group| (group.members, group.is_wide())).collect::<Vec<_>>()
        };
        let far = [access(true, 0), access(true, 0xc00), access(true, 0x3000)];
        assert_eq!(groups_of(true, &far), [(3, true)]);
        assert_eq!(groups_of(false, &far), [(1, false); 3]);
        // A push cannot be tried there: it gets a group of its own, or makes one an ordinary one.
        let pushed = [access(true, 0), access(true, 0xc00), access(false, 0xc08)];
        assert_eq!(groups_of(true, &pushed), [(2, true), (1, false)]);
        let near = [access(true, 0), access(false, 8), access(true, 0xc00)];
        assert_eq!(groups_of(true, &near), [(2, false), (1, false)]);
        let too_far = [access(true, 0), access(true, MIRRORED_SPAN)];
        assert_eq!(groups_of(true, &too_far), [(1, false); 2]);
    }
}
