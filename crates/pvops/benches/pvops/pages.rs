//! The page-table-heavy loop: a table of entries written, read, changed and cleared
//! through the shipped `mmu` family, patched native, against the same loop without it.

use pvops::families::mmu;
use pvops::families::types::Pte;
use std::cell::RefCell;
use std::hint::black_box;

/// Pages copied in a round of "fork", each with its entry.
const PAGES: usize = 8192;

/// Copies an address space, page by page: entry read, made read-only, written to both
/// tables, and the page's content copied.
macro_rules! fork {
    ($name:ident, $val:expr, $make:expr, $set:expr) => {
        #[inline(never)]
        fn $name(from: &mut [Pte], to: &mut [Pte], data: &[u8], copy: &mut [u8]) {
            for i in 0..PAGES {
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
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    (median(first), median(second), median(ratios))
}

/// The section of the report.
pub(crate) fn table(quick: bool) -> String {
    let tables = || RefCell::new((vec![Pte(0x1063); PAGES], vec![Pte(0); PAGES]));
    let data = vec![1u8; PAGES * 4096];
    let copy = RefCell::new(vec![0u8; PAGES * 4096]);
    let both = tables();
    let run = |f: Fork| {
        let (from, to) = &mut *both.borrow_mut();
        f(from, to, black_box(&data), black_box(&mut copy.borrow_mut()));
    };
    let runs = if quick { 3 } else { 401 };
    let fork = race(|| run(fork_raw), || run(fork_pv), runs);
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
        "\n## Page tables, patched native\n\nMedians of alternating runs; the overhead is the \
         median ratio of neighbouring runs.\n\n| loop | no table, ns a page | pvops, ns a page | \
         overhead |\n|---|---|---|---|\n{}{}",
        row("copy an address space (entries and pages)", fork),
        row("entries alone, nothing around them", entries)
    )
}
