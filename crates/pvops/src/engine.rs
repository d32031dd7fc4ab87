//! One rewrite of many sites, all or nothing.
//!
//! First everything is looked at (records, lengths, the bytes that stand there now, the
//! writable window) without changing a byte; then the world is stopped and the sites are
//! written; a failure on the way puts back what was written. When that fails too, the
//! error says which sites were left, and [`settle`] is the way out.

use crate::binding::Erased;
use crate::convention::{Convention, Width};
use crate::error::{Cause, HalfDone, PatchError};
use crate::family::OpInfo;
use crate::plan::{self, Plan};
use crate::report::{Outcome, Report, Why};
use crate::site::{Site, Sites};
use crate::text::{Spans, Text};

/// What stands, or shall stand, at the sites of an op.
#[derive(Clone, Copy, Debug)]
pub enum State {
    /// What the compiler made.
    Original,
    /// The best form of this binding.
    Bound(Erased),
}

impl State {
    pub(crate) fn of(bound: &impl AsRef<[Option<Erased>]>, op: usize) -> Self {
        bound.as_ref().get(op).copied().flatten().map_or(Self::Original, Self::Bound)
    }

    fn plan(&self, site: &Site, width: Width) -> Plan {
        match self {
            Self::Original => plan::original(site, width, Why::Unpatched),
            Self::Bound(bound) => plan::plan(site, bound, width),
        }
    }
}

/// Whose sites are rewritten, and what code they are.
#[derive(Clone, Copy, Debug)]
pub struct Subject<I> {
    /// The family's name.
    pub family: &'static str,
    /// Its ops.
    pub ops: &'static [OpInfo],
    /// The mode its sites run in.
    pub width: Width,
    /// The op whose slot lies at an address; `None` for other families' slots.
    pub index_of: I,
}

/// One site of the subject.
struct Target {
    site: Site,
    index: usize,
    info: OpInfo,
}

impl<I: Fn(u64) -> Option<usize>> Subject<I> {
    fn targets<'a>(
        &'a self,
        sites: &Sites<'a>,
    ) -> impl Iterator<Item = Result<Target, PatchError>> + use<'a, I> {
        sites.iter().filter_map(move |site| {
            let site = match site {
                Ok(site) => site,
                Err(error) => return Some(Err(error.into())),
            };
            let index = (self.index_of)(site.slot)?;
            let info = *self.ops.get(index)?;
            Some(Ok(Target { site, index, info }))
        })
    }

    fn outcome(&self, target: &Target, plan: &Plan) -> Outcome {
        let Site { address: site, len, .. } = target.site;
        Outcome { site, len, family: self.family, op: target.info.name, form: plan.form }
    }

    fn error(&self, target: &Target, cause: Cause) -> PatchError {
        let (site, family, op) = (target.site.address, self.family, target.info.name);
        match cause {
            Cause::Changed => PatchError::Changed { site, family, op },
            Cause::Text(error) => PatchError::Text { site, family, op, error },
        }
    }

    /// Looks at records and window: everything that can be told without the text.
    fn acceptable<T: Text>(&self, target: &Target, text: &T) -> Result<(), PatchError> {
        let Site { address: site, len, kind, clobbers, .. } = target.site;
        let gives_up = Convention::of(self.width).clobbers(kind);
        if target.info.sites != Some(kind) || clobbers != gives_up {
            return Err(PatchError::Kind { site, family: self.family, op: target.info.name });
        }
        text.covers(site, usize::from(len)).map_err(|error| self.error(target, error.into()))
    }
}

/// Whether one of these stands at a site.
fn stands<T: Text>(target: &Target, text: &T, plans: &[&Plan]) -> Result<(), Cause> {
    let mut bytes = [0; crate::site::SITE_MAX as usize];
    let now = &mut bytes[..usize::from(target.site.len)];
    text.read(target.site.address, now)?;
    if plans.iter().any(|plan| plan.bytes() == now) { Ok(()) } else { Err(Cause::Changed) }
}

/// Writes a site over what must stand there.
fn replace<T: Text>(target: &Target, text: &mut T, old: &[&Plan], new: &Plan) -> Result<(), Cause> {
    stands(target, text, old)?;
    // SAFETY: the world is stopped, and by the promise of whoever called `rewrite` or
    // `settle` the plan is the op's call in another form.
    Ok(unsafe { text.write(target.site.address, new.bytes()) }?)
}

/// Rewrites the subject's sites from `old` to `new`. `log` sees every site when all is
/// done.
///
/// # Errors
/// With the text as it was, except for [`PatchError::HalfDone`].
///
/// # Safety
/// What `new` binds to an op must be callable from that op's sites: by its convention,
/// with its signature, and its template must do the same
/// ([`Binding::inline`](crate::Binding::inline)).
pub unsafe fn rewrite<T: Text, I: Fn(u64) -> Option<usize>>(
    subject: &Subject<I>,
    sites: Sites<'_>,
    text: &mut T,
    old: impl Fn(usize) -> State,
    new: impl Fn(usize) -> State,
    mut log: impl FnMut(&Outcome),
) -> Result<Report, PatchError> {
    let width = subject.width;
    let plans = |target: &Target| {
        let (site, index) = (&target.site, target.index);
        (old(index).plan(site, width), new(index).plan(site, width))
    };

    for target in subject.targets(&sites) {
        let target = target?;
        subject.acceptable(&target, text)?;
        stands(&target, text, &[&plans(&target).0]).map_err(|e| subject.error(&target, e))?;
    }

    let bytes = stopped(subject, sites, text, |text| write_all(subject, &sites, text, &plans))??;

    let mut report = Report { bytes, ..Report::default() };
    for target in subject.targets(&sites).flatten() {
        let plan = plans(&target).1;
        report.count(plan.form);
        log(&subject.outcome(&target, &plan));
    }
    Ok(report)
}

/// Does something to the text while nobody else runs, or is inside a site.
fn stopped<T: Text, R, I: Fn(u64) -> Option<usize>>(
    subject: &Subject<I>,
    sites: Sites<'_>,
    text: &mut T,
    change: impl FnOnce(&mut T) -> R,
) -> Result<R, PatchError> {
    let inside = |address: u64| {
        subject.targets(&sites).flatten().any(|Target { site, .. }| {
            address > site.address && address - site.address < u64::from(site.len)
        })
    };
    text.stop(Spans::new(&inside)).map_err(PatchError::Stop)?;
    let result = change(text);
    text.resume();
    Ok(result)
}

/// Writes all sites, or puts back those it wrote. Returns the bytes written.
fn write_all<T: Text, I: Fn(u64) -> Option<usize>>(
    subject: &Subject<I>,
    sites: &Sites<'_>,
    text: &mut T,
    plans: &impl Fn(&Target) -> (Plan, Plan),
) -> Result<usize, PatchError> {
    let mut bytes = 0;
    for (done, target) in subject.targets(sites).flatten().enumerate() {
        let (old, new) = plans(&target);
        if old.bytes() == new.bytes() {
            continue;
        }
        let Err(cause) = replace(&target, text, &[&old], &new) else {
            bytes += new.bytes().len();
            continue;
        };
        return Err(match put_back(subject, sites, text, plans, done) {
            None => subject.error(&target, cause),
            Some((left, left_op, count)) => {
                let (family, site, op) = (subject.family, target.site.address, target.info.name);
                PatchError::HalfDone(HalfDone { family, site, op, cause, left, left_op, count })
            }
        });
    }
    Ok(bytes)
}

/// Puts the first `done` sites back. Returns the first that does not take it, its op, and
/// how many do not.
fn put_back<T: Text, I: Fn(u64) -> Option<usize>>(
    subject: &Subject<I>,
    sites: &Sites<'_>,
    text: &mut T,
    plans: &impl Fn(&Target) -> (Plan, Plan),
    done: usize,
) -> Option<(u64, &'static str, usize)> {
    let mut left = None;
    for target in subject.targets(sites).flatten().take(done) {
        let (old, new) = plans(&target);
        if old.bytes() == new.bytes() {
            continue;
        }
        // It was writable a moment ago: whatever stood in the way may have been passing.
        let back = replace(&target, text, &[&old, &new], &old)
            .or_else(|_| replace(&target, text, &[&old, &new], &old));
        if back.is_err() && stands(&target, text, &[&old]).is_err() {
            left.get_or_insert((target.site.address, target.info.name, 0)).2 += 1;
        }
    }
    left
}

/// Brings sites of which each is in one of two states all to the first: what is to be done
/// after [`PatchError::HalfDone`]. Returns the number of sites that it changed.
///
/// # Errors
/// At the first site that is in neither state or cannot be written; those before it are in
/// the good state, and trying again later does no harm.
///
/// # Safety
/// As [`rewrite`], of what `good` binds.
pub unsafe fn settle<T: Text, I: Fn(u64) -> Option<usize>>(
    subject: &Subject<I>,
    sites: Sites<'_>,
    text: &mut T,
    good: impl Fn(usize) -> State,
    stray: impl Fn(usize) -> State,
) -> Result<usize, PatchError> {
    let plans = |target: &Target| {
        let (site, index, width) = (&target.site, target.index, subject.width);
        (good(index).plan(site, width), stray(index).plan(site, width))
    };
    for target in subject.targets(&sites) {
        let target = target?;
        subject.acceptable(&target, text)?;
        let (good, stray) = plans(&target);
        stands(&target, text, &[&good, &stray]).map_err(|e| subject.error(&target, e))?;
    }
    stopped(subject, sites, text, |text| {
        let mut changed = 0;
        for target in subject.targets(&sites).flatten() {
            let (good, stray) = plans(&target);
            if stands(&target, text, &[&good]).is_err() {
                replace(&target, text, &[&stray], &good).map_err(|e| subject.error(&target, e))?;
                changed += 1;
            }
        }
        Ok(changed)
    })?
}
