//! The page-table-heavy loop: a table of entries written, read, changed and cleared
//! through the shipped `mmu` family, patched native, against the same loop without it.

use pvops::families::mmu;
use pvops::families::types::Pte;
use std::hint::black_box;

/// Pages copied in a round of "fork", each with its entry.
const PAGES: usize = 2048;

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
                let page = i % 16 * 4096;
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

// SAFETY: native `set_pte` is a store, here to a live entry.
fork!(fork_pv, mmu::pte_val, mmu::make_pte, |p: *mut Pte, v| unsafe { mmu::set_pte(p, v) });
fork!(fork_raw, |p: Pte| p.0, Pte, |p: *mut Pte, v| {
    // SAFETY: a store to a live entry.
    unsafe { p.write_volatile(v) }
});
// SAFETY: as above.
entries!(entries_pv, mmu::pte_val, mmu::make_pte, |p: *mut Pte, v| unsafe { mmu::set_pte(p, v) });
entries!(entries_raw, |p: Pte| p.0, Pte, |p: *mut Pte, v| {
    // SAFETY: a store to a live entry.
    unsafe { p.write_volatile(v) }
});

/// Best times of two functions, run in turn.
fn race(mut a: impl FnMut(), mut b: impl FnMut(), runs: usize) -> (f64, f64) {
    let (mut best_a, mut best_b) = (f64::MAX, f64::MAX);
    for _ in 0..runs {
        for (f, best) in
            [(&mut a as &mut dyn FnMut(), &mut best_a), (&mut b as &mut dyn FnMut(), &mut best_b)]
        {
            let start = std::time::Instant::now();
            f();
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    (best_a, best_b)
}

/// The section of the report.
pub(crate) fn table(quick: bool) -> String {
    let runs = if quick { 3 } else { 2000 };
    let (mut from, mut to) = (vec![Pte(0x1063); PAGES], vec![Pte(0); PAGES]);
    let (data, mut copy) = (vec![1u8; 16 * 4096], vec![0u8; 16 * 4096]);
    let (mut from2, mut to2, mut copy2) = (from.clone(), to.clone(), copy.clone());
    let fork = race(
        || fork_raw(&mut from, &mut to, &data, black_box(&mut copy)),
        || fork_pv(&mut from2, &mut to2, &data, black_box(&mut copy2)),
        runs,
    );
    let entries = race(
        || entries_raw(black_box(&mut from), &mut to),
        || entries_pv(black_box(&mut from2), &mut to2),
        runs,
    );
    let row = |name, (raw, pv): (f64, f64)| {
        let (raw_ns, pv_ns) = (raw * 1e9 / PAGES as f64, pv * 1e9 / PAGES as f64);
        format!("| {name} | {raw_ns:.3} | {pv_ns:.3} | {:+.2} % |\n", (pv / raw - 1.0) * 100.0)
    };
    format!(
        "\n## Page tables, patched native\n\n| loop | no table, ns a page | pvops, ns a page | \
         overhead |\n|---|---|---|---|\n{}{}",
        row("copy an address space (entries and pages)", fork),
        row("entries alone", entries)
    )
}
