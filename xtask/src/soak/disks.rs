//! `soak fio`: random and sequential work on raw and qcow2 disks, all of it read back.

use super::Place;
use crate::running::Running;
use crate::{progress, qcow2};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(1800);

/// How a scratch disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The bytes as they are.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl Format {
    pub(crate) const ALL: [Self; 2] = [Self::Raw, Self::Qcow2];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// Makes an empty disk.
    pub(crate) fn create(self, path: &Path, size: u64) -> Result<()> {
        match self {
            Self::Raw => {
                let file = File::create(path).with_context(|| path.display().to_string())?;
                file.set_len(size)?;
                Ok(())
            }
            Self::Qcow2 => qcow2::create(path, size),
        }
    }

    /// Looks for damage in the image itself, where there is a program that can.
    pub(crate) fn check(self, path: &Path) -> Result<()> {
        if self == Self::Raw {
            return Ok(());
        }
        let Ok(output) = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output()
        else {
            eprintln!("no qemu-img on this machine (package qemu-utils): the image is not checked");
            return Ok(());
        };
        match output.status.code() {
            // 3: clusters that nobody uses, which is what a crash may leave.
            Some(0 | 3) => Ok(()),
            _ => {
                let said = [output.stdout, output.stderr].concat();
                bail!("{} is damaged: {}", path.display(), String::from_utf8_lossy(&said).trim())
            }
        }
    }
}

/// The option for a scratch disk.
pub(crate) fn disk(path: &Path, format: Format, serial: &str) -> String {
    format!("{},format={},serial={serial}", path.display(), format.name())
}

/// fio's jobs for a script, of `mib` MiB for each part.
pub(super) fn verify(mib: u64) -> String {
    format!("size={mib}\n{}", include_str!("../../../guests/jobs/verify.sh"))
}

/// How large a disk they need.
pub(super) fn disk_size(mib: u64) -> u64 {
    (4 * mib) << 20
}

/// `soak fio`
pub(super) fn fio(place: &Place, mib: u64) -> Result<()> {
    let script = format!("{}\n{}", verify(mib), include_str!("../../../guests/jobs/fio.sh"));
    let initrd = place.job("fio", &script)?;
    let mut command = place.run(&initrd, "");
    place.with_debian(&mut command);
    let paths = Format::ALL.map(|format| (format, place.path(&format!("fio.{}", format.name()))));
    for (format, path) in &paths {
        format.create(path, disk_size(mib))?;
        command.args(["--disk", &disk(path, *format, format.name())]);
    }
    let mut guest = Running::start(command, "fio")?;
    progress::step("fio on raw and qcow2", || guest.finish(LIMIT))?;
    for line in guest.said("init: ") {
        println!("  {line}");
    }
    for (format, path) in &paths {
        format.check(path)?;
        fs::remove_file(path)?;
    }
    Ok(())
}
