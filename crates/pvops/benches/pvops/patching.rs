//! What patching takes: sites in one batch against sites one by one, each with a stop of
//! the world and a serialization of its own.

use super::styles::assembler::ops;
use pvops::user::{DualMapping, Threads};
use pvops::{Bindings, Family, Patched, Site, Sites, Unpatched};
use std::time::{Duration, Instant};

/// The record of a site, and an address that it could stand at.
fn record(site: &Site) -> (Vec<u8>, u64) {
    let base = site.address & !3;
    let mut bytes = vec![];
    for (field, target) in [(0, site.address), (4, site.slot)] {
        bytes.extend((target.wrapping_sub(base + field) as i32).to_le_bytes());
    }
    bytes.extend([site.len, site.kind as u8]);
    bytes.extend(site.clobbers.bits().to_le_bytes());
    (bytes, base)
}

fn undo(patched: Patched<ops::Family>, text: &mut DualMapping) -> Unpatched<ops::Family> {
    patched.undo(Sites::of_program(), text).map_err(|(_, error)| error).expect("undone")
}

/// The section of the report. The family's sites are as they were afterwards.
pub(crate) fn table() -> String {
    let mut out = String::from(
        "\n## One batch or site by site\n\nThe sites of the callee-save assembler style, \
         patched to direct calls.\n\n| threads | sites | one batch | site by site | \
         stops, serializations |\n|---|---|---|---|---|\n",
    );
    // SAFETY: this program has one thread.
    let alone = unsafe { Threads::assume_alone() };
    for (name, threads) in [("alone", alone), ("stopped by a signal", Threads::stop(40))] {
        let mut text = DualMapping::around(Sites::of_program(), threads).expect("a window");
        let mut family = ops::Family::claim().expect("nobody has it");
        let start = Instant::now();
        let applied = family.apply(Sites::of_program(), &mut text, |_| ());
        let (patched, report) = applied.map_err(|(_, error)| error).expect("patched");
        let batch = start.elapsed();
        let all = report.sites();
        family = undo(patched, &mut text);

        // SAFETY: no records at all.
        let none = unsafe { Sites::new(&[], 0) }.expect("whole");
        let (mut patched, _) =
            family.apply(none, &mut text, |_| ()).map_err(|(_, error)| error).expect("nothing");
        let ours = Sites::of_program().iter().flatten();
        let records: Vec<_> = ours.map(|site| record(&site)).collect();
        let mut one_by_one = Duration::ZERO;
        let mut count = 0;
        for (bytes, base) in records {
            // SAFETY: a true record of this program, made anew.
            let site = unsafe { Sites::new(&bytes, base) }.expect("whole");
            let start = Instant::now();
            let report = patched.apply_late(site, &mut text, |_| ()).expect("patched");
            // Other families' sites are looked at and left alone.
            if report.sites() == 1 {
                one_by_one += start.elapsed();
                count += 1;
            }
        }
        assert_eq!(count, all);
        let us = |time: Duration| time.as_secs_f64() * 1e6 / all as f64;
        out += &format!(
            "| {name} | {all} | {:.2} us a site | {:.2} us a site | 1 against {count} |\n",
            us(batch),
            us(one_by_one),
        );
        let mut family = undo(patched, &mut text);
        family.bind(&Bindings::new("default")).expect("defaults");
        family.release();
    }
    out
}
