//! Families of operations, and the states a family goes through.
//!
//! The table starts out bound to its defaults, so sites work from the first instruction.
//! Whoever [claims](Family::claim) the family holds the only [`Unpatched`] there is and
//! may bind; [`Unpatched::apply`] turns it into a [`Patched`], which can only be re-bound
//! together with its sites. A table that changed without its sites cannot be expressed:
//! when a change fails so badly that sites are left in between
//! ([`PatchError::HalfDone`]), both states refuse everything until `repair` has put them
//! right.

use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use crate::binding::{Binding, Erase, Erased};
use crate::convention::{CallKind, Width};
use crate::engine::{self, State};
use crate::error::{BindError, PatchError};
use crate::pointer::unbound;
use crate::report::{Outcome, Report};
use crate::site::Sites;
use crate::text::Text;

/// What the patcher knows of an op.
#[derive(Clone, Copy, Debug)]
pub struct OpInfo {
    /// Its name.
    pub name: &'static str,
    /// How its sites call it; `None` for direct ops, whose calls are not recorded.
    pub sites: Option<CallKind>,
    /// Number of arguments.
    pub args: usize,
    /// Whether it has a result.
    pub returns: bool,
}

/// The slots of a family's ops, in the order of declaration. Made by
/// [`family!`](crate::family!).
#[derive(Debug)]
#[repr(C)]
pub struct Table<const N: usize> {
    // First: call sites address slots from the table's start.
    slots: [AtomicPtr<()>; N],
    claimed: AtomicBool,
}

impl<const N: usize> Table<N> {
    /// A table bound to its defaults. Ops without one lead to an undefined instruction.
    #[must_use]
    pub const fn new(defaults: &[Option<Erased>; N]) -> Self {
        let mut slots = [const { AtomicPtr::new(core::ptr::null_mut()) }; N];
        let mut i = 0;
        while i < N {
            let target = match &defaults[i] {
                Some(bound) => bound.target,
                None => unbound as *const (),
            };
            slots[i] = AtomicPtr::new(target.cast_mut());
            i += 1;
        }
        Self { slots, claimed: AtomicBool::new(false) }
    }

    /// The slots, without their number in the type.
    #[must_use]
    pub const fn slots(&'static self) -> Slots {
        Slots { slots: &self.slots, claimed: &self.claimed }
    }

    /// What a slot holds.
    #[must_use]
    pub fn load(&self, index: usize) -> *const () {
        self.slots.get(index).map_or(unbound as *const (), |slot| slot.load(Ordering::Acquire))
    }
}

/// A family's slots. Opaque: only the state types store there.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    slots: &'static [AtomicPtr<()>],
    claimed: &'static AtomicBool,
}

impl Slots {
    /// The op whose slot lies at `address`.
    fn index_of(self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(self.slots.as_ptr().addr() as u64)?;
        let index = usize::try_from(offset / 8).ok()?;
        (offset % 8 == 0 && index < self.slots.len()).then_some(index)
    }

    fn store(self, bound: &[Option<Erased>]) {
        for (slot, bound) in self.slots.iter().zip(bound) {
            let target = bound.map_or(unbound as *const (), |bound| bound.target);
            slot.store(target.cast_mut(), Ordering::Release);
        }
    }
}

/// A family, as [`family!`](crate::family!) declares it.
///
/// # Safety
/// Sites in the program that name one of `slots` must be calls of the op at that index.
pub unsafe trait Family: Copy + 'static {
    /// One entry for each op.
    type Bound: AsRef<[Option<Erased>]> + AsMut<[Option<Erased>]> + Copy;
    /// The family's name.
    const NAME: &'static str;
    /// Its ops, in order.
    const OPS: &'static [OpInfo];
    /// The bindings it starts with.
    const DEFAULTS: Self::Bound;
    /// Its slots.
    fn slots() -> Slots;

    /// Takes the right to bind this family: there is one.
    ///
    /// # Errors
    /// [`BindError::Claimed`] when somebody has it.
    fn claim() -> Result<Unpatched<Self>, BindError> {
        if Self::slots().claimed.swap(true, Ordering::AcqRel) {
            return Err(BindError::Claimed { family: Self::NAME });
        }
        Ok(Unpatched { bound: Self::DEFAULTS, half: false })
    }
}

/// An op of a family: a name for its slot and the type of what goes there.
///
/// # Safety
/// Sites and callers of the op at `INDEX` of the family must call it by the convention
/// and signature of `Pointer`: what is bound goes into the slot on that word.
pub unsafe trait Op: Copy {
    /// The family.
    type Family: Family;
    /// What the slot holds: a [`CalleeSave`](crate::CalleeSave), a
    /// [`Plain`](crate::Plain) or a [`JumpTarget`](crate::JumpTarget).
    type Pointer: Copy;
    /// Its place in the table.
    const INDEX: usize;
}

/// What a backend binds in a family, collected op by op.
#[derive(Clone, Copy, Debug)]
pub struct Bindings<F: Family> {
    backend: &'static str,
    bound: F::Bound,
}

impl<F: Family> Bindings<F> {
    /// Nothing bound yet. `backend` is the name that errors and reports will use.
    #[must_use]
    pub fn new(backend: &'static str) -> Self {
        let mut bound = F::DEFAULTS;
        bound.as_mut().fill(None);
        Self { backend, bound }
    }

    /// Binds one op.
    ///
    /// # Errors
    /// [`BindError::Twice`] when it is bound already.
    pub fn bind<O>(&mut self, op: O, binding: Binding<O::Pointer>) -> Result<&mut Self, BindError>
    where
        O: Op<Family = F>,
        Binding<O::Pointer>: Erase,
    {
        let _ = op;
        if let Some(slot) = self.bound.as_mut().get_mut(O::INDEX) {
            if slot.is_some() {
                let op = F::OPS.get(O::INDEX).map_or("?", |info| info.name);
                return Err(BindError::Twice { family: F::NAME, op, backend: self.backend });
            }
            *slot = Some(binding.erased());
        }
        Ok(self)
    }

    /// The ops bound so far: what the backend takes over. The others keep their defaults.
    pub fn ops(&self) -> impl Iterator<Item = &'static str> {
        let bound = self.bound.as_ref().iter().zip(F::OPS);
        bound.filter_map(|(bound, info)| bound.map(|_| info.name))
    }

    /// These bindings over the defaults.
    fn complete(&self) -> Result<F::Bound, BindError> {
        let mut complete = F::DEFAULTS;
        for (slot, bound) in complete.as_mut().iter_mut().zip(self.bound.as_ref()) {
            *slot = bound.or(*slot);
        }
        nothing_missing::<F>(&complete, self.backend)?;
        Ok(complete)
    }
}

/// Whether every op is bound.
fn nothing_missing<F: Family>(bound: &F::Bound, backend: &'static str) -> Result<(), BindError> {
    match bound.as_ref().iter().zip(F::OPS).find(|(bound, _)| bound.is_none()) {
        None => Ok(()),
        Some((_, info)) => Err(BindError::Missing { family: F::NAME, op: info.name, backend }),
    }
}

/// A claimed family whose sites are as the compiler made them: indirect calls.
#[derive(Debug)]
pub struct Unpatched<F: Family> {
    bound: F::Bound,
    /// Whether sites were left in the form that is bound.
    half: bool,
}

impl<F: Family> Unpatched<F> {
    /// Binds the family: `bindings` where they say something, its defaults elsewhere.
    ///
    /// Other threads may be calling: each call finds the old callee or the new one.
    ///
    /// # Errors
    /// [`BindError::Missing`] when an op has neither; nothing is changed then.
    pub fn bind(&mut self, bindings: &Bindings<F>) -> Result<(), BindError> {
        whole::<F>(self.half)?;
        self.bound = bindings.complete()?;
        F::slots().store(self.bound.as_ref());
        Ok(())
    }

    /// Rewrites the family's sites to what is bound. `log` sees every site.
    ///
    /// # Errors
    /// With the family as it was: the text is not changed, or changed back; except for
    /// [`PatchError::HalfDone`], after which it must be [repaired](Self::repair).
    pub fn apply<T: Text>(
        mut self,
        sites: Sites<'_>,
        text: &mut T,
        log: impl FnMut(&Outcome),
    ) -> Result<(Patched<F>, Report), (Self, PatchError)> {
        // Nobody may have bound anything yet: then it is the defaults that must be whole.
        let ready =
            whole::<F>(self.half).and_then(|()| nothing_missing::<F>(&self.bound, "default"));
        if let Err(error) = ready {
            return Err((self, error.into()));
        }
        let new = |op| State::of(&self.bound, op);
        match change::<F, T>(sites, text, |_| State::Original, new, log) {
            Ok(report) => Ok((Patched { bound: self.bound, stray: None }, report)),
            Err(error) => {
                self.half = matches!(error, PatchError::HalfDone(_));
                Err((self, error))
            }
        }
    }

    /// Makes the sites that [`PatchError::HalfDone`] left behind what all others are:
    /// indirect calls. Returns how many there were.
    ///
    /// # Errors
    /// When one still cannot be written; those before it are repaired.
    pub fn repair<T: Text>(&mut self, sites: Sites<'_>, text: &mut T) -> Result<usize, PatchError> {
        let stray = |op| State::of(&self.bound, op);
        let repaired = settle::<F, T>(sites, text, |_| State::Original, stray)?;
        self.half = false;
        Ok(repaired)
    }

    /// Gives the right to bind back, and the family its defaults: whoever claims it next
    /// starts from those. When sites are left half changed, nobody gets it any more.
    pub fn release(self) {
        if !self.half {
            F::slots().store(F::DEFAULTS.as_ref());
            F::slots().claimed.store(false, Ordering::Release);
        }
    }
}

/// A claimed family whose sites were rewritten to what is bound. Every change takes all of
/// the family's records.
#[derive(Debug)]
pub struct Patched<F: Family> {
    bound: F::Bound,
    /// What sites that were left half changed are instead.
    stray: Option<Stray<F::Bound>>,
}

#[derive(Clone, Copy, Debug)]
enum Stray<B> {
    Original,
    Bound(B),
}

impl<B: AsRef<[Option<Erased>]>> Stray<B> {
    fn state(&self, op: usize) -> State {
        match self {
            Self::Original => State::Original,
            Self::Bound(bound) => State::of(bound, op),
        }
    }
}

impl<F: Family> Patched<F> {
    /// Binds anew, table and sites together.
    ///
    /// # Errors
    /// As [`Unpatched::bind`] and [`Unpatched::apply`].
    pub fn rebind<T: Text>(
        &mut self,
        bindings: &Bindings<F>,
        sites: Sites<'_>,
        text: &mut T,
        log: impl FnMut(&Outcome),
    ) -> Result<Report, PatchError> {
        whole::<F>(self.stray.is_some())?;
        let bound = bindings.complete()?;
        // Sites that stay indirect read the slot, so it must not lag behind the text.
        F::slots().store(bound.as_ref());
        let old = |op| State::of(&self.bound, op);
        match change::<F, T>(sites, text, old, |op| State::of(&bound, op), log) {
            Ok(report) => {
                self.bound = bound;
                Ok(report)
            }
            Err(error) => {
                F::slots().store(self.bound.as_ref());
                self.note(&error, Stray::Bound(bound));
                Err(error)
            }
        }
    }

    /// Patches sites that were loaded later: a module's own records.
    ///
    /// What is re-bound or undone afterwards must be given these records too, in one
    /// section with the others: sites that a change does not see keep calling what they
    /// called before it, and the next change refuses them as text changed by somebody else.
    ///
    /// # Errors
    /// As [`Unpatched::apply`].
    pub fn apply_late<T: Text>(
        &mut self,
        sites: Sites<'_>,
        text: &mut T,
        log: impl FnMut(&Outcome),
    ) -> Result<Report, PatchError> {
        whole::<F>(self.stray.is_some())?;
        let new = |op| State::of(&self.bound, op);
        let result = change::<F, T>(sites, text, |_| State::Original, new, log);
        if let Err(error) = &result {
            self.note(error, Stray::Original);
        }
        result
    }

    /// Makes the sites indirect calls again; the bindings stay.
    ///
    /// # Errors
    /// As [`Unpatched::apply`].
    pub fn undo<T: Text>(
        mut self,
        sites: Sites<'_>,
        text: &mut T,
    ) -> Result<Unpatched<F>, (Self, PatchError)> {
        if let Err(error) = whole::<F>(self.stray.is_some()) {
            return Err((self, error.into()));
        }
        let old = |op| State::of(&self.bound, op);
        match change::<F, T>(sites, text, old, |_| State::Original, |_| ()) {
            Ok(_) => Ok(Unpatched { bound: self.bound, half: false }),
            Err(error) => {
                self.note(&error, Stray::Original);
                Err((self, error))
            }
        }
    }

    /// Makes the sites that [`PatchError::HalfDone`] left behind what all others are: the
    /// best form of what is bound. Returns how many there were.
    ///
    /// # Errors
    /// When one still cannot be written; those before it are repaired.
    pub fn repair<T: Text>(&mut self, sites: Sites<'_>, text: &mut T) -> Result<usize, PatchError> {
        let stray = self.stray.unwrap_or(Stray::Bound(self.bound));
        let good = |op| State::of(&self.bound, op);
        let repaired = settle::<F, T>(sites, text, good, |op| stray.state(op))?;
        self.stray = None;
        Ok(repaired)
    }

    /// Remembers what sites were left as, if any were.
    fn note(&mut self, error: &PatchError, stray: Stray<F::Bound>) {
        if matches!(error, PatchError::HalfDone(_)) {
            self.stray = Some(stray);
        }
    }
}

/// Refuses a family with sites that were left half changed.
fn whole<F: Family>(half: bool) -> Result<(), BindError> {
    if half { Err(BindError::HalfDone { family: F::NAME }) } else { Ok(()) }
}

/// A family, as the engine wants to know it.
fn subject<F: Family>() -> engine::Subject<impl Fn(u64) -> Option<usize>> {
    engine::Subject {
        family: F::NAME,
        ops: F::OPS,
        width: Width::Bits64,
        index_of: |slot| F::slots().index_of(slot),
    }
}

/// Ends what [`change`] left half done.
fn settle<F: Family, T: Text>(
    sites: Sites<'_>,
    text: &mut T,
    good: impl Fn(usize) -> State,
    stray: impl Fn(usize) -> State,
) -> Result<usize, PatchError> {
    // SAFETY: as in `change`.
    unsafe { engine::settle(&subject::<F>(), sites, text, good, stray) }
}

/// One rewrite of a family's sites from one state to another.
fn change<F: Family, T: Text>(
    sites: Sites<'_>,
    text: &mut T,
    old: impl Fn(usize) -> State,
    new: impl Fn(usize) -> State,
    log: impl FnMut(&Outcome),
) -> Result<Report, PatchError> {
    // SAFETY: what is bound to an op was given as a `Binding` of the op's own pointer type
    // (`Bindings::bind`, or the declaration's default), and sites are matched with ops by
    // the slot they call through.
    unsafe { engine::rewrite(&subject::<F>(), sites, text, old, new, log) }
}
