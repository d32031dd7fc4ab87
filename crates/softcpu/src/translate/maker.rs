//! What a vCPU makes translations with, and gives them their places ([`super::making`],
//! [`super::clone`]): all that it needs of its own for that, while it has the translations of all
//! vCPUs for itself.

use super::config::BadTranslation;
use super::counters::Counters;
use super::regions::Landing;
use super::thunks::Thunks;
use super::verify;
use super::workbench::Workbench;

/// See the module's words.
#[derive(Debug)]
pub(super) struct Maker {
    /// The number of the vCPU.
    pub(super) number: u32,
    pub(super) thunks: Thunks,
    pub(super) bench: Workbench,
    pub(super) counters: Counters,
    /// Every block is looked at before it may run.
    verify: bool,
    /// The block that the last look was not content with.
    pub(super) bad: Option<BadTranslation>,
}

impl Maker {
    /// That of vCPU `number`, for code memory that has `thunks`. It looks at each translation if it
    /// is to `verify` them.
    pub(super) fn new(number: u32, thunks: Thunks, verify: bool) -> Self {
        Self {
            number,
            thunks,
            bench: Workbench::new(),
            counters: Counters::default(),
            verify,
            bad: None,
        }
    }

    /// Looks whether `code`, which stands for the guest's at `rip`, may run at `address`, if that is
    /// wanted.
    pub(super) fn look_at(
        &mut self,
        rip: u64,
        code: &[u8],
        address: u64,
        landings: &[Landing],
    ) -> Option<()> {
        if !self.verify && !cfg!(debug_assertions) {
            return Some(());
        }
        let Err(violation) = verify::verify(code, address, &self.thunks, landings) else {
            return Some(());
        };
        debug_assert!(self.verify, "{violation}");
        self.bad = Some(BadTranslation::new(rip, &violation));
        None
    }

    /// Counts a translation of so many bytes.
    pub(super) fn count(&mut self, guest_bytes: u64, bytes: u32) {
        let counters = &mut self.counters;
        counters.translated = counters.translated.wrapping_add(1);
        counters.guest_bytes = counters.guest_bytes.wrapping_add(guest_bytes);
        counters.bytes = counters.bytes.wrapping_add(bytes.into());
    }
}
