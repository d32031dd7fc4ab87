//! A vCPU's translator: how it stands with the translations that all vCPUs of a machine share
//! ([`super::code_cache`]), and what it makes more with ([`super::maker`]).

use std::io;
use std::sync::Arc;

use super::code_cache::{CodeCache, Progress};
use super::config::{BadTranslation, Config};
use super::counters::Counters;
use super::invalidation::Schedule;
use super::maker::Maker;
use super::making::Job;
use super::mode::Mode;
use super::orders::Orders;
use super::patience::Patience;
use super::translations::Entry;
use crate::handle::VcpuHandle;
use crate::memory::code_map::CodeMap;
use crate::native::Stubs;
use crate::observers::Observer;
use crate::system::tsc::host_tsc;

/// See the module's words.
#[derive(Debug)]
pub(crate) struct Translator {
    pub(super) code: Arc<CodeCache>,
    /// What this vCPU has said there to know of.
    pub(super) observer: Arc<Observer>,
    /// What this vCPU knows to have become of code.
    pub(super) progress: Progress,
    /// What it makes translations with.
    pub(super) maker: Maker,
    /// Jobs that were done, for the next ones.
    pub(super) spare: Vec<Job>,
    /// The link that the last block was left by, and the number of the mappings it was left
    /// under.
    pub(super) pending: Option<(u32, u64)>,
    /// Translated code was left at this address because what stood for it is closed.
    pub(super) closed: Option<u64>,
    /// The block at this address must be interpreted this time.
    pub(super) refused: Option<u64>,
    /// Turns of loops until one is taken to be hot.
    turns: u64,
    /// How hot code must be.
    pub(super) patience: Patience,
    /// Who translates beside the vCPU.
    pub(super) orders: Option<Orders>,
    /// When code is to be taken for changed.
    pub(super) invalidation: Option<Schedule>,
}

impl Translator {
    /// One for the vCPU of `handle`, which has `stubs`, and shares `code` with others or has some of
    /// its own.
    ///
    /// # Errors
    /// When the host refuses code memory, or `code` is for vCPUs that have other stubs.
    pub(crate) fn new(
        config: Config,
        code: Option<Arc<CodeCache>>,
        stubs: &Arc<Stubs>,
        handle: VcpuHandle,
    ) -> io::Result<Self> {
        let code = match code {
            Some(code) if !code.names(stubs) => {
                return Err(io::Error::other("vCPUs that share code must share their stubs"));
            }
            Some(code) => code,
            None => Arc::new(CodeCache::new(config.code_cache, stubs)?),
        };
        let observer = code.enrol(handle);
        Ok(Self {
            maker: Maker::new(observer.number(), code.thunks, config.verify),
            observer,
            code,
            progress: Progress::default(),
            spare: Vec::new(),
            pending: None,
            closed: None,
            refused: None,
            turns: config.turns.max(1),
            patience: Patience::new(host_tsc()),
            orders: None,
            invalidation: config.invalidate.map(Schedule::new),
        })
    }

    /// The mistake that it is to make.
    #[cfg(test)]
    pub(crate) fn mistake(&mut self) -> &mut Option<super::Mistake> {
        &mut self.maker.bench.mistake
    }

    /// What it did so far.
    pub(crate) fn counters(&self) -> Counters {
        Counters { used: self.code.used(), capacity: self.code.capacity(), ..self.maker.counters }
    }

    /// The block that was not to be run.
    pub(crate) fn failure(&self) -> Option<&BadTranslation> {
        self.maker.bad.as_ref()
    }

    /// Where the code of the block at `rip` is and how long it is, for whoever wants to look
    /// at it.
    pub(crate) fn listing(&self, rip: u64) -> Option<(u64, usize)> {
        self.code.lock().listing(rip)
    }

    /// The thunks, and where they are executed.
    pub(crate) fn thunk_code(&self) -> (u64, Vec<u8>) {
        let code = self.code.lock().memory.read(0, self.code.fixed()).to_vec();
        (self.code.bounds().start, code)
    }

    /// Forgets all code, which no other vCPU may share.
    pub(crate) fn empty(&mut self) {
        self.code.clear();
        self.pending = None;
    }

    /// Has the link by which the last block was left go straight to `to`, if that is its target:
    /// the code at `rip`, in its mode, under the mappings numbered `mappings`.
    pub(super) fn connect(&mut self, rip: u64, to: Entry, mappings: u64) {
        if let Some((number, left_under)) = self.pending.take()
            && left_under == mappings
        {
            self.code.lock().connect(number, rip, to);
        }
    }

    pub(super) fn turns(&self) -> u64 {
        self.turns
    }

    /// Whether `entry` can still be entered, in `mode`. It may be closed, and lead out again.
    #[inline]
    pub(super) fn holds(&self, entry: Entry, mode: Mode) -> bool {
        entry.mode == mode && self.code.has(entry)
    }

    /// Whether it may go on in translated code without coming by the run loop.
    #[inline(always)]
    pub(super) fn is_current(&self, map: &CodeMap) -> bool {
        self.code.is_up_to_date(map) && self.code.is_current(self.progress)
    }
}
