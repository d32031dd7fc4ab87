//! Programs of Debian's that need not be installed: the machine's own where it has them, else
//! unpacked privately, with the libraries they depend on.

use crate::apt::{Apt, Suite};
use crate::{guests, paths, progress};
use anyhow::{Result, bail};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A program that can be started.
#[derive(Debug)]
pub(crate) struct Program {
    name: &'static str,
    /// The root of the private copy; `None` for the machine's own.
    root: Option<PathBuf>,
}

impl Program {
    /// Finds the program `name`, or downloads `package` and what it depends on and unpacks
    /// that under `target/guests`. With `option` it says something and ends.
    pub(crate) fn find(name: &'static str, option: &str, package: &str) -> Result<Self> {
        let installed = Self { name, root: None };
        if installed.starts(option) {
            return Ok(installed);
        }
        let directory = package.strip_suffix("-system-x86").unwrap_or(package);
        let root = paths::guests().join(directory);
        let private = Self { name, root: Some(root.clone()) };
        if !private.starts(option) {
            let apt = Apt::new(Suite::Bookworm)?;
            let debs = apt.download_with_dependencies(&[package])?;
            let unpack = || debs.iter().try_for_each(|deb| guests::unpack(deb, &root));
            progress::step(&format!("unpacking {package}"), unpack)?;
        }
        if !private.starts(option) {
            bail!("{name} does not start: apt-get install {package}");
        }
        Ok(private)
    }

    fn starts(&self, option: &str) -> bool {
        let output = self.command().arg(option).stderr(Stdio::null()).output();
        output.is_ok_and(|output| output.status.success())
    }

    /// Where the private copy is, if it is one.
    pub(crate) fn root(&self) -> Option<&Path> {
        self.root.as_deref()
    }

    /// The program with what it needs to find its libraries.
    pub(crate) fn command(&self) -> Command {
        let Some(root) = &self.root else { return Command::new(self.name) };
        let mut command = Command::new(root.join("usr/bin").join(self.name));
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let mut path = OsString::new();
        let beside = ["", "pulseaudio"].map(|name| libraries.join(name));
        for directory in beside.iter().chain([&root.join("lib/x86_64-linux-gnu")]) {
            path.push(directory);
            path.push(":");
        }
        command.env("LD_LIBRARY_PATH", path);
        command
    }
}
