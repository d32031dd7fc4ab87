//! The four that are compared, and the command that has each of them measure rows.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::list::Needs;
use crate::guests::{Guest, kernel};
use crate::private_tree::Program;
use crate::qemu::Qemu;
use crate::uml::Uml;
use crate::{debian_image, initramfs, mmdebstrap, paths};

/// Who measures. The order is that of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Host,
    Lguest,
    Qemu,
    Uml,
}

impl Peer {
    pub(super) const ALL: [Self; 4] = [Self::Host, Self::Lguest, Self::Qemu, Self::Uml];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Lguest => "lguest",
            Self::Qemu => "QEMU TCG",
            Self::Uml => "UML",
        }
    }
}

/// All that they need, built and fetched. What this machine cannot have is `None`, and has
/// been said.
pub(super) struct Place {
    rows: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    lguest: PathBuf,
    pub(super) qemu: Qemu,
    pub(super) uml: Option<Uml>,
    /// A disk with Debian's programs.
    debian: Option<PathBuf>,
    /// LuaJIT for the host, which machines seldom have.
    luajit: Option<Program>,
    mem_mib: u64,
}

impl Place {
    /// Prepares for rows with these needs.
    pub(super) fn prepare(needs: &[Needs], mem_mib: u64) -> Result<Self> {
        let kernel = kernel(Guest::Debian12Cloud)?;
        let programs = needs.contains(&Needs::Debian);
        let obstacle = mmdebstrap::obstacle().filter(|_| programs);
        if let Some(obstacle) = &obstacle {
            eprintln!("going on without Debian's programs: {obstacle}");
        }
        let debian = programs && obstacle.is_none();
        let luajit = debian.then(|| Program::find("luajit", "-v", "luajit"));
        let initrd = initramfs::with_rows(&kernel)?;
        let uml = Uml::find().and_then(|uml| uml.boots(&initrd).map(|()| uml));
        Ok(Self {
            rows: initramfs::rows()?,
            initrd,
            kernel,
            lguest: paths::release_lguest()?,
            qemu: Qemu::find()?,
            uml: without("User-mode Linux", uml),
            debian: debian.then(debian_image::for_programs).transpose()?,
            luajit: luajit.and_then(|found| without("LuaJIT on the host", found)),
            mem_mib,
        })
    }

    /// Whether `peer` can measure rows with these needs here.
    pub(super) fn has(&self, peer: Peer, needs: Needs) -> bool {
        // User-mode Linux has one CPU, always.
        let peer = peer != Peer::Uml || (self.uml.is_some() && needs != Needs::TwoCpus);
        peer && (needs != Needs::Debian || self.debian.is_some())
    }

    /// The command that measures `rows`; [`Place::has`] has said that there is one.
    pub(super) fn command(&self, peer: Peer, needs: Needs, rows: &[&str]) -> Result<Command> {
        let mode = if needs == Needs::Debian { "programs" } else { "rows" };
        let append = format!("quiet lguest.mode={mode} lguest.rows={}", rows.join(","));
        let cpus = if needs == Needs::TwoCpus { "2" } else { "1" };
        let disk = self.debian.as_deref().filter(|_| needs == Needs::Debian);
        Ok(match peer {
            Peer::Host => self.host(rows),
            Peer::Lguest => {
                let mut command = Command::new(&self.lguest);
                command.args(["run", "--cpus", cpus, "--mem", &format!("{}M", self.mem_mib)]);
                command.arg("--kernel").arg(&self.kernel).arg("--initrd").arg(&self.initrd);
                command.args(["--append", &append]);
                if let Some(disk) = disk {
                    let disk = format!("{},readonly,format=raw,serial=debian", disk.display());
                    command.args(["--disk", &disk]);
                }
                command
            }
            Peer::Qemu => {
                let append = format!("console=ttyS0 panic=-1 {append}");
                let mut command = self.qemu.pc(&self.kernel, &self.initrd, self.mem_mib, &append);
                command.args(["-smp", cpus]);
                if let Some(disk) = disk {
                    Qemu::disk(&mut command, disk, "debian", true);
                }
                command
            }
            Peer::Uml => {
                let uml = self.uml.as_ref().context("there is no User-mode Linux")?;
                uml.booting(&self.initrd, self.mem_mib, disk, &append)
            }
        })
    }

    /// The program itself. Debian's programs are the machine's own, not what the user may
    /// have put before them.
    fn host(&self, rows: &[&str]) -> Command {
        let mut command = Command::new(&self.rows);
        let mut path = OsString::from("/usr/bin:/bin");
        if let Some(luajit) = &self.luajit {
            let luajit = luajit.command();
            if let Some(home) = Path::new(luajit.get_program()).parent() {
                path.push(":");
                path.push(home);
            }
            command.envs(luajit.get_envs().filter_map(|(name, value)| Some((name, value?))));
        }
        command.args(rows).env("PATH", path);
        command
    }
}

/// Says in one line what will be missing and why.
fn without<T>(what: &str, found: Result<T>) -> Option<T> {
    found.inspect_err(|error| eprintln!("going on without {what}: {error:#}")).ok()
}
