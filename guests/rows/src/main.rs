//! What user space costs, on whatever runs it: `cargo xtask compare rows` runs this program on
//! the host and in guests, where `/init` starts it.
//!
//! Statically linked, so that every machine runs the same instructions, except where the
//! program asks CPUID which there are. Each row prints `measured NAME NUMBER UNIT`; a row that
//! chose by CPUID, or runs a program of the system's, also says `chose NAME WHAT`. What a row
//! computes is checked: a machine that computes it wrongly fails instead of being fast.
//!
//! `rows [NAME]...` measures these rows, or all that need nothing but this program;
//! `rows child` is what the row `fork-exec` starts.

mod compute;
mod crypto;
mod libraries;
mod parallel;
mod programs;
mod stopwatch;
mod system;
mod vector;

use std::process::ExitCode;

/// A row: its name, and what measures it and says so under that name.
type Row = (&'static str, fn(&str));

/// Rows that need nothing but this program and one CPU.
const ALONE: &[Row] = &[
    ("getppid", system::system_calls),
    ("fnv", compute::fnv),
    ("shell-sort", compute::shell_sort),
    ("square-roots", compute::square_roots),
    ("mandelbrot", vector::mandelbrot),
    ("matrix-product", vector::matrix_product),
    ("aes-128-ctr-64-MiB", crypto::aes),
    ("sha-256-64-MiB", crypto::sha),
    ("copy-256-MiB", vector::copies),
    ("lua", libraries::lua),
    ("gzip-16-MiB", libraries::gzip),
    ("zstd-64-MiB", libraries::zstd),
    ("sqlite-insert", libraries::sqlite),
    ("page-fault", system::page_faults),
    ("mmap-munmap", system::mappings),
    ("signal", system::signals),
    ("create-unlink", system::files),
    ("futex-switch", system::switches),
    ("pipe-round-trip", system::round_trips),
    ("fork", system::forks),
    ("fork-exec", system::programs),
];

/// Rows that want two CPUs, or programs of the system's.
const OTHERS: &[Row] = &[
    ("two-loops", parallel::two_loops),
    ("gcc", programs::gcc),
    ("luajit", programs::luajit),
    ("node", programs::node),
    ("python", programs::python),
];

fn main() -> ExitCode {
    let names: Vec<String> = std::env::args().skip(1).collect();
    if names.first().is_some_and(|name| name == "child") {
        return ExitCode::SUCCESS;
    }
    let known = || ALONE.iter().chain(OTHERS);
    if let Some(name) = names.iter().find(|name| !known().any(|row| row.0 == name.as_str())) {
        let all: Vec<_> = known().map(|row| row.0).collect();
        eprintln!("rows: there is no row {name}: the rows are {}", all.join(", "));
        return ExitCode::from(2);
    }
    let wanted = |row: &Row| match names.as_slice() {
        [] => ALONE.iter().any(|alone| alone.0 == row.0),
        some => some.iter().any(|name| name == row.0),
    };
    for (name, measure) in known().filter(|row| wanted(row)) {
        measure(name);
    }
    ExitCode::SUCCESS
}
