//! What can go wrong, each naming the site and the op it happened at.

use core::fmt;

use crate::site::RecordError;

/// Binding refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BindError {
    /// The family is in somebody else's hands.
    Claimed {
        /// The family.
        family: &'static str,
    },
    /// An op was bound twice by one backend.
    Twice {
        /// The family.
        family: &'static str,
        /// The op.
        op: &'static str,
        /// The backend.
        backend: &'static str,
    },
    /// Sites of the family were left half changed ([`PatchError::HalfDone`]): they must be
    /// repaired before anything else.
    HalfDone {
        /// The family.
        family: &'static str,
    },
    /// An op without a default was not bound.
    Missing {
        /// The family.
        family: &'static str,
        /// The op.
        op: &'static str,
        /// The backend.
        backend: &'static str,
    },
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Claimed { family } => write!(f, "family {family} is claimed already"),
            Self::Twice { family, op, backend } => {
                write!(f, "backend {backend} binds {family}.{op} twice")
            }
            Self::HalfDone { family } => {
                write!(f, "family {family} has sites that were left half changed: repair it first")
            }
            Self::Missing { family, op, backend } => {
                write!(f, "backend {backend} does not bind {family}.{op}, which has no default")
            }
        }
    }
}

impl core::error::Error for BindError {}

/// What a [`Text`](crate::Text) could not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TextError {
    /// The bytes lie outside what may be written.
    OutsideWindow,
    /// A window does not begin and end on page boundaries.
    Unaligned {
        /// The boundary that is not one.
        address: u64,
    },
    /// The operating system refused, with this error number.
    Refused {
        /// What it was asked for.
        call: &'static str,
        /// Its answer (`errno`).
        errno: i32,
    },
    /// The other CPUs or threads could not be brought to a halt outside the sites.
    NotStopped,
    /// The text no longer comes from the mapping that was written: somebody mapped over it.
    Replaced,
    /// More threads than the stopper has room for.
    TooManyThreads,
}

impl fmt::Display for TextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutsideWindow => write!(f, "it lies outside the writable window"),
            Self::Unaligned { address } => {
                write!(f, "the window's boundary {address:#x} is not a page boundary")
            }
            Self::Refused { call, errno } => write!(f, "{call} failed with error {errno}"),
            Self::NotStopped => write!(f, "the other threads could not be stopped outside it"),
            Self::Replaced => write!(f, "somebody else has mapped over it"),
            Self::TooManyThreads => write!(f, "there are too many threads to stop"),
        }
    }
}

impl core::error::Error for TextError {}

/// What went wrong at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The bytes there are not what was last put there.
    Changed,
    /// They could not be read or written.
    Text(TextError),
}

impl From<TextError> for Cause {
    fn from(error: TextError) -> Self {
        Self::Text(error)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Changed => write!(f, "the text was changed by somebody else"),
            Self::Text(error) => error.fmt(f),
        }
    }
}

/// A change that failed half way and could not be taken back: some sites have their new
/// form, all others the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HalfDone {
    /// The family.
    pub family: &'static str,
    /// The site where the change failed.
    pub site: u64,
    /// The op there.
    pub op: &'static str,
    /// Why it did.
    pub cause: Cause,
    /// The first site that could not be put back.
    pub left: u64,
    /// The op there.
    pub left_op: &'static str,
    /// How many sites could not be put back.
    pub count: usize,
}

impl fmt::Display for HalfDone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, site, op, cause, left, left_op, count } = self;
        write!(
            f,
            "site {site:#x} of {family}.{op}: {cause}; and {count} changed before it could not be \
             put back, the first at {left:#x} of {family}.{left_op}: repair the family"
        )
    }
}

/// Patching refused; the text is as it was before, unless it is [`PatchError::HalfDone`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PatchError {
    /// The new bindings are not acceptable.
    Bind(BindError),
    /// The section of site records is not what the macros write.
    Record(RecordError),
    /// A record's kind of call, or what it gives up, is not its op's.
    Kind {
        /// The site's address.
        site: u64,
        /// The op's family.
        family: &'static str,
        /// The op.
        op: &'static str,
    },
    /// The bytes at the site are not what was last put there.
    Changed {
        /// The site's address.
        site: u64,
        /// The op's family.
        family: &'static str,
        /// The op.
        op: &'static str,
    },
    /// The text could not be read or written, and everything written before was put back.
    Text {
        /// The site's address.
        site: u64,
        /// The op's family.
        family: &'static str,
        /// The op.
        op: &'static str,
        /// Why.
        error: TextError,
    },
    /// The text could not be written, and not everything written before be put back.
    HalfDone(HalfDone),
    /// The world could not be stopped for the change.
    Stop(TextError),
}

impl fmt::Display for PatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bind(error) => error.fmt(f),
            Self::Record(error) => error.fmt(f),
            Self::Kind { site, family, op } => {
                write!(f, "site {site:#x}: its record is not one of a call of {family}.{op}")
            }
            Self::Changed { site, family, op } => {
                write!(f, "site {site:#x} of {family}.{op}: {}", Cause::Changed)
            }
            Self::HalfDone(half) => half.fmt(f),
            Self::Text { site, family, op, error } => {
                write!(f, "site {site:#x} of {family}.{op}: {error}")
            }
            Self::Stop(error) => write!(f, "nothing was patched: {error}"),
        }
    }
}

impl core::error::Error for PatchError {}

impl From<BindError> for PatchError {
    fn from(error: BindError) -> Self {
        Self::Bind(error)
    }
}

impl From<RecordError> for PatchError {
    fn from(error: RecordError) -> Self {
        Self::Record(error)
    }
}
