//! Ctrl-C, noticed rather than obeyed at once, so that what was begun is put away first. A
//! second one is obeyed. SIGTERM is noticed, too, however often: who ends a group sends it twice.

use anyhow::Result;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::low_level::emulate_default_handler;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether there was one.
#[derive(Debug)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From here on SIGINT and SIGTERM are noticed.
    pub(crate) fn watch() -> Result<Self> {
        let came = Arc::new(AtomicBool::new(false));
        flag::register_conditional_default(SIGINT, Arc::clone(&came))?;
        for signal in [SIGINT, SIGTERM] {
            flag::register(signal, Arc::clone(&came))?;
        }
        Ok(Self(came))
    }

    pub(crate) fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Ends the process as SIGINT would have, if one has come: shells want to know.
    pub(crate) fn obey(&self) -> Result<()> {
        if self.came() {
            emulate_default_handler(SIGINT)?;
        }
        Ok(())
    }
}
