//! `cargo bench -p pvops`: what the layer costs, in bytes, registers and time. With
//! `-- --report` the results are written to `docs/pvops/` as a table and a plot.

mod counters;
mod disasm;
mod measure;
mod pages;
mod paired;
mod patching;
mod plot;
mod retpoline;
mod styles;

use measure::Ticks;
use pvops::user::{DualMapping, Threads};
use pvops::{Binding, Bindings, Family, Plain, Report, Sites};
use std::fmt::Write as _;
use std::time::Instant;
use styles::STYLES;

/// Patches a family for good, with these bindings.
fn patch<F: Family>(text: &mut DualMapping, bindings: &Bindings<F>) -> Report {
    let mut family = F::claim().expect("nobody has it");
    family.bind(bindings).expect("complete");
    let (_, report) = family
        .apply(Sites::of_program(), text, |_| ())
        .map_err(|(_, error)| error)
        .expect("patched");
    assert_eq!(report.indirect, 0);
    report
}

fn main() -> std::io::Result<()> {
    let report = std::env::args().any(|a| a == "--report");
    // `cargo test --benches` runs this too: then only look whether it works.
    let quick = !std::env::args().any(|a| a == "--bench");
    let rounds = if quick { 10_000 } else { 20_000_000 };
    let runs = if quick { 3 } else { 7 };

    paired::pin();
    let sites = Sites::of_program();
    // SAFETY: this program has one thread.
    let alone = unsafe { Threads::assume_alone() };
    let mut text = DualMapping::around(sites, alone).expect("a window");
    let mut mmu = Bindings::new("native");
    // Other CPUs' entries are the kernel's to drop, by its interrupts; there is none here.
    mmu.bind(pvops::families::mmu::op::FlushTlbOthers, Binding::<Plain<_>>::nop()).expect("once");
    mmu.bind(pvops::families::mmu::op::SetFixmap, Binding::<Plain<_>>::nop()).expect("once");
    let start = Instant::now();
    let patched = [
        patch::<styles::direct::ops::Family>(&mut text, &Bindings::new("default")),
        patch::<styles::direct_thunk::ops::Family>(&mut text, &Bindings::new("default")),
        patch::<styles::patched::ops::Family>(&mut text, &Bindings::new("default")),
        patch(&mut text, &mmu),
    ];
    let took = start.elapsed();
    let count: usize = patched.iter().map(Report::sites).sum();
    let bytes: usize = patched.iter().map(|r| r.bytes).sum();

    let mut out = String::from("# pvops: measurements\n\n");
    out += "Made by `cargo bench -p pvops -- --report`. Ticks are those of the time-stamp\n\
            counter, best (median) of several interleaved runs; instructions are counted by\n\
            single-stepping; bytes, spills and reloads are read from the disassembly.\n";
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("unknown");
    let _ = writeln!(
        out,
        "Load average of the machine in this run: {load}. Above 1, hot loops are timed too long."
    );
    code_table(&mut out);
    let hot = time_table(&mut out, rounds, runs);
    other_forms(&mut out, rounds, runs);
    cold_table(&mut out, if quick { 2 } else { 200 });
    let _ = write!(
        out,
        "\n## Patching\n\n{count} sites, {bytes} bytes in {:.2} ms: {:.0} sites a millisecond, \
         one batch for each family.\nRecords: {} of {} bytes, {} bytes in all. A 64-bit thunk: {} bytes.\n",
        took.as_secs_f64() * 1e3,
        count as f64 / (took.as_secs_f64() * 1e3),
        sites.len(),
        pvops::site::RECORD,
        sites.len() * pvops::site::RECORD,
        disasm::length(styles::WRAPPED.0.address()),
    );
    out += &patching::table();
    out += &pages::table(quick, measure::ticks_a_ns());
    println!("{out}");
    if report {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/pvops");
        std::fs::create_dir_all(dir)?;
        std::fs::write(format!("{dir}/measurements.md"), &out)?;
        std::fs::write(format!("{dir}/ticks.svg"), plot::bars(&hot))?;
        println!("written to docs/pvops/measurements.md and docs/pvops/ticks.svg");
    }
    Ok(())
}

/// Sizes, spills, reloads.
fn code_table(out: &mut String) {
    // What the numbers mean comes with them.
    *out += "\n## Reading it\n\n\
             * A callee-save site adds no spill and no reload to its caller, in any form. It does\n  \
             lose `rax`, even for an op that returns nothing: callers that need every register\n  \
             save one more at entry than native code does.\n\
             * Patched in line, it runs as fast as the instruction itself.\n\
             * A plain C site charges each caller for what it keeps alive, always; a thunk charges\n  \
             each call sixteen memory operations, while it is not patched. Thunks win where sites\n  \
             are many, patched in line on bare hardware, or starved of registers. A hot op that\n  \
             stays a call (in a guest) should get an assembler body.\n\
             * Callee-save ops that return nothing lose `rax` all the same: it is the one register\n  \
             that thunks, and callees such as lguest's `irq_enable`, have to work with.\n\
             * What is left in the loop of entries is that the op's argument and result must be in\n  \
             two given registers, and that plain ops make their caller keep values elsewhere. An\n  \
             identity is one move; it could only be less if argument and result shared a register,\n  \
             as they do in 32-bit code, and the callee then were no ordinary function.\n";
    *out += "\n## Code of the callers\n\nThe corpus is 21 functions with 0 to 12 values alive \
             across one to three ops; `hungry` is a\nloop with 12 live values. Spills and reloads \
             are beyond what native code needs itself.\n\n";
    *out += "| style | corpus bytes | corpus spills | corpus reloads | saved registers | \
             hungry bytes | hungry spills | hungry reloads |\n|---|---|---|---|---|---|---|---|\n";
    let mut floor = None;
    for style in STYLES {
        let mut sum = disasm::Shape::default();
        for (_, caller) in &style.corpus {
            let shape = disasm::shape(*caller);
            sum.bytes += shape.bytes;
            sum.spills += shape.spills;
            sum.reloads += shape.reloads;
            sum.saved += shape.saved;
        }
        let hungry = disasm::shape(style.hungry);
        let (f, fh) = *floor.get_or_insert((sum, hungry));
        let more = |a: usize, b: usize| a as i64 - b as i64;
        let _ = writeln!(
            out,
            "| {} | {} | {:+} | {:+} | {} | {} | {:+} | {:+} |",
            style.name,
            sum.bytes,
            more(sum.spills, f.spills),
            more(sum.reloads, f.reloads),
            sum.saved,
            hungry.bytes,
            more(hungry.spills, fh.spills),
            more(hungry.reloads, fh.reloads),
        );
        if style.name != "plain C through table" {
            // The promise of the whole crate. The build must fail when it is broken.
            assert_eq!(more(sum.spills, f.spills).max(0), 0, "{} spills", style.name);
            assert_eq!(more(hungry.spills, fh.spills).max(0), 0, "{} spills", style.name);
        }
    }
}

/// Hot loops.
fn time_table(out: &mut String, rounds: u64, runs: usize) -> Vec<(&'static str, [Ticks; 3])> {
    let of = |pick: fn(&styles::Style) -> styles::Caller| {
        let callers: Vec<_> = STYLES.iter().map(pick).collect();
        measure::ticks(&callers, rounds, runs)
    };
    let (bare, typical, hungry) = (of(|s| s.bare), of(|s| s.typical), of(|s| s.hungry));
    *out += "\n## Time and instructions a round\n\n`bare` does one `save`, `typical` pushes to a \
             ring between `save` and `quiet`, `hungry` is as above.\n\n\
             | style | bare | typical | hungry | instructions: bare | typical | hungry |\n\
             |---|---|---|---|---|---|---|\n";
    let mut all = vec![];
    for (i, style) in STYLES.iter().enumerate() {
        let row = [bare[i], typical[i], hungry[i]];
        let _ = write!(out, "| {} |", style.name);
        for t in row {
            let _ = write!(out, " {:.2} ({:.2}) |", t.best, t.median);
        }
        for caller in [style.bare, style.typical, style.hungry] {
            let _ = write!(out, " {:.0} |", measure::instructions(caller));
        }
        *out += "\n";
        all.push((style.name, row));
    }
    all
}

/// Forms that need no family to be measured.
fn other_forms(out: &mut String, rounds: u64, runs: usize) {
    *out += "\n## Other forms\n\nThe loop of `bare` around other things.\n\n\
             | form | ticks |\n|---|---|\n";
    let callers = retpoline::ROWS.map(|(_, caller)| caller);
    for ((name, _), t) in retpoline::ROWS.iter().zip(measure::ticks(&callers, rounds, runs)) {
        let _ = writeln!(out, "| {name} | {:.2} ({:.2}) |", t.best, t.median);
    }
}

/// Many sites, each once a round.
fn cold_table(out: &mut String, runs: usize) {
    let callers: Vec<_> = STYLES.iter().map(|s| s.cold).collect();
    let times = measure::ticks(&callers, 1, runs);
    *out += "\n## 4096 sites in a row\n\n| style | ticks a site |\n|---|---|\n";
    for (style, t) in STYLES.iter().zip(times) {
        let (best, median) = (t.best / 4096.0, t.median / 4096.0);
        let _ = writeln!(out, "| {} | {best:.2} ({median:.2}) |", style.name);
    }
    let run = |caller: styles::Caller| move || caller(&mut [7; 16]);
    let runs: Vec<_> = STYLES.iter().map(|s| (s.name, run(s.cold))).collect();
    let rows: Vec<(&str, &dyn Fn())> = runs.iter().map(|(n, r)| (*n, r as &dyn Fn())).collect();
    counters::table(out, &rows, 4096.0);
}
