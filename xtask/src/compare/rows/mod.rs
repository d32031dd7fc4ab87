//! `cargo xtask compare rows`: one program (`guests/rows`) on the host, in a guest of lguest's,
//! in one of QEMU's without KVM and in User-mode Linux, alternating.

mod list;
mod peers;
mod report;

use std::fs;

use anyhow::Result;
use clap::Args;

use super::measured::{self, Measured};
use super::{host, record, repeat};
use crate::{paths, progress};
use list::{Needs, ROWS, Row};
use peers::{Peer, Place};
use report::Table;

#[derive(Args, Debug)]
pub(super) struct Options {
    /// Runs of each, of which the median counts
    #[arg(long, value_name = "N", default_value = "3")]
    runs: u32,
    /// Guest memory, MiB
    #[arg(long, value_name = "MIB", default_value = "512")]
    mem: u64,
    /// Only these rows
    #[arg(long, value_name = "ROW", value_delimiter = ',')]
    only: Vec<Row>,
    /// Write the result into docs/performance.md, and the plot beside it
    #[arg(long, conflicts_with = "only")]
    record: bool,
}

const BEGIN: &str = "<!-- recorded by cargo xtask compare rows: begin -->";
const END: &str = "<!-- recorded by cargo xtask compare rows: end -->";
/// From the workspace.
const PLOT: &str = "docs/performance/rows.svg";

/// Runs all of them in turn, and compares.
pub(super) fn compare(options: &Options) -> Result<()> {
    let rows = if options.only.is_empty() { &ROWS[..] } else { &options.only };
    let needs = [Needs::Nothing, Needs::Debian, Needs::TwoCpus];
    let needs = needs.map(|needs| (needs, with(rows, needs)));
    let needs: Vec<_> = needs.into_iter().filter(|(_, rows)| !rows.is_empty()).collect();
    let place =
        Place::prepare(&needs.iter().map(|(needs, _)| *needs).collect::<Vec<_>>(), options.mem)?;

    let mut runs: [Vec<Measured>; 4] = Default::default();
    let mut hung = 0;
    for round in 1..=options.runs {
        for (needs, rows) in &needs {
            for (peer, runs) in Peer::ALL.into_iter().zip(&mut runs) {
                if !place.has(peer, *needs) {
                    continue;
                }
                let name = format!("{}, {needs}, run {round}/{}", peer.name(), options.runs);
                // The host has what it has of Debian's programs.
                let optional = peer == Peer::Host && *needs == Needs::Debian;
                let wanted = if optional { &[] } else { &rows[..] };
                let run = || measured::run(place.command(peer, *needs, rows)?, &name, wanted);
                // QEMU's guests now and then fail to calibrate their clocks, and hang.
                let run = || if peer == Peer::Qemu { repeat(&mut hung, run) } else { run() };
                runs.push(progress::step(&name, run)?);
            }
        }
    }
    let mut setting = format!("{}; {}, `-accel tcg -cpu max`", host(), place.qemu.version()?);
    if let Some(uml) = &place.uml {
        setting.push_str(&format!("; User-mode Linux (UML) {}", uml.version()?));
    }
    setting.push_str(&format!(
        "; 1 vCPU, {} MiB; medians of {} alternating runs.",
        options.mem, options.runs
    ));
    let table = Table::of(rows, &runs);
    let report = table.report(&setting);
    println!("{report}");
    if options.record {
        record(BEGIN, END, &report)?;
        let plot = paths::workspace().join(PLOT);
        fs::create_dir_all(plot.with_file_name(""))?;
        fs::write(plot, table.plot())?;
    }
    Ok(())
}

/// The names of those rows that have these needs.
fn with(rows: &[Row], needs: Needs) -> Vec<&'static str> {
    rows.iter().filter(|row| row.needs == needs).map(|row| row.name).collect()
}
