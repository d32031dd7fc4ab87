//! `cargo xtask compare lguest`: what the lguest ABI costs, and with a kernel that has lguest
//! guest support, that kernel on the lguest platform beside itself on a PC under QEMU.
//!
//! Nobody packages such a kernel any more, so it is given by path, with an initial RAM disk
//! whose /init prints lines of the form `measured NAME NUMBER UNIT`, the first of them when
//! it starts (`measured init 0 s`), and then powers off or resets.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::measured::{self, Measured, Value};
use crate::qemu::Qemu;
use crate::{paths, progress};

#[derive(Args, Debug)]
pub(super) struct Options {
    /// A bzImage with lguest guest support, serial console and PCI
    #[arg(long, value_name = "FILE", requires = "initrd")]
    kernel: Option<PathBuf>,
    /// Its initial RAM disk, which measures
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// More for its command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    append: String,
    /// Guest memory, MiB
    #[arg(long, value_name = "MIB", default_value = "128")]
    mem: u64,
    /// Runs of each, of which the best counts
    #[arg(long, value_name = "N", default_value = "3")]
    runs: u32,
}

/// Runs the benchmarks of the ABI, and compares if there is a kernel.
pub(super) fn compare(options: &Options) -> Result<()> {
    let (Some(kernel), Some(initrd)) = (&options.kernel, &options.initrd) else {
        let bench = ["bench", "-p", "vmm", "--bench", "lguest"];
        let status = Command::new(env!("CARGO")).args(bench).status()?;
        if !status.success() {
            bail!("the benchmark of the lguest ABI failed");
        }
        return Ok(());
    };
    let (qemu, lguest) = (Qemu::find()?, paths::release_lguest()?);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=options.runs {
        let mut command = Command::new(&lguest);
        command.args(["run", "--platform", "lguest", "--mem", &format!("{}M", options.mem)]);
        command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
        command.args(["--append", &options.append]);
        let name = format!("lguest, run {round}/{}", options.runs);
        ours.push(progress::step(&name, || measured::run(command, &name, &[]))?);
        let append = format!("console=ttyS0 panic=-1 {}", options.append);
        let command = qemu.pc(kernel, initrd, options.mem, &append);
        let name = format!("QEMU, run {round}/{}", options.runs);
        theirs.push(progress::step(&name, || measured::run(command, &name, &[]))?);
    }
    println!("| | lguest | QEMU TCG | ratio |\n|---|---|---|---|");
    let first = ours.first().context("no run was made")?;
    for Value { name, unit, .. } in &first.values {
        let best = |runs: &[Measured]| {
            runs.iter().filter_map(|run| run.value(name)).fold(f64::INFINITY, f64::min)
        };
        let [ours, theirs] = [&ours, &theirs].map(|runs| best(runs));
        println!("| {name} | {ours:.2} {unit} | {theirs:.2} {unit} | {:.2} |", ours / theirs);
    }
    Ok(())
}
