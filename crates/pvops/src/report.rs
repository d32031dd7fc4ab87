//! What patching did: counts, and one [`Outcome`] for each site on the way.

use core::fmt;

/// What stands at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The backend's instructions.
    Inline,
    /// Nops.
    Nop,
    /// A move from argument to result (or nothing, where they share a register).
    Identity,
    /// A direct call.
    Direct,
    /// A direct jump.
    Jump,
    /// The indirect call or jump the compiler made, and why it is still there.
    Indirect(Why),
}

/// Why a site is an indirect call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Because it was asked for: nothing applied yet, or undone.
    Unpatched,
    /// The callee lies more than 2 GiB away.
    TooFar,
}

/// One site, after patching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its address.
    pub site: u64,
    /// Its length in bytes.
    pub len: u8,
    /// The op's family.
    pub family: &'static str,
    /// The op.
    pub op: &'static str,
    /// What stands there now.
    pub form: Form,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { site, family, op, form, .. } = self;
        write!(f, "{site:#x} {family}.{op} {form:?}")
    }
}

/// How many sites took which form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Report {
    /// [`Form::Inline`].
    pub inline: usize,
    /// [`Form::Nop`].
    pub nop: usize,
    /// [`Form::Identity`].
    pub identity: usize,
    /// [`Form::Direct`].
    pub direct: usize,
    /// [`Form::Jump`].
    pub jump: usize,
    /// [`Form::Indirect`]: each was named to the log, with the reason.
    pub indirect: usize,
    /// Bytes of text that changed hands.
    pub bytes: usize,
}

impl Report {
    /// All sites.
    #[must_use]
    pub const fn sites(&self) -> usize {
        self.inline + self.nop + self.identity + self.direct + self.jump + self.indirect
    }

    pub(crate) fn count(&mut self, form: Form) {
        *match form {
            Form::Inline => &mut self.inline,
            Form::Nop => &mut self.nop,
            Form::Identity => &mut self.identity,
            Form::Direct => &mut self.direct,
            Form::Jump => &mut self.jump,
            Form::Indirect(_) => &mut self.indirect,
        } += 1;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} sites: {} in line, {} nop, {} identity, {} direct calls, {} jumps, {} left indirect",
            self.sites(),
            self.inline,
            self.nop,
            self.identity,
            self.direct,
            self.jump,
            self.indirect
        )
    }
}
