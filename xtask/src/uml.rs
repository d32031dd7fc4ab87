//! Debian's User-mode Linux, for comparison: a kernel that is an ordinary process, too, but a
//! kernel made for that. The machine's if it has one, else unpacked privately.

use crate::bounded;
use crate::paths;
use crate::private_tree::Program;
use anyhow::{Result, bail};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long it may take to boot and power off.
const BOOT: Duration = Duration::from_secs(60);

/// A User-mode Linux that can be started.
#[derive(Debug)]
pub(crate) struct Uml {
    program: Program,
}

impl Uml {
    /// Finds it, or downloads and unpacks it under `target/guests/user-mode-linux`.
    pub(crate) fn find() -> Result<Self> {
        Ok(Self { program: Program::find("linux.uml", "--version", "user-mode-linux")? })
    }

    /// Its kernel's release.
    pub(crate) fn version(&self) -> Result<String> {
        let output = self.program.command().arg("--version").stderr(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("User-mode Linux does not start");
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Makes sure that it boots `initrd` here: kernels of its age know nothing of what later CPUs
    /// keep for a process.
    pub(crate) fn boots(&self, initrd: &Path) -> Result<()> {
        let command = self.booting(initrd, 256, None, "quiet lguest.mode=uname");
        let log = paths::guests().join("user-mode-linux.log");
        let what = match bounded::run(command, BOOT, &log)? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => status.to_string(),
            None => format!("not within {} s", BOOT.as_secs()),
        };
        bail!("it does not boot on this host ({what}): see {}", log.display())
    }

    /// A guest of one CPU (it has no more) with its console on stdout and, if there is a
    /// disk, that one to be read. The guest's RAM is a file in /dev/shm or TMPDIR, where
    /// programs must be allowed to be run.
    pub(crate) fn booting(
        &self,
        initrd: &Path,
        mem_mib: u64,
        disk: Option<&Path>,
        append: &str,
    ) -> Command {
        let mut command = self.program.command();
        let named = |name: &str, path: &Path| {
            let mut argument = std::ffi::OsString::from(name);
            argument.push(path);
            argument
        };
        command
            .arg(format!("mem={mem_mib}M"))
            .arg(named("initrd=", initrd))
            // Where it would keep its sockets: not in the user's home.
            .arg(named("uml_dir=", &std::env::temp_dir()))
            .args(["con=null", "con0=null,fd:1"])
            .args(disk.map(|path| named("ubd0r=", path)))
            .args(append.split_whitespace());
        command
    }
}
