//! The page-table-heavy loops: an address space copied through the shipped `mmu` family,
//! patched native, against the same loop without it.

use super::paired::{self, Overhead};
use core::arch::asm;
use pvops::families::mmu;
use pvops::families::types::Pte;
use std::fmt::Write as _;

/// Pages of the address space that is copied.
const PAGES: usize = 8192;

/// Pages of the address space that are copied at a time: with their copies, they fit the
/// second-level cache, whose speed does not depend on what the neighbours are doing.
const PIECE: usize = 32;

/// Passes over the piece in a run that is timed: long against the time-stamp's grain.
const PASSES: usize = 8;

/// Samples after which the next piece is taken.
const STAY: usize = 256;

/// Entries in a pass of the loop without pages.
const ENTRIES: usize = 4096;

/// What all loops have in common.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Tables {
    from: *mut Pte,
    to: *mut Pte,
    data: *const u8,
    copy: *mut u8,
    pages: usize,
}

type Loop = unsafe extern "sysv64" fn(&Tables);

/// The three ops of a loop, in one style.
macro_rules! loops {
    ($name:ident, $val:expr, $make:expr, $set:expr) => {
        mod $name {
            use super::{Pte, Tables, asm};
            #[allow(unused_imports)]
            use super::mmu;

            /// One entry: read, made read-only, written to both tables.
            #[inline(always)]
            unsafe fn entry(from: *mut Pte, to: *mut Pte) {
                // SAFETY: the caller's entries; as a kernel does it, which shares them with
                // the CPU.
                unsafe {
                    let value = $val(from.read_volatile());
                    let read_only = $make(value & !2);
                    $set(from, read_only);
                    $set(to, $make($val(read_only) | 0x20));
                }
            }

            /// Copies an address space: each entry, and the page it maps.
            #[inline(never)]
            pub(crate) unsafe extern "sysv64" fn fork(t: &Tables) {
                for i in 0..t.pages {
                    // SAFETY: the tables have that many entries and pages.
                    unsafe {
                        entry(t.from.add(i), t.to.add(i));
                        asm!(
                            "rep movsq",
                            inout("rcx") 512 => _,
                            inout("rsi") t.data.add(i * 4096) => _,
                            inout("rdi") t.copy.add(i * 4096) => _,
                        );
                    }
                }
            }

            /// Copies the entries only: nothing to hide the layer behind.
            #[inline(never)]
            pub(crate) unsafe extern "sysv64" fn entries(t: &Tables) {
                for i in 0..t.pages {
                    // SAFETY: the tables have that many entries.
                    unsafe { entry(t.from.add(i), t.to.add(i)) };
                }
            }
        }
    };
}

loops!(raw, |p: Pte| p.0, Pte, |entry: *mut Pte, value| entry.write_volatile(value));
loops!(pv, mmu::pte_val, mmu::make_pte, |entry, value| mmu::set_pte(entry, value));

/// One comparison as a row of the table.
struct Row {
    name: &'static str,
    overhead: Overhead,
    pages: usize,
    /// More instructions a page than without the layer.
    instructions: i64,
}

/// The section of the report.
pub(crate) fn table(quick: bool, ticks_a_ns: f64) -> String {
    let mut from = vec![Pte(0x1063); PAGES];
    let mut to = vec![Pte(0); PAGES];
    let data = vec![1u8; PAGES * 4096];
    let mut copy = vec![0u8; PAGES * 4096];
    let all = Tables {
        from: from.as_mut_ptr(),
        to: to.as_mut_ptr(),
        data: data.as_ptr(),
        copy: copy.as_mut_ptr(),
        pages: PAGES,
    };
    let pieces = PAGES / PIECE;
    let fork = |place: *const u8, sample: usize| {
        // SAFETY: a copy of one of the loops, which can run anywhere; the piece lies in
        // the tables.
        unsafe {
            let first = sample / STAY % pieces * PIECE;
            let piece = Tables {
                from: all.from.add(first),
                to: all.to.add(first),
                data: all.data.add(first * 4096),
                copy: all.copy.add(first * 4096),
                pages: PIECE,
            };
            let run = std::mem::transmute::<*const u8, Loop>(place);
            (0..PASSES).for_each(|_| run(&piece));
        }
    };
    let entries = |place: *const u8, _: usize| {
        let piece = Tables { pages: ENTRIES, ..all };
        // SAFETY: as above.
        unsafe { std::mem::transmute::<*const u8, Loop>(place)(&piece) };
    };
    let samples = if quick { 1 } else { 2 * STAY };
    let (raw_fork, pv_fork) = (raw::fork as *const (), pv::fork as *const ());
    let (raw_entries, pv_entries) = (raw::entries as *const (), pv::entries as *const ());
    let more = |raw: Loop, pv: Loop| {
        let count = |f: Loop, pages| {
            let mut tables = Tables { pages, ..all };
            super::measure::steps(f as *const (), (&raw mut tables).cast()) as i64
        };
        (count(pv, 3) - count(pv, 2)) - (count(raw, 3) - count(raw, 2))
    };
    let rows = [
        Row {
            name: "copy an address space (entries and pages, in the second-level cache)",
            overhead: paired::overhead([raw_fork, pv_fork], samples, fork),
            pages: PIECE * PASSES,
            instructions: more(raw::fork, pv::fork),
        },
        Row {
            name: "the same against itself, without the layer: what the method sees of nothing",
            overhead: paired::overhead([raw_fork, raw_fork], samples, fork),
            pages: PIECE * PASSES,
            instructions: 0,
        },
        Row {
            name: "entries alone, nothing around them",
            overhead: paired::overhead([raw_entries, pv_entries], samples, entries),
            pages: ENTRIES,
            instructions: more(raw::entries, pv::entries),
        },
    ];
    let mut out = String::from(
        "\n## Page tables, patched native\n\nFive ops a page: entry read, made read-only, \
         written to both tables. Each loop runs as a copy at the\nsame offset of a page, in four \
         offsets and six pages; samples are runs in the order ABBA or BAAB\nby a coin; medians, \
         and the bootstrap's 95 % interval.\n\n| loop | no table, ns a page | more, ns a page | overhead | 95 % \
         interval | instructions more a page | samples |\n|---|---|---|---|---|---|---|\n",
    );
    for Row { name, overhead, pages, instructions } in &rows {
        let ns = overhead.ticks / *pages as f64 / ticks_a_ns;
        let (more, samples) = (ns * overhead.percent / 100.0, overhead.samples);
        let _ = writeln!(
            out,
            "| {name} | {ns:.2} | {more:+.3} | {overhead} | {instructions:+} | {samples} |"
        );
    }
    let Overhead { percent, low, high, ticks, .. } = rows[0].overhead;
    let verdict = match (high <= BAR, low <= BAR) {
        (true, _) => "met: the whole interval lies below it",
        (false, true) => "left open: it lies inside the interval",
        (false, false) => "not met: the whole interval lies above it",
    };
    let mut times = [0.0; 9].map(|_: f64| {
        let start = std::time::Instant::now();
        // SAFETY: all pages of the tables.
        unsafe { raw::fork(&all) };
        start.elapsed().as_nanos() as f64 / PAGES as f64
    });
    times.sort_by(f64::total_cmp);
    let (far, more) = (times[4], ticks / (PIECE * PASSES) as f64 / ticks_a_ns * percent / 100.0);
    let _ = writeln!(
        out,
        "\nThe bar of {BAR} % for the first loop is {verdict}. Copied from memory instead (32 MiB, \
         {far:.0} ns a page in this\nrun, which varies too much to compare loops by), the same \
         {more:+.3} ns a page are {:+.3} %.",
        more / far * 100.0
    );
    out
}

/// What the layer may cost in the page-copying loop, percent.
const BAR: f64 = 0.1;
