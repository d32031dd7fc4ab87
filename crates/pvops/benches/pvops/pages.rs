//! The page-table-heavy loop: a table of entries written, read, changed and cleared
//! through the shipped `mmu` family, patched native, against the same loop without it.

use pvops::families::mmu;
use pvops::families::types::Pte;
use std::cell::RefCell;
use std::hint::black_box;

/// Pages copied in a round of "fork", each with its entry.
const PAGES: usize = 8192;

/// Pages in a piece that is timed.
const PIECE: usize = 32;

/// Copies an address space, page by page: entry read, made read-only, written to both
/// tables, and the page's content copied.
macro_rules! fork {
    ($name:ident, $val:expr, $make:expr, $set:expr) => {
        #[inline(never)]
        fn $name(from: &mut [Pte], to: &mut [Pte], data: &[u8], copy: &mut [u8]) {
            for i in 0..from.len() {
                let value = $val(from[i]);
                let read_only = $make(value & !2);
                $set(&raw mut from[i], read_only);
                $set(&raw mut to[i], $make($val(read_only) | 0x20));
                let page = i * 4096;
                copy[page..page + 4096].copy_from_slice(&data[page..page + 4096]);
            }
        }
    };
}

/// Entries only: nothing to hide the layer behind.
macro_rules! entries {
    ($name:ident, $val:expr, $make:expr, $set:expr) => {
        #[inline(never)]
        fn $name(from: &mut [Pte], to: &mut [Pte]) {
            for (from, to) in from.iter_mut().zip(to) {
                let value = $val(*from);
                $set(to, $make(value | 0x20));
            }
        }
    };
}

#[inline(always)]
fn set_pv(entry: *mut Pte, value: Pte) {
    // SAFETY: native: a store, to a live entry.
    unsafe { mmu::set_pte(entry, value) }
}

#[inline(always)]
fn set_raw(entry: *mut Pte, value: Pte) {
    // SAFETY: a store to a live entry.
    unsafe { entry.write_volatile(value) }
}

fork!(fork_pv, mmu::pte_val, mmu::make_pte, set_pv);
fork!(fork_raw, |p: Pte| p.0, Pte, set_raw);
entries!(entries_pv, mmu::pte_val, mmu::make_pte, set_pv);
entries!(entries_raw, |p: Pte| p.0, Pte, set_raw);

/// A loop over entries and pages.
type Fork = fn(&mut [Pte], &mut [Pte], &[u8], &mut [u8]);

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median times of two functions, run in turn, and the median ratio of neighbours.
fn race(mut a: impl FnMut(), mut b: impl FnMut(), runs: usize) -> (f64, f64, f64) {
    let time = |f: &mut dyn FnMut()| {
        let start = std::time::Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    let (mut first, mut second, mut ratios) = (vec![], vec![], vec![]);
    for run in 0..runs {
        // Whoever comes second finds warmer caches: they take turns at that.
        let (x, y) = if run % 2 == 0 {
            let x = time(&mut a);
            (x, time(&mut b))
        } else {
            let y = time(&mut b);
            (time(&mut a), y)
        };
        first.push(x);
        second.push(y);
        ratios.push(y / x);
    }
    (median(first), median(second), median(ratios))
}

/// The section of the report.
pub(crate) fn table(quick: bool) -> String {
    let mut from = vec![Pte(0x1063); PAGES];
    let mut to = vec![Pte(0); PAGES];
    let data = vec![1u8; PAGES * 4096];
    let mut copy = vec![0u8; PAGES * 4096];
    // In small pieces, each done by both in turn: a moment of noise hits one piece.
    let passes = if quick { 4 } else { 200 };
    let (mut raw, mut pv) = (vec![vec![]; PAGES / PIECE], vec![vec![]; PAGES / PIECE]);
    for pass in 0..passes {
        for piece in 0..PAGES / PIECE {
            let pages = piece * PIECE..(piece + 1) * PIECE;
            let bytes = pages.start * 4096..pages.end * 4096;
            let first = (pass + piece) % 2 == 0;
            let (f, times): (Fork, _) =
                if first { (fork_raw, &mut raw) } else { (fork_pv, &mut pv) };
            let (from, to) = (&mut from[pages.clone()], &mut to[pages]);
            let start = std::time::Instant::now();
            f(from, to, black_box(&data[bytes.clone()]), black_box(&mut copy[bytes]));
            times[piece].push(start.elapsed().as_secs_f64());
        }
    }
    let sum = |times: Vec<Vec<f64>>| times.into_iter().map(median).sum::<f64>();
    let (raw, pv) = (sum(raw), sum(pv));
    let fork = (raw, pv, pv / raw);
    let both = RefCell::new((from, to));
    let runs = if quick { 3 } else { 401 };
    let run = |f: fn(&mut [Pte], &mut [Pte])| {
        let (from, to) = &mut *both.borrow_mut();
        f(black_box(from), to);
    };
    let entries = race(|| run(entries_raw), || run(entries_pv), runs * 10);
    let row = |name, (raw, pv, ratio): (f64, f64, f64)| {
        let (raw, pv) = (raw * 1e9 / PAGES as f64, pv * 1e9 / PAGES as f64);
        let overhead = (ratio - 1.0) * 100.0;
        format!("| {name} | {raw:.3} | {pv:.3} | {overhead:+.2} % |\n")
    };
    format!(
        "\n## Page tables, patched native\n\nMedians of alternating runs: of each piece of 32 \
         pages, and of whole loops over the entries.\n\n| loop | no table, ns a page | pvops, ns a page | \
         overhead |\n|---|---|---|---|\n{}{}",
        row("copy an address space (entries and pages)", fork),
        row("entries alone, nothing around them", entries)
    )
}
