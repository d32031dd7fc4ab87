//! What the verifier knows of addresses and of the two scratch registers.

use iced_x86::Register as R;

use super::pointers::Pointer;
use crate::translate::fields::Field;

/// A part of an address, in the order in which it was added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Term {
    Register(R, u32),
    Field(u32, u32),
    /// The upper half was cut off.
    Narrow,
    /// All but the lowest 16 bits was.
    Lowest,
}

/// An address: its parts and what is added to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) terms: Vec<Term>,
    pub(super) offset: i64,
}

impl Sum {
    /// What `field` of the vCPU has.
    pub(super) fn field(Field(at): Field) -> Self {
        Self { terms: vec![Term::Field(at, 1)], offset: 0 }
    }

    /// Its lower half.
    pub(super) fn narrow(mut self) -> Self {
        if !self.is_narrow() {
            self.terms.push(Term::Narrow);
        }
        self
    }

    /// Whether it has nothing in its upper half.
    pub(super) fn is_narrow(&self) -> bool {
        matches!(self.terms.last(), Some(Term::Narrow | Term::Lowest))
    }

    /// Its lowest 16 bits; none that are known of what is cut off already. What was added before is
    /// part of [`Sum::offset`] still, so nothing may be added behind.
    pub(super) fn lowest(mut self) -> Option<Self> {
        if self.is_fixed() {
            return None;
        }
        self.terms.push(Term::Lowest);
        Some(self)
    }

    /// Whether it has been cut off like that, so that no distance may be added to it any more.
    pub(super) fn is_fixed(&self) -> bool {
        self.terms.contains(&Term::Lowest)
    }

    /// Whether it may have wrapped on the way.
    fn may_have_wrapped(&self) -> bool {
        self.terms.iter().any(|term| matches!(term, Term::Narrow | Term::Lowest))
    }

    /// What has the same lower half, and may have anything as its upper one.
    pub(super) fn unlimited(mut self) -> Self {
        self.terms.pop_if(|term| *term == Term::Narrow);
        self
    }
}

/// What a scratch register holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Known {
    Nothing,
    Address(Sum),
    /// Bits of the address that choose an entry of the TLB.
    Index(Sum),
    /// The entry for this address.
    Entry(Sum),
    /// The page of this address, and with the address space.
    Page(Sum),
    Tag(Sum),
    /// How far this address lies behind the page of a stream.
    InPage(u8, Sum),
    /// Where the page of the first address is in host memory that a TLB check was of.
    HostPage(Shown),
    /// Where the page of a stream is in host memory; how far in it the first address is that may
    /// be accessed, the other scratch register says.
    PageOf(Shown),
    /// The number of the span of addresses that this one lies in.
    Span(Sum),
    /// What the mirror's table says of that span.
    SpanEntry(Sum),
    /// The base of GS, as the table of pages behind it has it.
    GsBase,
    /// Where the TLB's tables are.
    Tables,
    /// Where those of another view are.
    View,
    /// What makes host addresses of the guest addresses that a TLB check was of.
    Addend(Shown),
    /// Where events are raised.
    Events,
    /// Which of these units are loaded.
    Units(u64),
    /// An index into the jump cache.
    Slot,
    /// A host address that may be accessed at some distances.
    Pointer(Pointer),
    /// A host address that so many bytes may be accessed at.
    Host {
        len: i64,
        stores: bool,
    },
}

/// What a TLB check shows: an access from the first to the last address may be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) first: Sum,
    pub(super) last: Sum,
    pub(super) stores: bool,
    /// How far the entry lies behind what the index chose, or behind the tables' beginning.
    pub(super) at: u64,
}

impl Shown {
    pub(super) fn has(&self, part: &Term) -> bool {
        let of = |term: &Term| match (term, part) {
            (Term::Register(a, _), Term::Register(b, _)) => a == b,
            (Term::Field(a, _), Term::Field(b, _)) => a == b,
            _ => false,
        };
        self.first.terms.iter().chain(&self.last.terms).any(of)
    }

    /// What may be accessed from the host address of `sum`, if it was shown of its parts.
    pub(super) fn from(&self, sum: &Sum) -> Option<Pointer> {
        let same = self.first.terms == sum.terms && self.last.terms == sum.terms;
        // One that may have wrapped is as far from the others as it seems only between them.
        let between = (self.first.offset..=self.last.offset).contains(&sum.offset);
        (same && (between || !sum.may_have_wrapped())).then_some(Pointer {
            first: self.first.offset.checked_sub(sum.offset)?,
            last: self.last.offset.checked_sub(sum.offset)?,
            stores: self.stores,
        })
    }

    /// `register` changes by `distance`; `None`: by no constant. Says whether this still holds,
    /// for what the register is then.
    pub(super) fn changes(&mut self, register: R, distance: Option<i64>) -> bool {
        let mut moves = Some(0_i64);
        for term in &self.first.terms {
            if let Term::Register(part, factor) = term
                && *part == register
            {
                let by = distance.and_then(|distance| distance.checked_mul(i64::from(*factor)));
                moves = moves.and_then(|moves| moves.checked_add(by?));
            }
        }
        let Some(moves) = moves else { return false };
        let offsets = [&mut self.first.offset, &mut self.last.offset];
        offsets
            .into_iter()
            .all(|offset| offset.checked_sub(moves).map(|moved| *offset = moved).is_some())
    }

    /// The same where `part`, its first of two, has been added already.
    pub(super) fn without(&self, part: &Term) -> Option<Self> {
        let [first, second] = self.first.terms.as_slice() else { return None };
        let rest = |sum: &Sum| Sum { terms: vec![*second], offset: sum.offset };
        (first == part && self.last.terms == self.first.terms).then(|| Self {
            first: rest(&self.first),
            last: rest(&self.last),
            ..*self
        })
    }

    /// What may be accessed from `distance` behind the first address on.
    pub(super) fn behind_first(&self, distance: i64) -> Option<Pointer> {
        let len = self.last.offset.checked_sub(self.first.offset)?;
        Pointer { first: 0, last: len, stores: self.stores }.moved(distance)
    }

    /// Whether it covers `size` bytes at the sum of `terms` and `offset`.
    pub(super) fn covers(&self, terms: &[Term], offset: i64, size: i64) -> bool {
        self.first.terms == terms
            && self.last.terms == terms
            && offset >= self.first.offset
            && offset.saturating_add(size).saturating_sub(1) <= self.last.offset
    }
}
