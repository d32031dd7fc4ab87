//! `cargo xtask xen-check`: pvops' Xen backend under Xen itself.
//!
//! Debian's hypervisor, by download only, boots under QEMU without KVM and starts a small
//! paravirtual kernel (`guests/xen-pv`) as its first domain. The kernel runs every interrupt
//! op and every frame conversion in each form and ends with a reason; Xen's own word on that
//! reason is the verdict. Not part of `cargo verify`, which needs no QEMU.

use crate::apt::{Apt, Suite};
use crate::qemu::Qemu;
use crate::{bounded, guests, paths, progress};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Prove pvops' Xen backend under Debian's Xen, in QEMU
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Seconds it may take
    #[arg(long, value_name = "SECONDS", default_value = "120")]
    timeout: u64,
    /// Show all that Xen says, too
    #[arg(long)]
    verbose: bool,
}

/// The machine's RAM, MiB, and the domain's share of it.
const MEMORY_MIB: u64 = 512;
const APPEND: &str = "console=com1 com1=115200,8n1 loglvl=all guest_loglvl=all dom0_mem=64M";

/// What Xen says when its first domain shuts down to start again: all is proved.
const PASSED: &str = "Hardware Dom0 shutdown: rebooting machine";
/// What Xen's own lines begin with.
const XEN: &str = "(XEN)";

/// `cargo xtask xen-check`
pub(crate) fn xen_check(options: &Options) -> Result<()> {
    let xen = hypervisor()?;
    let kernel = kernel()?;
    let qemu = Qemu::find()?;
    let log = paths::guests().join("xen/log");
    let command = qemu.multiboot(&xen, &kernel, MEMORY_MIB, APPEND);
    let limit = Duration::from_secs(options.timeout);
    let ended = progress::step("Xen under QEMU", || bounded::run(command, limit, &log))?;
    let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    for line in said.lines().filter(|line| options.verbose || !line.starts_with(XEN)) {
        println!("{line}");
    }
    match Verdict::of(&said, ended.is_some()) {
        Verdict::Passed => {
            println!("xen-check: passed: every op of the Xen backend holds under Xen");
            Ok(())
        }
        Verdict::Failed(why) => bail!("xen-check: {why}; all that was said: {}", log.display()),
    }
}

/// How it went.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed(String),
}

impl Verdict {
    fn of(said: &str, ended: bool) -> Self {
        let xen = || said.lines().filter_map(|line| line.strip_prefix(XEN)).map(str::trim);
        if xen().any(|line| line == PASSED) {
            return Self::Passed;
        }
        if let Some(line) = xen().find(|line| line.starts_with("Hardware Dom0")) {
            return Self::Failed(format!("the kernel gave up, says Xen: {line}"));
        }
        if !ended {
            return Self::Failed("it did not end in time (--timeout SECONDS)".into());
        }
        match xen().next_back() {
            Some(line) => {
                Self::Failed(format!("Xen did not get to its end; its last words: {line}"))
            }
            None => Self::Failed(format!("QEMU did not start Xen: {}", said.trim())),
        }
    }
}

/// Debian's hypervisor as QEMU takes it, fetched if it is not here yet.
fn hypervisor() -> Result<PathBuf> {
    let home = paths::guests().join("xen");
    let image = home.join("xen");
    if image.exists() {
        return Ok(image);
    }
    let apt = Apt::new(Suite::Bookworm)?;
    let package = apt.depends_on("xen-system-amd64", "xen-hypervisor-")?;
    let deb = apt.download(&package)?;
    guests::unpack(&deb, &home)?;
    let version = package.strip_prefix("xen-hypervisor-").unwrap_or(&package);
    let packed = home.join("boot").join(format!("xen-{version}.gz"));
    unpack_gzip(&packed, &image)?;
    fs::remove_file(deb)?;
    Ok(image)
}

/// QEMU's loader wants the file inside. In one step, so that half a file is never found.
fn unpack_gzip(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    let output = File::create(&new).with_context(|| new.display().to_string())?;
    let status = Command::new("gzip")
        .args(["--decompress", "--stdout"])
        .arg(from)
        .stdout(output)
        .status()
        .context("cannot run gzip")?;
    if !status.success() {
        bail!("{} does not unpack", from.display());
    }
    fs::rename(&new, to)?;
    Ok(())
}

/// Builds the kernel and returns its path. There need be no target for freestanding code:
/// the machine's own does, without its libraries and start files.
fn kernel() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let source = paths::workspace().join("guests/xen-pv");
    let script = format!("-Clink-arg=-Wl,-T,{}", source.join("xen-pv.ld").display());
    let flags = [
        // Xen loads it where it was linked.
        "-Crelocation-model=static",
        // Events arrive on the stack they interrupt.
        "-Cno-redzone=yes",
        // Functions of nothing but a call site then change no other register.
        "-Cforce-frame-pointers=yes",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        "-Clink-arg=-Wl,--build-id=none",
        &script,
    ];
    let target_directory = paths::guests().join("build");
    let build = || {
        paths::cargo()
            .args(["build", "--quiet", "--release", "--locked", "--target", TARGET])
            .arg("--manifest-path")
            .arg(source.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&target_directory)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .status()
    };
    let status = progress::step("building the kernel for Xen", build)?;
    if !status.success() {
        bail!("the kernel for Xen does not build");
    }
    Ok(target_directory.join(TARGET).join("release/xen-pv"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(said: &str, ended: bool) -> String {
        match Verdict::of(said, ended) {
            Verdict::Passed => panic!("passed: {said}"),
            Verdict::Failed(why) => why,
        }
    }

    #[test]
    fn only_xens_own_word_is_believed() {
        let end = "(XEN) Hardware Dom0 shutdown: rebooting machine\n";
        let said = format!("(XEN) Freed memory\npvops under Xen: all proved\n{end}");
        assert_eq!(Verdict::of(&said, true), Verdict::Passed);
        // Serial lines end in a carriage return too.
        assert_eq!(Verdict::of(&end.replace('\n', "\r\n"), true), Verdict::Passed);
        let boast = "pvops: (XEN) Hardware Dom0 shutdown: rebooting machine\n";
        assert!(why(boast, true).contains("did not start Xen"));
        let crash = "(XEN) Hardware Dom0 crashed: rebooting machine in 5 seconds.\n";
        assert!(why(crash, true).contains("Dom0 crashed"));
    }

    #[test]
    fn a_xen_that_hangs_or_stops_short_has_not_passed() {
        assert!(why("(XEN) *** Building a PV Dom0 ***\n", false).contains("in time"));
        let panic = "(XEN) Panic on CPU 0:\n(XEN) Could not construct domain 0\n";
        assert!(why(panic, true).contains("Could not construct domain 0"));
        assert!(why("qemu: no such CPU\n", true).contains("no such CPU"));
    }
}
