//! What the user decides about a translator, and what it may find out about itself.
//! Comes with the vCPU's configuration.

use std::num::NonZeroU32;

use super::verify::Violation;

/// How a vCPU's code is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Code memory of a machine's vCPUs, bytes: from [`Config::SMALLEST`] to [`Config::LARGEST`].
    pub code_cache: usize,
    /// Every block is looked at before it may run; one that could reach what it may not
    /// ends the vCPU with [`Exit::Failed`](crate::vcpu::Exit::Failed).
    pub verify: bool,
    /// One in so many turns of loops is a sample: a loop found then is likely hot, and gets a
    /// better translation. At least 1; best a prime, so that no loop around it has a turn as long.
    pub turns: u64,
    /// How many accesses of hot user code may look for a mirror in vain ([`crate::mmu`]) until
    /// there is one, if the memory can be mapped again; `None`: there is none.
    pub mirror_after: Option<u32>,
    /// A [`Workshop`](super::Workshop) may translate for it, if whoever makes the vCPU has one.
    pub beside: bool,
    /// Code is taken for changed now and then, though it has not: for tests.
    pub invalidate: Option<Invalidate>,
}

/// How often code is taken for changed that has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidate {
    /// Once every so many times that translated code is entered or has an instruction
    /// interpreted, on average.
    pub every: NonZeroU32,
    /// The same seed draws the same moments and pages.
    pub seed: u64,
}

impl Config {
    /// The least code memory, bytes: room for the thunks and a few of the largest blocks.
    pub const SMALLEST: usize = 256 << 10;
    /// The most, bytes: jumps within it reach 2 GiB.
    pub const LARGEST: usize = 1 << 30;
}

impl Default for Config {
    fn default() -> Self {
        Self {
            code_cache: 128 << 20,
            verify: false,
            turns: 32_749,
            mirror_after: Some(2048),
            beside: true,
            invalidate: None,
        }
    }
}

/// A translation that is not to be run: a bug in the translator, found before it did harm.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the translation of the code at {rip:#x} reaches what it may not ({violation})")]
pub struct BadTranslation {
    /// The guest's code, by its RIP.
    pub rip: u64,
    /// What is wrong with it, and where.
    pub violation: String,
}

impl BadTranslation {
    pub(super) fn new(rip: u64, violation: &Violation) -> Self {
        Self { rip, violation: violation.to_string() }
    }
}
