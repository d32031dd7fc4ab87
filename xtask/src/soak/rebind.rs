//! `soak rebind`: drivers are taken from a disk and a network card under load, and come back.

use super::disks::{Format, disk};
use super::{Place, sink};
use crate::progress;
use crate::running::Running;
use anyhow::Result;
use std::fs;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(1800);
const SIZE: u64 = 64 << 20;

/// `soak rebind`
pub(super) fn rebind(place: &Place, rounds: u32) -> Result<()> {
    let port = sink::drop_all()?;
    let script = include_str!("../../../guests/jobs/rebind.sh");
    let initrd = place.job("rebind", &format!("rounds={rounds} port={port}\n{script}"))?;
    let path = place.path("rebind.raw");
    Format::Raw.create(&path, SIZE)?;
    let mut command = place.run(&initrd, "");
    command.args(["--disk", &disk(&path, Format::Raw, "scratch"), "--net", "user"]);
    let mut guest = Running::start(command, "rebind")?;
    progress::step(&format!("{rounds} hot resets of disk and network"), || guest.finish(LIMIT))?;
    println!("  {} hot resets of each", guest.said("init: PASS round-").count());
    fs::remove_file(&path)?;
    Ok(())
}
