//! What a translator counts: `--stats` and `lguest top` show it.

/// What the translator did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Blocks translated.
    pub translated: u64,
    /// Translations that were moved to where their code is, too.
    pub moved: u64,
    /// Blocks that were translated beside the vCPU, among those.
    pub beside: u64,
    /// Bytes of guest code made there, be it of use still or not.
    pub beside_bytes: u64,
    /// Those that another vCPU had had translated, when this one came to their code.
    pub shared: u64,
    /// Those that were ordered but taken back, for want of patience.
    pub taken_back: u64,
    /// Bytes of guest code translated.
    pub guest_bytes: u64,
    /// Bytes of host code made for both.
    pub bytes: u64,
    /// Times translated code was entered from the run loop.
    pub entered: u64,
    /// Why it was left, by the number of the reason: see [`Counters::EXITS`].
    pub exits: [u64; 8],
    /// Those of them for which an event was waiting.
    pub for_events: u64,
    /// Instructions that translated code had interpreted.
    pub interpreted: u64,
    /// Times accesses did not lie in one page that share a check.
    pub split: u64,
    /// Times a trace was found to be hot.
    pub hot: u64,
    /// Pages that the mirror of a process was given.
    pub mirrored: u64,
    /// Faults of the host that asked for one, and how many of them the interpreter had to take.
    pub mirror_faults: u64,
    /// See there.
    pub mirror_refused: u64,
    /// Times another process got the mirror.
    pub mirror_owners: u64,
    /// Blocks that became stale.
    pub invalidated: u64,
    /// Blocks that had to make room for others.
    pub evicted: u64,
    /// Bytes of code memory in use now by all vCPUs that share it, thunks included.
    pub used: u64,
    /// Bytes of code memory there are for all of them.
    pub capacity: u64,
}

impl Counters {
    /// What the reasons in [`Counters::exits`] are, by number.
    pub const EXITS: [&'static str; 8] =
        ["", "look-up", "new link", "to interpret", "machine", "fault", "closed", ""];

    /// Translated code was left for `reason`, while an event was waiting or not.
    pub(super) fn left(&mut self, reason: u64, event: bool) {
        if let Some(exits) = self.exits.get_mut(reason as usize) {
            *exits = exits.wrapping_add(1);
        }
        self.for_events = self.for_events.wrapping_add(u64::from(event));
    }
}
