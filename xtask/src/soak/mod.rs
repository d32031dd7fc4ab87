//! `cargo xtask soak`: the devices and the CPU at work for a long time, with data that is
//! checked.
//!
//! What the boot tests do once and small is done here often and large: minutes each, so
//! nothing runs this by itself. Each ends in a line that says PASS or FAIL.

mod crash;
pub(crate) mod disks;
mod jobs;
pub(crate) mod network;
mod rebind;
pub(crate) mod sink;

use crate::guests::{Guest, kernel};
use crate::{debian_image, initramfs, paths};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Try devices and CPU for a long time
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Which; all if none is named
    names: Vec<Name>,
    /// Crashes on each disk; twice as many hot resets
    #[arg(long, value_name = "N", default_value = "50")]
    rounds: u32,
    /// Crashes with disks of one kind only
    #[arg(long, value_name = "FORMAT")]
    format: Option<disks::Format>,
    /// What each transfer sends, MiB
    #[arg(long, value_name = "MIB", default_value = "1024")]
    mib: u64,
    /// What each fio job writes, MiB
    #[arg(long, value_name = "MIB", default_value = "32")]
    fio_mib: u64,
    /// Length of each run of iperf3
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    seconds: u32,
    #[command(flatten)]
    jobs: jobs::JobOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// fio with verification on raw and qcow2.
    Fio,
    /// kill -9 while files are made durable.
    Crash,
    /// Large transfers with checksums.
    Transfer,
    /// iperf3 both ways.
    Iperf,
    /// Hot reset of the drivers under load.
    Rebind,
    /// Compilers, stress-ng and fio.
    Jobs,
}

/// `cargo xtask soak`
pub(crate) fn soak(options: &Options) -> Result<()> {
    let names = if options.names.is_empty() { Name::value_variants() } else { &options.names };
    let mut failed = 0;
    for &name in names {
        let called = name.to_possible_value().map_or_else(String::new, |n| n.get_name().to_owned());
        let image = match name {
            Name::Jobs => debian_image::for_programs,
            _ => debian_image::for_tests,
        };
        let place = Place::prepare("soak", image)?;
        let start = Instant::now();
        let done = match name {
            Name::Fio => disks::fio(&place, options.fio_mib),
            Name::Crash => crash::crash(&place, options.rounds, options.format),
            Name::Transfer => network::transfer(&place, options.mib),
            Name::Iperf => network::iperf(&place, options.seconds),
            Name::Rebind => rebind::rebind(&place, options.rounds.saturating_mul(2)),
            Name::Jobs => jobs::jobs(&place, &options.jobs),
        };
        let took = start.elapsed().as_secs();
        match done {
            Ok(()) => println!("PASS {called} ({took} s)"),
            Err(error) => {
                failed += 1;
                println!("FAIL {called} ({took} s): {error:#}");
            }
        }
    }
    if failed > 0 {
        bail!("{failed} of {} failed", names.len());
    }
    Ok(())
}

/// What all of them need.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) lguest: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) debian: PathBuf,
    /// For images and initial RAM disks.
    directory: PathBuf,
}

impl Place {
    /// Builds and fetches it. `name` is that of the directory under `target`, `image` makes
    /// the disk with Debian's programs.
    pub(crate) fn prepare(name: &str, image: fn() -> Result<PathBuf>) -> Result<Self> {
        let directory = paths::target_directory()?.join(name);
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        Ok(Self {
            lguest: paths::release_lguest()?,
            kernel: kernel(Guest::Debian12Cloud)?,
            debian: image()?,
            directory,
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// An initial RAM disk that runs `script`.
    pub(crate) fn job(&self, name: &str, script: &str) -> Result<PathBuf> {
        let path = self.path(&format!("{name}.cpio"));
        initramfs::with_job(&self.kernel, script, &path)?;
        Ok(path)
    }

    /// `lguest run` of a job; disks and network are for the caller to add.
    pub(crate) fn run(&self, initrd: &Path, append: &str) -> Command {
        let mut command = Command::new(&self.lguest);
        command.arg("run").arg("--kernel").arg(&self.kernel).arg("--initrd").arg(initrd);
        command.args(["--append", &format!("lguest.mode=job quiet {append}")]);
        command
    }

    /// Gives the guest Debian's programs.
    pub(crate) fn with_debian(&self, command: &mut Command) {
        let disk = format!("{},readonly,format=raw,serial=debian", self.debian.display());
        command.args(["--disk", &disk]);
    }
}
