//! The CPU's own counters, through `perf_event_open`: where a machine has them.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Error, Read as _};
use std::os::fd::FromRawFd as _;

/// What is counted: a name, and type and number as `perf_event_open` has them.
pub(crate) const EVENTS: [(&str, u32, u64); 4] = [
    ("instructions", 0, 1),
    ("cycles", 0, 0),
    ("branch misses", 0, 5),
    // The first-level instruction cache, reads, misses.
    ("I-cache misses", 3, 1 | 1 << 16),
];

/// A counter that this machine or its kernel does not give.
#[derive(Debug)]
pub(crate) struct Unsupported(Error);

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not supported on this machine ({})", self.0)
    }
}

/// `struct perf_event_attr`, as far as its first version goes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    more: u64,
}

/// A counter of this thread's own instructions in user mode.
struct Counter(File);

impl Counter {
    fn open(kind: u32, config: u64) -> Result<Self, Unsupported> {
        // exclude_kernel and exclude_hv
        let flags = 1 << 5 | 1 << 6;
        let size = size_of::<Attributes>() as u32;
        let attributes = Attributes { kind, size, config, flags, ..Attributes::default() };
        // SAFETY: whole attributes of the size they name.
        unsafe {
            let fd = libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                0,
                -1,
                -1,
                8, // PERF_FLAG_FD_CLOEXEC
            );
            if fd < 0 {
                return Err(Unsupported(Error::last_os_error()));
            }
            Ok(Self(File::from_raw_fd(fd as i32)))
        }
    }

    fn read(&mut self) -> u64 {
        let mut value = [0; 8];
        self.0.read_exact(&mut value).map_or(0, |()| u64::from_ne_bytes(value))
    }
}

/// Counts of each event over a run, for each of several things to run.
pub(crate) fn table(out: &mut String, rows: &[(&str, &dyn Fn())], sites: f64) {
    *out += "\n## Counters of the CPU, a site\n\n| style |";
    for (name, ..) in EVENTS {
        let _ = write!(out, " {name} |");
    }
    *out += "\n|---|---|---|---|---|\n";
    let mut counters = EVENTS.map(|(_, kind, config)| Counter::open(kind, config));
    for (name, run) in rows {
        let _ = write!(out, "| {name} |");
        for counter in &mut counters {
            let Ok(counter) = counter else {
                *out += " - |";
                continue;
            };
            run();
            let before = counter.read();
            for _ in 0..10 {
                run();
            }
            let _ = write!(out, " {:.3} |", (counter.read() - before) as f64 / 10.0 / sites);
        }
        *out += "\n";
    }
    for (counter, (name, ..)) in counters.iter().zip(EVENTS) {
        if let Err(error) = counter {
            let _ = writeln!(out, "\n{name}: {error}");
        }
    }
}
