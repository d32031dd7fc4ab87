//! Copies instructions as they are, but for where their operands are.
//!
//! Register operands are renamed to the guest registers' homes; a memory operand becomes
//! the host address that the TLB check left. What does not fit (operands in AH beside new
//! registers, two operands kept in memory beside a third) is refused, and interpreted.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register as R};

use smallvec::SmallVec;

use super::access::Access;
use super::assembler::NotCopied;
use super::block::Block;
use super::context::{AVX, SSE, X87};
use super::fields;
use super::flags::Producer;
use super::memory_form::{memory_form, put_in_memory};
use super::registers::{
    ACCUMULATOR, ADDRESS, GprSet, Home, Homes, VALUE, is_high_byte, part, whole,
};
use super::shapes::How;
use crate::decode::op::Op;
use crate::native::{Plan, Traits, Use};
use crate::state::rflags::RFlags;

/// RAX's number.
const RAX: u8 = 0;

/// What of the vector and x87 units an instruction uses that is done like that.
pub(super) fn vector_need(how: &How) -> u8 {
    match how {
        How::ZeroUpper => SSE | AVX,
        How::X87Control => X87,
        How::Copied(copying) => {
            let of =
                |traits: Traits, unit: u8| if copying.traits.contains(traits) { unit } else { 0 };
            of(Traits::AVX, SSE | AVX) | of(Traits::SSE, SSE) | of(Traits::X87, X87)
        }
        _ => 0,
    }
}

/// What copying an instruction does to flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FlagUse {
    /// It reads some.
    pub(super) reads: bool,
    /// It changes some.
    pub(super) changes: bool,
    /// It leaves some alone.
    pub(super) leaves: bool,
}

impl FlagUse {
    fn of(plan: &Plan) -> Self {
        let status = RFlags::STATUS.bits();
        let leaves = plan.flags_out & status != status;
        let reads = plan.flags_in && !overwrites_flags(&plan.instruction);
        Self { reads, changes: plan.flags_out != 0, leaves }
    }
}

/// An operand that is a general register.
#[derive(Clone, Copy, Debug)]
struct Named {
    /// Which one.
    operand: u8,
    register: R,
    /// The code with which it can be in memory.
    in_memory: Option<Code>,
}

impl Named {
    /// The register's number.
    fn number(&self) -> u8 {
        self.register.full_register().number() as u8
    }
}

/// How instructions of one shape are copied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copying {
    /// General registers they use.
    pub(super) gprs: GprSet,
    /// Those whose old value, or part of it, matters.
    pub(super) loaded: GprSet,
    /// Those that they change.
    pub(super) written: GprSet,
    /// Operands that are general registers; a fifth one never is.
    registers: [Option<Named>; 4],
    pub(super) access: Option<Access>,
    pub(super) traits: Traits,
    /// What it does to flags: of shifts, those by nothing are another shape.
    pub(super) flags: FlagUse,
    /// RAX is an implied operand: it must be the guest's.
    accumulator: bool,
    /// All registers are in host registers of the same names while nothing is lent.
    same: bool,
}

impl Copying {
    /// As `plan` has it.
    ///
    /// # Errors
    /// For what accesses more memory at once than a check is for.
    pub(super) fn of(plan: Plan) -> Result<Self, NotCopied> {
        let it = &plan.instruction;
        let registers: [Option<Named>; 4] = std::array::from_fn(|n| {
            let operand = n as u32;
            let there = operand < it.op_count() && it.op_kind(operand) == OpKind::Register;
            let register = it.op_register(operand);
            (there && register.is_gpr()).then(|| {
                let number = register.full_register().number();
                let used = plan.gprs.iter().find(|used| used.index() == number);
                let in_memory = used.and_then(|used| memory_form(it, operand, used.written));
                Named { operand: n as u8, register, in_memory }
            })
        });
        let names = || registers.iter().flatten();
        let named = |number: u8| names().any(|named| named.number() == number);
        let accumulator = plan.gprs.iter().any(|used| used.number == RAX) && !named(RAX)
            || names().any(|named| named.register == R::AH)
            || matches!(it.mnemonic(), M::Cmpxchg | M::Mul)
            || it.code() == Code::Fnstsw_AX
            || it.mnemonic() == M::Imul && it.op_count() == 1;
        let at_home = |number: u8| Homes::default().of(number) == Home::Host(whole(number));
        let same = !accumulator && plan.gprs.iter().all(|used| at_home(used.number));
        let byte = |number: usize| u8::try_from(number).map_err(|_| NotCopied);
        let access = Access {
            len: byte(plan.size)?,
            stores: plan.traits.contains(Traits::STORES),
            align_mask: byte(plan.alignment.saturating_sub(1))?,
        };
        let access = plan.traits.contains(Traits::MEMORY).then_some(access);
        let (traits, flags) = (plan.traits, FlagUse::of(&plan));
        let those = |which: fn(&Use) -> bool| {
            plan.gprs.iter().filter(|used| which(used)).map(|used| used.number).collect()
        };
        Ok(Self {
            gprs: those(|_| true),
            loaded: those(|used| used.loaded),
            written: those(|used| used.written),
            registers,
            access,
            traits,
            flags,
            accumulator,
            same,
        })
    }
}

/// Copies the instruction `it` into `block`, as all of its shape are.
///
/// # Errors
/// It must be interpreted. `block` may then hold part of it.
pub(super) fn copy(
    block: &mut Block<'_>,
    it: &Instruction,
    copying: &Copying,
    op: &Op,
) -> Result<(), NotCopied> {
    let Copying { access, accumulator, flags, .. } = *copying;
    let Renamed { mut instruction, temporaries } = rename(it, copying, block.code.homes)?;
    let place = access.map(|access| block.check_with_value(op, op, access)).transpose()?;
    // What changes some of them, and none is wanted again, need not find the others.
    let passes_on = flags.changes && flags.leaves && block.wants_flags_later();
    let finds = flags.reads || passes_on;
    if let Some(mut place) = place {
        let has_value = temporaries.iter().any(|temporary| temporary.host == VALUE);
        if has_value || accumulator || finds || block.may_save_flags_for(copying.written) {
            place = block.code.without_value(place)?;
        }
        place.give_to(&mut instruction);
    }
    if finds {
        block.want_flags()?;
    }
    if finds || !flags.changes {
        block.overwrite(copying.written)?;
    }
    if accumulator {
        block.code.copy(VALUE, ACCUMULATOR);
    }
    if temporaries.iter().any(|temporary| temporary.host == ADDRESS) {
        block.in_address = None;
    }
    for temporary in &temporaries {
        if temporary.loaded {
            block.code.load(temporary.host, fields::gpr(temporary.guest));
        }
    }
    block.may_fault();
    block.code.emit(&instruction)?;
    block.note_x87(copying, op);
    for temporary in &temporaries {
        if temporary.written {
            block.code.store(fields::gpr(temporary.guest), temporary.host);
        }
    }
    if accumulator {
        block.code.copy(ACCUMULATOR, VALUE);
    }
    if flags.changes && flags.leaves && !passes_on {
        block.unmade_flags();
    } else if flags.changes {
        let again = |()| Producer::of(it, block.step, block.code.homes);
        block.made_flags((!finds).then_some(()).and_then(again));
    }
    if access.is_some() {
        block.resume_here();
    }
    Ok(())
}

/// Instructions whose flags do not depend on earlier ones: logic clears AF on every CPU,
/// whatever the manuals say, and shifts set or clear all of them; what multiplications and scans
/// leave undefined is anybody's.
fn overwrites_flags(it: &Instruction) -> bool {
    match it.mnemonic() {
        M::And | M::Or | M::Xor | M::Test | M::Mul | M::Imul | M::Bsf | M::Bsr => true,
        M::Andn | M::Blsr | M::Blsi | M::Blsmsk | M::Bzhi | M::Bextr => true,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd => {
            let last = it.op_count().saturating_sub(1);
            let wide = it.op0_register().size() == 8 || it.memory_size().size() == 8;
            // Not at all, if the count is none.
            it.try_immediate(last).is_ok_and(|count| count & if wide { 63 } else { 31 } != 0)
        }
        _ => false,
    }
}

/// A guest register that is kept in memory, in a scratch register for one instruction.
struct Temporary {
    guest: u8,
    host: R,
    loaded: bool,
    written: bool,
}

struct Renamed {
    instruction: Instruction,
    temporaries: SmallVec<[Temporary; 2]>,
}

fn rename(it: &Instruction, copying: &Copying, homes: Homes) -> Result<Renamed, NotCopied> {
    let mut it = *it;
    if copying.same && homes.lends_nothing() {
        return Ok(Renamed { instruction: it, temporaries: SmallVec::new() });
    }
    let (accumulator, memory) = (copying.accumulator, copying.access.is_some());
    let mut free: SmallVec<[R; 2]> = SmallVec::new();
    if !accumulator {
        free.push(VALUE);
    }
    if !memory {
        free.push(ADDRESS);
    }
    // One of them may stay there.
    let stays = copying.registers.iter().flatten().find_map(|named| {
        let code = named.in_memory.filter(|_| homes.of(named.number()) == Home::Memory)?;
        Some((named.number(), named.operand.into(), code))
    });
    if let Some((guest, operand, code)) = stays {
        put_in_memory(&mut it, operand, code, fields::gpr(guest))?;
    }
    let mut temporaries: SmallVec<[Temporary; 2]> = SmallVec::new();
    for guest in copying.gprs.iter() {
        if homes.of(guest) == Home::Memory && stays.is_none_or(|(stays, ..)| stays != guest) {
            let host = free.pop().ok_or(NotCopied)?;
            let (loaded, written) = (copying.loaded.has(guest), copying.written.has(guest));
            temporaries.push(Temporary { guest, host, loaded, written });
        }
    }
    for named in copying.registers.iter().flatten() {
        let Named { operand, register, .. } = *named;
        let number = named.number();
        // The encoder refuses a high byte beside what needs a REX prefix.
        if is_high_byte(register) || stays.is_some_and(|(stays, ..)| stays == number) {
            continue;
        }
        let host = match homes.of(number) {
            // Both AL and AH, or an implied RAX: all of them stay in RAX.
            Home::Host(_) if number == 0 && accumulator => R::RAX,
            Home::Host(host) => host,
            Home::Memory => temporaries.iter().find(|t| t.guest == number).ok_or(NotCopied)?.host,
        };
        it.try_set_op_register(operand.into(), part(host, register)).map_err(|_| NotCopied)?;
    }
    Ok(Renamed { instruction: it, temporaries })
}

/// The condition of a Jcc, as its opcode has it.
pub(super) fn condition(instruction: &Instruction) -> Result<u8, NotCopied> {
    use iced_x86::ConditionCode as C;
    Ok(match instruction.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
        C::None => return Err(NotCopied),
    })
}
