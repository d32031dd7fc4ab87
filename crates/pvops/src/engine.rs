//! One rewrite of many sites, all or nothing.
//!
//! First everything is looked at (records, lengths, the bytes that stand there now, the
//! writable window) without changing a byte; then the world is stopped and the sites are
//! written; a failure on the way puts back what was written.

use crate::binding::Erased;
use crate::convention::{Convention, Width};
use crate::error::{PatchError, TextError};
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

    fn text_error(&self, target: &Target, error: TextError) -> PatchError {
        let (site, op) = (target.site.address, target.info.name);
        PatchError::Text { site, family: self.family, op, error }
    }

    /// Compares a site's text with what should stand there.
    fn verify<T: Text>(&self, target: &Target, text: &T, old: &Plan) -> Result<(), PatchError> {
        let (site, op) = (target.site.address, target.info.name);
        let mut bytes = [0; crate::site::SITE_MAX as usize];
        let now = &mut bytes[..usize::from(target.site.len)];
        text.read(site, now).map_err(|error| self.text_error(target, error))?;
        if now != old.bytes() {
            return Err(PatchError::Changed { site, family: self.family, op });
        }
        Ok(())
    }
}

/// Rewrites the subject's sites from `old` to `new`. `log` sees every site when all is
/// done.
///
/// # Errors
/// With the text as it was.
pub fn rewrite<T: Text, I: Fn(u64) -> Option<usize>>(
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
        let kind = target.site.kind;
        let gives_up = Convention::of(width).clobbers(kind);
        if target.info.sites != Some(kind) || target.site.clobbers != gives_up {
            let (site, op) = (target.site.address, target.info.name);
            return Err(PatchError::Kind { site, family: subject.family, op });
        }
        text.covers(target.site.address, usize::from(target.site.len))
            .map_err(|error| subject.text_error(&target, error))?;
        subject.verify(&target, text, &plans(&target).0)?;
    }

    let inside = |address: u64| {
        subject.targets(&sites).flatten().any(|Target { site, .. }| {
            address > site.address && address - site.address < u64::from(site.len)
        })
    };
    text.stop(Spans::new(&inside)).map_err(PatchError::Stop)?;
    let written = write_all(subject, &sites, text, &plans);
    text.resume();
    let bytes = written?;

    let mut report = Report { bytes, ..Report::default() };
    for target in subject.targets(&sites).flatten() {
        let plan = plans(&target).1;
        report.count(plan.form);
        log(&subject.outcome(&target, &plan));
    }
    Ok(report)
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
        let wrote = subject.verify(&target, text, &old).and_then(|()| {
            text.write(target.site.address, new.bytes())
                .map_err(|error| subject.text_error(&target, error))
        });
        if let Err(error) = wrote {
            for target in subject.targets(sites).flatten().take(done) {
                let (old, new) = plans(&target);
                if old.bytes() != new.bytes() {
                    // It was writable a moment ago. Whatever stood in the way may have
                    // been passing; after that there is nobody left to tell.
                    let again = text.write(target.site.address, old.bytes());
                    if again.is_err() {
                        let _ = text.write(target.site.address, old.bytes());
                    }
                }
            }
            return Err(error);
        }
        bytes += new.bytes().len();
    }
    Ok(bytes)
}
