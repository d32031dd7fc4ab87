//! Translated code for profilers: what perf(1) needs to know of code that is in no file.
//!
//! `--perf-map` gives it names, `--jitdump` the code itself as well. Both are watchers of
//! the vCPUs and are told of each block as it is translated.

mod jitdump;
mod perf_map;
mod symbols;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use softcpu::trace::Event;
use vmm::engine::watch::Watcher;

use crate::Error;
use crate::engine_options::EngineOptions;
use jitdump::JitDump;
use perf_map::PerfMap;
use symbols::Symbols;

/// What is written for profilers during a run.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    map: Option<Arc<PerfMap>>,
    dump: Option<Arc<JitDump>>,
}

/// Reads the names that the options give.
///
/// # Errors
/// They cannot be read, or are for nothing.
pub(crate) fn symbols(options: &EngineOptions) -> Result<Symbols, Error> {
    let Some(path) = &options.symbols else { return Ok(Symbols::default()) };
    if !options.perf_map && !options.jitdump {
        let remedy = "give --perf-map or --jitdump with it";
        return Err(Error::Input(format!("--symbols names nothing by itself: {remedy}")));
    }
    Symbols::open(path)
}

impl Profile {
    /// Opens what the options ask for.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub(crate) fn open(options: &EngineOptions, symbols: Symbols) -> Result<Self, Error> {
        let symbols = Arc::new(symbols);
        let process = std::process::id();
        let map = options.perf_map.then(|| {
            let path = format!("/tmp/perf-{process}.map");
            PerfMap::create(path.as_ref(), Arc::clone(&symbols)).map_err(refused(&path))
        });
        let dump = options.jitdump.then(|| {
            let path = format!("/tmp/jit-{process}.dump");
            JitDump::create(path.as_ref(), process, symbols).map_err(refused(&path))
        });
        Ok(Self { map: map.transpose()?.map(Arc::new), dump: dump.transpose()?.map(Arc::new) })
    }

    /// As watchers of a machine.
    pub(crate) fn watchers(&self) -> impl Iterator<Item = Arc<dyn Watcher>> {
        let map = self.map.clone().map(|map| map as Arc<dyn Watcher>);
        map.into_iter().chain(self.dump.clone().map(|dump| dump as Arc<dyn Watcher>))
    }

    /// Writes out what is buffered. A vCPU that does not stop may hold the files open.
    pub(crate) fn finish(&self) {
        let map = self.map.as_ref().map_or(Ok(()), |map| map.flush());
        let dump = self.dump.as_ref().map_or(Ok(()), |dump| dump.flush());
        if let Err(error) = map.and(dump) {
            tracing::warn!(%error, "what perf is to read is not whole");
        }
    }
}

/// A piece of generated code, as profilers are told of it.
struct Piece<'a> {
    /// Where it is in this process.
    host: u64,
    code: &'a [u8],
    name: String,
}

impl<'a> Piece<'a> {
    /// The one that has come to be, if the event is of that kind.
    fn of(event: Event<'a>, symbols: &Symbols) -> Option<Self> {
        match event {
            Event::Thunks { host, code } => {
                Some(Self { host, code, name: "lguest:thunks".to_owned() })
            }
            Event::Translated { rip, host, code, .. } => {
                Some(Self { host, code, name: symbols.name(rip) })
            }
            _ => None,
        }
    }
}

fn refused(path: &str) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Host(format!("{path}: {error}"))
}

/// Creates a file in a place where anybody may have left one.
fn create(path: &Path) -> io::Result<File> {
    // That of a process that had our number: ours to remove, or else it stays.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    File::options().read(true).write(true).create_new(true).open(path)
}
