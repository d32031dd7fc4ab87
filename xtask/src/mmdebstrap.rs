//! mmdebstrap, which makes a Debian tree out of packages; fetched, not installed.
//!
//! It needs to be root, or to become root of a user namespace with a range of user numbers
//! of its own, because the files of a system belong to several users. Which of the two it is
//! decides [`Privilege::of_this_user`]; whatever writes or reads such a tree afterwards must
//! run by the same means ([`Mmdebstrap::inside`]).

use crate::apt::{Apt, Suite};
use crate::{guests, paths};
use anyhow::{Result, bail};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where programs for administrators are, which an ordinary user's PATH leaves out.
const ADMINISTRATORS_PATHS: &str = ":/usr/local/sbin:/usr/sbin:/sbin";

/// How files can be given to other users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Privilege {
    /// This is root.
    Root,
    /// By user namespaces and `newuidmap`.
    Namespace,
}

/// Why this user cannot make Debian trees, with what would help; nothing if he can.
pub(crate) fn obstacle() -> Option<String> {
    Privilege::of_this_user().err().map(|error| format!("{error:#}"))
}

impl Privilege {
    /// # Errors
    /// Neither is possible; the line says what would help.
    fn of_this_user() -> Result<Self> {
        if rustix::process::geteuid().is_root() {
            return Ok(Self::Root);
        }
        let user = user_name()?;
        let mapped = ["newuidmap", "newgidmap"].iter().all(|name| on_path(name));
        if !mapped {
            bail!("a Debian image needs root, or the package uidmap: apt-get install uidmap");
        }
        for file in ["/etc/subuid", "/etc/subgid"] {
            if !names(&fs::read_to_string(file).unwrap_or_default(), &user) {
                bail!(
                    "a Debian image needs root, or user numbers for {user} in {file}: \
                     usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
                );
            }
        }
        Ok(Self::Namespace)
    }
}

/// Whether a line of /etc/subuid is this user's.
fn names(file: &str, user: &str) -> bool {
    file.lines().any(|line| line.split(':').next() == Some(user))
}

fn user_name() -> Result<String> {
    let output = Command::new("id").args(["--user", "--name"]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(name).exists())
}

/// An mmdebstrap that can be started.
#[derive(Debug)]
pub(crate) struct Mmdebstrap {
    program: PathBuf,
    privilege: Privilege,
}

impl Mmdebstrap {
    /// Unpacks it under `target/guests/mmdebstrap` if it is not there yet.
    pub(crate) fn find() -> Result<Self> {
        let privilege = Privilege::of_this_user()?;
        for program in ["mkfs.ext4", "perl", "tar"] {
            let there = Command::new(program).env("PATH", path()).arg("--version").output();
            if there.is_err() {
                bail!("{program} is missing: apt-get install e2fsprogs perl tar");
            }
        }
        let home = paths::guests().join("mmdebstrap");
        let program = home.join("usr/bin/mmdebstrap");
        if !program.exists() {
            let deb = Apt::new(Suite::Bookworm)?.download("mmdebstrap")?;
            guests::unpack(&deb, &home)?;
        }
        Ok(Self { program, privilege })
    }

    /// The program, to make a tree.
    pub(crate) fn command(&self) -> Command {
        let mut command = self.plain();
        command.arg(match self.privilege {
            Privilege::Root => "--mode=root",
            Privilege::Namespace => "--mode=unshare",
        });
        command
    }

    /// A shell with the rights a tree's files need.
    pub(crate) fn inside(&self, script: &str) -> Command {
        let mut command = match self.privilege {
            Privilege::Root => Command::new("sh"),
            Privilege::Namespace => {
                let mut command = self.plain();
                command.args(["--unshare-helper", "sh"]);
                command
            }
        };
        command.env("PATH", path()).args(["-euc", script]);
        command
    }

    fn plain(&self) -> Command {
        // Found beside it are parts that it looks for under /usr when it is installed; none
        // of them is needed here.
        let mut command = Command::new("perl");
        command.arg(&self.program).env("PATH", path()).env("LC_ALL", "C.UTF-8");
        // A user of the namespace owns neither the checkout nor a private TMPDIR.
        command.env("TMPDIR", "/var/tmp").current_dir(Path::new("/"));
        command
    }
}

fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(ADMINISTRATORS_PATHS);
    path
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_user_is_found_by_the_whole_name() {
        let file = "alice:100000:65536\nbob:165536:65536\n";
        assert!(super::names(file, "bob"));
        assert!(!super::names(file, "bo") && !super::names("", "bob"));
    }
}
