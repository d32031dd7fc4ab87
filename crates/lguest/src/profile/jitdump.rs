//! perf's dump of generated code: name, address, time and the code itself of each piece, so
//! that perf can tell apart what lay at one address at different times, and show it.
//!
//! `perf record -k mono` sees the file being mapped and remembers it; `perf inject --jit`
//! then makes a small ELF file of each piece. Source:
//! tools/perf/Documentation/jitdump-specification.txt of the Linux sources, version 1.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};
use rustix::time::ClockId;
use softcpu::trace::{Event, Tracer};
use vmm::engine::watch::Watcher;

use super::Piece;
use super::symbols::Symbols;

/// "JiTD", as a number of the machine's.
const MAGIC: u32 = 0x4a69_5444;
const VERSION: u32 = 1;
const HEADER: u32 = 40;
/// ELF's number of this architecture.
const EM_X86_64: u32 = 62;
/// A record for a piece of code, and its length without name and code.
const JIT_CODE_LOAD: u32 = 0;
const LOAD: usize = 56;
/// One page is enough for perf to see which file it is.
const MARKER: usize = 4096;

/// The dump of a run.
#[derive(Debug)]
pub(super) struct JitDump {
    shared: Arc<Mutex<Records>>,
    symbols: Arc<Symbols>,
    process: u32,
    /// Held for as long as the file is.
    _marker: Marker,
}

#[derive(Debug)]
struct Records {
    file: BufWriter<File>,
    /// Pieces so far.
    count: u64,
}

/// The mapping that tells perf of the file.
#[derive(Debug)]
struct Marker(*mut c_void);

// SAFETY: nobody uses the address but to unmap it.
unsafe impl Send for Marker {}
// SAFETY: as above.
unsafe impl Sync for Marker {}

impl Drop for Marker {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing ever looked into.
        let unmapped = unsafe { rustix::mm::munmap(self.0, MARKER) };
        debug_assert!(unmapped.is_ok());
    }
}

impl JitDump {
    /// Creates it at `path`, for process number `process`.
    ///
    /// # Errors
    /// The host's, which may forbid executable mappings of files there.
    pub(super) fn create(path: &Path, process: u32, symbols: Arc<Symbols>) -> io::Result<Self> {
        let file = super::create(path)?;
        let words = [MAGIC, VERSION, HEADER, EM_X86_64, 0, process];
        let mut header: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        header.extend(now().to_ne_bytes());
        // No flags.
        header.extend(0_u64.to_ne_bytes());
        let protection = ProtFlags::READ | ProtFlags::EXEC;
        // SAFETY: a fresh private mapping at an address of the kernel's choice, into which
        // nobody looks: it is made for perf to see.
        let marker = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), MARKER, protection, MapFlags::PRIVATE, &file, 0)
        };
        let _marker = Marker(marker?);
        let mut file = BufWriter::with_capacity(1 << 18, file);
        file.write_all(&header)?;
        let shared = Arc::new(Mutex::new(Records { file, count: 0 }));
        Ok(Self { shared, symbols, process, _marker })
    }

    /// Writes out what is buffered.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).file.flush()
    }
}

impl Watcher for JitDump {
    fn tracer(&self, _vcpu: usize) -> Option<Box<dyn Tracer>> {
        Some(Box::new(Pieces {
            shared: Arc::clone(&self.shared),
            symbols: Arc::clone(&self.symbols),
            process: self.process,
        }))
    }
}

/// Writes down one vCPU's code.
struct Pieces {
    shared: Arc<Mutex<Records>>,
    symbols: Arc<Symbols>,
    process: u32,
}

impl Tracer for Pieces {
    fn event(&mut self, event: Event<'_>) {
        let Some(piece) = Piece::of(event, &self.symbols) else { return };
        let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        let mut records = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let index = records.count;
        records.count = index.wrapping_add(1);
        // A full disk costs names, not the guest.
        let _ = records.file.write_all(&load((self.process, thread), index, &piece));
    }

    fn wants_blocks(&self) -> bool {
        false
    }
}

/// A record of a piece of code.
fn load((process, thread): (u32, u32), index: u64, piece: &Piece<'_>) -> Vec<u8> {
    let Piece { host, code, name } = piece;
    let len = LOAD.saturating_add(name.len()).saturating_add(1).saturating_add(code.len());
    let mut record = Vec::with_capacity(len);
    record.extend(JIT_CODE_LOAD.to_ne_bytes());
    record.extend(u32::try_from(len).unwrap_or(0).to_ne_bytes());
    record.extend(now().to_ne_bytes());
    record.extend(process.to_ne_bytes());
    record.extend(thread.to_ne_bytes());
    // Where it is in the process, and where it was made to be: the same.
    for word in [*host, *host, code.len() as u64, index] {
        record.extend(word.to_ne_bytes());
    }
    record.extend(name.as_bytes());
    record.push(0);
    record.extend(*code);
    record
}

/// The time as perf has it with `-k mono`, nanoseconds.
fn now() -> u64 {
    let time = rustix::time::clock_gettime(ClockId::Monotonic);
    let (seconds, nanos) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds.wrapping_mul(1_000_000_000).wrapping_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_file_is_a_header_and_a_record_per_piece() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jit-7.dump");
        let dump = JitDump::create(&path, 7, Arc::default()).unwrap();
        let mut tracer = dump.tracer(0).unwrap();
        tracer.event(Event::Thunks { host: 0x1000, code: &[0x90; 16] });
        let (rip, user, instructions, host) = (0x42, true, 1, 0x2000);
        tracer.event(Event::Translated { rip, user, instructions, host, code: &[0xc3; 3] });
        dump.flush().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((word(&bytes, 0), word(&bytes, 8), word(&bytes, 20)), (MAGIC, 40, 7));
        let first = &bytes[40..];
        assert_eq!(word(first, 0), JIT_CODE_LOAD);
        let second = &first[word(first, 4) as usize..];
        assert_eq!(word(second, 4) as usize, second.len());
        assert_eq!((word(second, 16), word(second, 24), word(second, 48)), (7, 0x2000, 1));
        assert_eq!(word(second, 40), 3);
        assert_eq!(&second[56..], b"guest:0x42\0\xc3\xc3\xc3");
    }
}
