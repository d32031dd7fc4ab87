//! `cargo xtask compare rows`: the same static program on the host, in a guest of lguest's and
//! in one of QEMU's without KVM, alternating.

use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use clap::Args;

use super::measured::{self, Measured};
use super::{host, median, record};
use crate::guests::{Guest, kernel};
use crate::qemu::Qemu;
use crate::{initramfs, paths, progress};

#[derive(Args, Debug)]
pub(super) struct Options {
    /// Runs of each, of which the median counts
    #[arg(long, value_name = "N", default_value = "3")]
    runs: u32,
    /// Guest memory, MiB
    #[arg(long, value_name = "MIB", default_value = "512")]
    mem: u64,
    /// Write the result into docs/performance.md
    #[arg(long)]
    record: bool,
}

const BEGIN: &str = "<!-- recorded by cargo xtask compare rows: begin -->";
const END: &str = "<!-- recorded by cargo xtask compare rows: end -->";

/// Runs all three in turn, and compares.
pub(super) fn compare(options: &Options) -> Result<()> {
    let (kernel, initrd) = (kernel(Guest::Debian12Cloud)?, initramfs::initramfs()?);
    let (qemu, lguest, smoke) = (Qemu::find()?, paths::release_lguest()?, initramfs::smoke()?);
    let mut all: [Vec<Measured>; 3] = Default::default();
    for round in 1..=options.runs {
        let mut native = Command::new(&smoke);
        native.arg("rows");
        let mut ours = Command::new(&lguest);
        ours.args(["run", "--mem", &format!("{}M", options.mem)]);
        ours.arg("--kernel").arg(&kernel).arg("--initrd").arg(&initrd);
        ours.args(["--append", "quiet lguest.mode=rows"]);
        let append = "console=ttyS0 panic=-1 quiet lguest.mode=rows";
        let theirs = qemu.pc(&kernel, &initrd, options.mem, append);
        let commands = [("host", native), ("lguest", ours), ("QEMU", theirs)];
        for ((name, mut command), runs) in commands.into_iter().zip(&mut all) {
            command.stdin(Stdio::null());
            let name = format!("{name}, run {round}/{}", options.runs);
            runs.push(progress::step(&name, || measured::run(command))?);
        }
    }
    let report = report(&all, &format!("{}; {}", host(), qemu.version()?))?;
    println!("{report}");
    if options.record {
        record(BEGIN, END, &report)?;
    }
    Ok(())
}

fn report(all: &[Vec<Measured>; 3], setting: &str) -> Result<String> {
    let mut lines = vec![
        format!("{setting}, `-accel tcg -cpu max`; 1 vCPU; medians of alternating runs."),
        String::new(),
        "| | host | lguest | QEMU TCG | QEMU by lguest | lguest by host |".to_owned(),
        "|---|---|---|---|---|---|".to_owned(),
    ];
    let mut product = (0.0, 0.0);
    for (name, _, unit) in all[0].first().context("no run was made")? {
        let [native, ours, theirs] = all.each_ref().map(|runs| {
            let values = runs.iter().flatten().filter(|(other, ..)| other == name);
            median(&mut values.map(|(_, value, _)| *value).collect::<Vec<_>>())
        });
        let (ahead, behind) = (theirs / ours, ours / native);
        product = (product.0 + ahead.ln(), product.1 + 1.0);
        lines.push(format!(
            "| {name}, {unit} | {native:.2} | {ours:.2} | {theirs:.2} | {ahead:.2} | {behind:.2} |"
        ));
    }
    let mean = f64::exp(product.0 / product.1);
    lines.push(format!("| geometric mean | | | | {mean:.2} | |"));
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_compared_by_name() {
        let run = |a: f64, b: f64| vec![("a".into(), a, "ns".into()), ("b".into(), b, "ms".into())];
        let all = [vec![run(1.0, 10.0)], vec![run(2.0, 10.0)], vec![run(8.0, 10.0)]];
        let text = report(&all, "here").unwrap();
        assert!(text.contains("| a, ns | 1.00 | 2.00 | 8.00 | 4.00 | 2.00 |"), "{text}");
        assert!(text.contains("| geometric mean | | | | 2.00 | |"), "{text}");
        assert!(report(&Default::default(), "here").is_err());
    }
}
