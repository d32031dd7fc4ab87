//! `cargo puppy`: builds the kernel in Rust, and boots, tests or measures it.
//!
//! It lies in `lguest` (`lguest demo`), so all there is to do is to build that, and to have a
//! disk for its file.

use crate::paths;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Build and boot puppy, the kernel in Rust
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// What to do instead of talking to its shell
    #[arg(value_enum)]
    what: Option<What>,
    /// On a PC instead of lguest's own platform
    #[arg(long)]
    pc: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Run its tests, on both platforms
    Test,
    /// Measure, on both platforms
    Bench,
}

/// Bytes of its disk.
const DISK: u64 = 4 << 20;
/// Seconds that tests and measurements may take.
const LIMIT: &str = "120";

/// `cargo puppy`
pub(crate) fn puppy(options: &Options) -> Result<()> {
    let lguest = paths::release_lguest()?;
    let disk = disk()?;
    let demo = |platform: &str| {
        let mut command = Command::new(&lguest);
        command.args(["demo", "--platform", platform, "--disk"]).arg(&disk);
        command
    };
    let Some(what) = options.what else {
        eprintln!("Starting puppy; Ctrl-A x quits, Ctrl-A ? lists the keys.");
        let error = demo(if options.pc { "pc" } else { "lguest" }).exec();
        return Err(error).with_context(|| format!("cannot run {}", lguest.display()));
    };
    let word = if what == What::Test { "test" } else { "bench" };
    let platforms = if options.pc { &["pc"][..] } else { &["lguest", "pc"] };
    for platform in platforms {
        let status = demo(platform).args(["--append", word, "--timeout", LIMIT]).status()?;
        if !status.success() {
            bail!("puppy on {platform}: {status}");
        }
    }
    Ok(())
}

/// A disk for its file, kept from run to run.
fn disk() -> Result<PathBuf> {
    let path = paths::guests().join("puppy.disk");
    if !path.exists() {
        std::fs::create_dir_all(paths::guests())?;
        File::create(&path)
            .and_then(|file| file.set_len(DISK))
            .context(path.display().to_string())?;
    }
    Ok(path)
}
