//! perf's map of generated code: address, length and name of each piece, a line each.
//!
//! perf looks into /tmp/perf-PID.map for what lies in no file. Source:
//! tools/perf/Documentation/jit-interface.txt of the Linux sources.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use softcpu::trace::{Event, Tracer};
use vmm::engine::watch::Watcher;

use super::Piece;
use super::symbols::Symbols;

/// The map of a run.
#[derive(Debug)]
pub(super) struct PerfMap {
    lines: Arc<Mutex<BufWriter<File>>>,
    symbols: Arc<Symbols>,
}

impl PerfMap {
    /// Creates it at `path`.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn create(path: &Path, symbols: Arc<Symbols>) -> io::Result<Self> {
        let lines = BufWriter::with_capacity(1 << 16, super::create(path)?);
        Ok(Self { lines: Arc::new(Mutex::new(lines)), symbols })
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

impl Watcher for PerfMap {
    fn tracer(&self, _vcpu: usize) -> Option<Box<dyn Tracer>> {
        let (lines, symbols) = (Arc::clone(&self.lines), Arc::clone(&self.symbols));
        Some(Box::new(Names { lines, symbols }))
    }
}

/// Names one vCPU's code.
struct Names {
    lines: Arc<Mutex<BufWriter<File>>>,
    symbols: Arc<Symbols>,
}

impl Tracer for Names {
    fn event(&mut self, event: Event<'_>) {
        let Some(Piece { host, code, name }) = Piece::of(event, &self.symbols) else { return };
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk costs names, not the guest.
        let _ = writeln!(lines, "{host:x} {:x} {name}", code.len());
    }

    fn wants_blocks(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("perf.map");
        std::fs::write(&path, "of another process").unwrap();
        let map = PerfMap::create(&path, Arc::default()).unwrap();
        let mut tracer = map.tracer(0).unwrap();
        assert!(!tracer.wants_blocks());
        tracer.event(Event::Thunks { host: 0x1000, code: &[0; 16] });
        let (rip, user, instructions, host) = (0x42, true, 1, 0x2000);
        tracer.event(Event::Translated { rip, user, instructions, host, code: &[0; 32] });
        tracer.event(Event::Evicted { host: 0x2000, len: 0x1000, blocks: 1 });
        map.flush().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "1000 10 lguest:thunks\n2000 20 guest:0x42\n");
    }
}
