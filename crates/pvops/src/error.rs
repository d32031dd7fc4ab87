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

/// Patching refused; the text is as it was before.
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
    /// The text could not be written, and everything written before was put back.
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
                write!(f, "site {site:#x} of {family}.{op}: the text was changed by somebody else")
            }
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
