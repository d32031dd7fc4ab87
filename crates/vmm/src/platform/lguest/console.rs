//! The early console: strings that V1 to V5 print by NOTIFY before they have a driver.

use std::io::Write;

use lguest_abi::Phys;
use lguest_abi::bus::PAGE_BYTES;

use super::Death;
use super::guest_memory::GuestMemory;

/// Where the strings go.
pub(super) struct EarlyConsole(Box<dyn Write + Send>);

impl EarlyConsole {
    pub(super) fn new(output: Box<dyn Write + Send>) -> Self {
        Self(output)
    }

    /// Prints the string at `at`, up to its zero. Linux' are of 17 bytes at most; one
    /// without a zero ends after a page.
    pub(super) fn print(&mut self, memory: &GuestMemory, at: Phys) -> Result<(), Death> {
        memory.check(at, 1)?;
        let bytes = memory.up_to(at, PAGE_BYTES);
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        // A console that cannot be written to is not the guest's fault.
        if let Err(error) = self.0.write_all(text).and_then(|()| self.0.flush()) {
            tracing::debug!(%error, "early console output is lost");
        }
        Ok(())
    }
}
