//! Where guest registers are while translated code runs.
//!
//! Nearly all sit in the host registers of the same name, so that instructions with
//! implied operands (shifts by CL, products in RDX) need no moves. Three host registers
//! are taken: RSP is the host's stack, RAX and R13 are scratch. RAX is one of them because
//! `lahf` and `seto` are the cheapest way to keep flags. Guest RAX, RSP and R13 move to R11,
//! R15 and R14, and what compilers use last stays in memory: R11, R14 and R15.
//!
//! So it is between traces. Within one, a register that it does not need may lend its place
//! to one of those three that it does ([`Homes::lend`]).

use iced_x86::Register as R;

/// Scratch: flags, and values on their way to or from registers kept in memory.
pub(super) const VALUE: R = R::RAX;
/// Scratch: addresses.
pub(super) const ADDRESS: R = R::R13;
/// Guest RSP.
pub(super) const STACK: R = R::R15;
/// Guest RAX.
pub(super) const ACCUMULATOR: R = R::R11;

/// Where a guest register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// In this host register (64 bits).
    Host(R),
    /// In the vCPU's state.
    Memory,
}

/// Where guest register `number` is between traces.
fn home(number: u8) -> Home {
    match number {
        0 => Home::Host(ACCUMULATOR),
        4 => Home::Host(STACK),
        13 => Home::Host(R::R14),
        11 | 14 | 15 => Home::Memory,
        number => Home::Host(whole(number)),
    }
}

/// Guest registers in host registers, with their numbers.
pub(super) fn pinned() -> impl Iterator<Item = (u8, R)> {
    (0..16).filter_map(|number| match home(number) {
        Home::Host(host) => Some((number, host)),
        Home::Memory => None,
    })
}

/// A host register that is not its owner's for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Loan {
    pub(super) host: R,
    /// Whose it is: a guest register, which waits in memory.
    pub(super) owner: u8,
    /// Who has it.
    pub(super) user: u8,
    /// The user is changed while it has it.
    pub(super) changes: bool,
}

/// Where guest registers are at some point of a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Homes {
    /// As many as there are registers in memory.
    loans: [Option<Loan>; 3],
    /// Their owners and users: the others are where they are between traces.
    moved: GprSet,
}

impl Homes {
    /// Registers whose host register no instruction implies.
    pub(super) const LENDERS: [u8; 7] = [6, 7, 8, 9, 10, 12, 13];
    /// Those that are in memory between traces.
    pub(super) const BORROWERS: [u8; 3] = [11, 14, 15];

    /// Gives the place of `owner` to `user`, one of [`Homes::BORROWERS`].
    pub(super) fn lend(&mut self, owner: u8, user: u8, changes: bool) {
        if let Home::Host(host) = home(owner)
            && let Some(free) = self.loans.iter_mut().find(|loan| loan.is_none())
        {
            *free = Some(Loan { host, owner, user, changes });
            self.moved = self.moved.or(GprSet::of(owner)).or(GprSet::of(user));
        }
    }

    /// What is lent.
    pub(super) fn loans(&self) -> impl Iterator<Item = Loan> + use<> {
        self.loans.into_iter().flatten()
    }

    /// Whether all registers are where they are between traces.
    pub(super) fn lends_nothing(&self) -> bool {
        self.moved == GprSet::NONE
    }

    /// Where guest register `number` is.
    pub(super) fn of(&self, number: u8) -> Home {
        if !self.moved.has(number) {
            return home(number);
        }
        for loan in self.loans() {
            if loan.user == number {
                return Home::Host(loan.host);
            }
            if loan.owner == number {
                return Home::Memory;
            }
        }
        home(number)
    }
}

/// A set of guest registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GprSet(u16);

impl GprSet {
    /// None.
    pub(super) const NONE: Self = Self(0);
    /// All of them.
    pub(super) const ALL: Self = Self(u16::MAX);

    /// Register `number` alone.
    pub(super) const fn of(number: u8) -> Self {
        Self(1 << (number & 15))
    }

    /// Those that are in either.
    pub(super) const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that are in both.
    pub(super) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether one is in both.
    pub(super) const fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// How many there are.
    pub(super) const fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether register `number` is in it.
    pub(super) const fn has(self, number: u8) -> bool {
        self.0 & 1 << (number & 15) != 0
    }

    /// Their numbers, in order.
    pub(super) fn iter(self) -> impl Iterator<Item = u8> {
        let next = |left: &u16| Some(left & left.wrapping_sub(1));
        let lefts = std::iter::successors(Some(self.0), next);
        lefts.take_while(|left| *left != 0).map(|left| left.trailing_zeros() as u8)
    }
}

impl FromIterator<u8> for GprSet {
    fn from_iter<T: IntoIterator<Item = u8>>(numbers: T) -> Self {
        numbers.into_iter().fold(Self::NONE, |all, number| all.or(Self::of(number)))
    }
}

/// The 64-bit register `number`.
#[allow(clippy::arithmetic_side_effects, reason = "sixteen registers follow one another")]
pub(super) fn whole(number: u8) -> R {
    R::RAX + u32::from(number & 15)
}

/// The part of the 64-bit register `full` that is as wide as `like`, which is not AH to BH.
#[allow(clippy::arithmetic_side_effects, reason = "sixteen registers follow one another")]
pub(super) fn part(full: R, like: R) -> R {
    let number = full.number() as u32 & 15;
    match (like.size(), number) {
        (8, _) => R::RAX + number,
        (4, _) => R::EAX + number,
        (2, _) => R::AX + number,
        // In iced-x86's order AH to BH come between BL and SPL.
        (_, 0..4) => R::AL + number,
        (_, _) => R::SPL + (number - 4),
    }
}

/// The lower `word` bytes of the 64-bit register `full`: 1, 2, 4, or all 8.
pub(super) fn of_word(full: R, word: u8) -> R {
    let like = match word {
        1 => R::CL,
        2 => R::CX,
        4 => R::ECX,
        _ => R::RCX,
    };
    part(full, like)
}

/// Whether `register` is AH, CH, DH or BH.
pub(super) fn is_high_byte(register: R) -> bool {
    matches!(register, R::AH | R::CH | R::DH | R::BH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_the_width_and_the_number_asked_for() {
        for number in 0..16 {
            for like in [R::AL, R::R9L, R::AX, R::ECX, R::RSI] {
                let part = part(whole(number), like);
                assert_eq!(part.size(), like.size());
                assert_eq!(part.full_register(), whole(number));
                assert!(!is_high_byte(part));
            }
        }
    }

    #[test]
    fn a_lender_waits_in_memory_while_a_borrower_has_its_place() {
        let mut homes = Homes::default();
        for (owner, user) in Homes::LENDERS.into_iter().zip(Homes::BORROWERS) {
            let place = homes.of(owner);
            assert_eq!((place == Home::Memory, homes.of(user)), (false, Home::Memory));
            homes.lend(owner, user, true);
            assert_eq!((homes.of(owner), homes.of(user)), (Home::Memory, place));
        }
        let mut hosts: Vec<Home> = (0..16).map(|number| homes.of(number)).collect();
        hosts.retain(|home| *home != Home::Memory);
        assert_eq!(hosts.len(), pinned().count());
    }

    #[test]
    fn a_set_has_what_was_put_into_it() {
        for numbers in [vec![], vec![0], vec![15], vec![0, 3, 4, 15], (0..16).collect()] {
            let set: GprSet = numbers.iter().rev().copied().collect();
            assert_eq!(set.iter().collect::<Vec<_>>(), numbers);
            assert_eq!(set.count() as usize, numbers.len());
            assert_eq!(set.meets(GprSet::of(3).or(GprSet::of(15))), set.has(3) || set.has(15));
            for number in 0..16 {
                assert_eq!(set.has(number), numbers.contains(&number));
            }
        }
    }

    #[test]
    fn no_two_guest_registers_share_a_host_register() {
        let mut hosts: Vec<R> = pinned().map(|(_, host)| host).collect();
        hosts.extend([VALUE, ADDRESS, R::RSP]);
        hosts.sort();
        hosts.dedup();
        assert_eq!(hosts.len(), 16);
    }
}
