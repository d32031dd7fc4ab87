//! `cargo demo`: from a fresh checkout to a shell in Debian's kernel.

use crate::guests::{Guest, kernel};
use crate::{initramfs, paths};
use anyhow::{Context, Result};
use clap::Args;
use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Boot Debian's stock kernel to a shell
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// A kernel already at hand, instead of Debian's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    mem: String,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value = "1")]
    cpus: String,
    /// More kernel command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    append: String,
}

/// Fetches and builds what is missing, then becomes `lguest run`.
pub(crate) fn demo(options: &Options) -> Result<()> {
    let kernel = match &options.kernel {
        Some(kernel) => std::path::absolute(kernel)?,
        None => kernel(Guest::Debian12Cloud)?,
    };
    let initrd = initramfs::initramfs()?;
    let lguest = paths::release_lguest()?;

    let interactive = std::io::stdin().is_terminal();
    let mode = if interactive { "lguest.mode=shell" } else { "lguest.mode=uname quiet" };
    let mut command = Command::new(&lguest);
    command.arg("run").arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
    command.args(["--mem", &options.mem, "--cpus", &options.cpus]);
    command.arg("--append").arg(format!("{mode} {}", options.append).trim_end());
    if interactive {
        eprintln!("Starting the guest; Ctrl-A x quits, Ctrl-A ? lists the keys.");
    } else {
        // Nobody is there to press a key.
        command.args(["--timeout", "600"]);
    }
    Err(command.exec()).with_context(|| format!("cannot run {}", lguest.display()))
}
