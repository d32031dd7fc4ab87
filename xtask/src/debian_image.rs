//! `cargo xtask debian-image`: a disk with a real distribution on it, for guests.
//!
//! mmdebstrap makes the tree out of packages, `mkfs.ext4 -d` a file system out of the tree,
//! and a partition table goes around that. The image has no boot loader: its kernel and
//! initramfs are taken from its /boot from outside. It is a test image: root has no password.

use crate::apt::{Apt, Suite};
use crate::mmdebstrap::Mmdebstrap;
use crate::partition_table::{self, MARGIN};
use crate::{paths, progress};
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Make a disk image with Debian on it
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Where to, instead of target/guests/debian-image/SUITE.img
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
    /// Size of the disk
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = size)]
    size: u64,
    /// Debian's release
    #[arg(long, value_name = "NAME", default_value = "bookworm")]
    suite: Suite,
    /// More packages
    #[arg(long, value_name = "PACKAGE", value_delimiter = ',')]
    include: Vec<String>,
    /// What measurements and tests of devices need: fio, iperf3, ethtool
    #[arg(long)]
    for_tests: bool,
    /// Make it again even if it is already here
    #[arg(long)]
    force: bool,
}

/// A system that boots, has a network and can be logged in to; no more.
const PACKAGES: &[&str] = &[
    "dbus",
    "e2fsprogs",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "linux-image-cloud-amd64",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
];
const FOR_TESTS: &[&str] = &["ethtool", "fio", "iperf3"];
const FOR_PROGRAMS: &[&str] =
    &["fio", "gcc", "libc6-dev", "luajit", "make", "nodejs", "python3", "stress-ng"];

/// Run within the tree once all packages are configured.
const SETUP: &str = include_str!("../../guests/debian/setup.sh");

/// Makes a file system of a tree. The tree comes as a tar archive on stdin, the image is
/// stdout, opened for reading and writing: the shell's user may not be able to reach it by
/// its path. Device nodes are the kernel's business (devtmpfs), and root of a namespace may
/// not make any.
const FILL: &str = r#"
exec 3<>/proc/self/fd/1 1>&2
tree=$(mktemp --directory --tmpdir lguest-debian.XXXXXXXX)
trap 'rm -rf "$tree"' EXIT
tar --extract --numeric-owner --xattrs --xattrs-include='*' --exclude './dev/*' \
    --directory "$tree"
mkfs.ext4 -q -F -L debian -U "$uuid" -E "offset=$offset,lazy_itable_init=0,lazy_journal_init=0" \
    -d "$tree" /proc/self/fd/3 "${kib}k"
"#;

/// Below this no Debian fits.
const SMALLEST: u64 = 1 << 30;
/// How long packages may take to come and to be configured, and a file system to be filled:
/// a slow machine with a slow network's worth.
const TREE_LIMIT: &str = "3600";
const FILL_LIMIT: &str = "900";

/// `cargo xtask debian-image`
pub(crate) fn debian_image(options: &Options) -> Result<()> {
    let default = || Ok(default_path(options.suite));
    let out = options.out.as_ref().map_or_else(default, std::path::absolute)?;
    println!("{}", make(options, &out)?.display());
    Ok(())
}

/// The image that measurements and tests of devices take their programs from, made if it is
/// not here yet.
pub(crate) fn for_tests() -> Result<PathBuf> {
    let options = Options {
        out: None,
        size: 2 << 30,
        suite: Suite::Bookworm,
        include: Vec::new(),
        for_tests: true,
        force: false,
    };
    make(&options, &default_path(options.suite))
}

/// The image that `cargo xtask compare rows` and `cargo xtask soak jobs` take programs from,
/// made if it is not here yet.
pub(crate) fn for_programs() -> Result<PathBuf> {
    let include = FOR_PROGRAMS.iter().map(|name| (*name).to_owned()).collect();
    let options = Options {
        out: None,
        size: 2 << 30,
        suite: Suite::Bookworm,
        include,
        for_tests: false,
        force: false,
    };
    make(&options, &home().join("programs.img"))
}

fn default_path(suite: Suite) -> PathBuf {
    home().join(format!("{}.img", suite.name()))
}

fn home() -> PathBuf {
    paths::guests().join("debian-image")
}

fn make(options: &Options, out: &Path) -> Result<PathBuf> {
    if options.size < SMALLEST {
        bail!("--size {} is too small for Debian: give 1G or more", options.size);
    }
    let packages = packages(options);
    // What the image was made by lies beside it, so that asking for the same is quick.
    let recipe = format!("{}\n{}\n{packages}\n{SETUP}", options.suite.name(), options.size);
    let stamp = out.with_extension("recipe");
    if !options.force && out.exists() && fs::read_to_string(&stamp).is_ok_and(|old| old == recipe) {
        return Ok(out.to_owned());
    }
    if !options.force && out.exists() && !stamp.exists() {
        bail!("{} is there already and was not made here: give --force", out.display());
    }

    let mmdebstrap = Mmdebstrap::find()?;
    let home = home();
    fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    let tar = home.join("tree.tar");
    let uuid = random_uuid()?;
    let tree = || make_tree(&mmdebstrap, options.suite, &packages, &uuid, &tar);
    let done = progress::step(&format!("making Debian {} of packages", options.suite.name()), tree);
    let new = out.with_extension("img.new");
    let done = done.and_then(|()| {
        let image = || make_image(&mmdebstrap, &tar, &new, options.size, &uuid);
        progress::step("making a disk image of it", image)
    });
    let _ = fs::remove_file(&tar);
    if let Err(error) = done {
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    // In this order: a stamp beside another image would vouch for the wrong one.
    let _ = fs::remove_file(&stamp);
    fs::rename(&new, out).with_context(|| format!("cannot make {}", out.display()))?;
    fs::write(&stamp, recipe)?;
    Ok(out.to_owned())
}

/// All packages asked for, separated by commas, each once.
fn packages(options: &Options) -> String {
    let mut all: Vec<&str> = PACKAGES.to_vec();
    if options.for_tests {
        all.extend(FOR_TESTS);
    }
    all.extend(options.include.iter().map(String::as_str));
    all.sort_unstable();
    all.dedup();
    all.join(",")
}

/// Makes a tar archive of a configured system.
fn make_tree(
    mmdebstrap: &Mmdebstrap,
    suite: Suite,
    packages: &str,
    uuid: &str,
    tar: &Path,
) -> Result<()> {
    let file = File::create(tar).with_context(|| format!("cannot make {}", tar.display()))?;
    let mut command = mmdebstrap.command();
    command
        .args(["--variant=minbase", "--format=tar", "--architectures=amd64"])
        // Nobody needs the tree after a crash of this machine.
        .arg("--dpkgopt=force-unsafe-io")
        .arg(format!("--include={packages}"))
        .arg(format!("--customize-hook=set -eu\nuuid={uuid}\n{SETUP}"))
        .args([suite.name(), "-"])
        .args(Apt::sources(suite)?.lines());
    run(&command, TREE_LIMIT, Stdio::null(), file)
}

/// Makes a partitioned disk out of the archive.
fn make_image(
    mmdebstrap: &Mmdebstrap,
    tar: &Path,
    image: &Path,
    size: u64,
    uuid: &str,
) -> Result<()> {
    let open = || -> Result<File> {
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(image)?;
        file.set_len(size)?;
        // Whoever fills it may be another user, of a namespace.
        file.set_permissions(Permissions::from_mode(0o666))?;
        Ok(file)
    };
    let mut file = open().with_context(|| format!("cannot make {}", image.display()))?;
    let mut command = mmdebstrap.inside(FILL);
    command
        .env("uuid", uuid)
        .env("offset", MARGIN.to_string())
        .env("kib", ((size - 2 * MARGIN) >> 10).to_string());
    run(&command, FILL_LIMIT, File::open(tar)?.into(), file.try_clone()?)?;
    partition_table::write(&mut file, size, &random_uuid()?, &random_uuid()?)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.sync_all()?;
    Ok(())
}

/// Runs a command for at most `limit` seconds. What it says goes to a log, and its last words
/// into the error.
fn run(command: &Command, limit: &str, stdin: Stdio, stdout: File) -> Result<()> {
    let log = home().join("log");
    let mut bounded = Command::new("timeout");
    bounded.args(["--kill-after=30", limit]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            bounded.env(name, value);
        }
    }
    if let Some(directory) = command.get_current_dir() {
        bounded.current_dir(directory);
    }
    let status = bounded.stdin(stdin).stdout(stdout).stderr(File::create(&log)?).status();
    let status = status.context("cannot run timeout(1), which is part of coreutils")?;
    if status.success() {
        return Ok(());
    }
    let said = fs::read_to_string(&log).unwrap_or_default();
    Err(anyhow!("{} ({status}; all of it is in {})", reason(&said), log.display()))
}

/// The line that says why: the first error, of which later ones are only consequences, or
/// else the last words.
fn reason(log: &str) -> &str {
    let error = log.lines().find(|line| line.starts_with("E:"));
    let error = error.or(log.lines().rfind(|line| !line.trim().is_empty()));
    error.unwrap_or("no message").trim_start_matches("E:").trim()
}

/// The kernel's own source of version 4 UUIDs.
fn random_uuid() -> Result<String> {
    const PATH: &str = "/proc/sys/kernel/random/uuid";
    Ok(fs::read_to_string(PATH).context(PATH)?.trim().to_owned())
}

/// A size with an optional K, M, G or T, in whole megabytes.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.trim_end_matches(|c: char| c.is_ascii_alphabetic()) {
        digits if digits.len() == text.len() => (digits, 0),
        digits => match text.get(digits.len()..).unwrap_or_default() {
            "K" => (digits, 10),
            "M" => (digits, 20),
            "G" => (digits, 30),
            "T" => (digits, 40),
            _ => (text, 0),
        },
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    match bytes {
        Some(bytes) if bytes % MARGIN == 0 && bytes < 1 << 50 => Ok(bytes),
        _ => Err("give whole megabytes, such as 2G or 2500M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_megabytes() {
        assert_eq!(size("2G"), Ok(2 << 30));
        assert_eq!(size("1500M"), Ok(1500 << 20));
        assert_eq!(size("1048576"), Ok(1 << 20));
        for bad in ["", "G", "2g", "2GG", "-1G", "1K", "99999999T", "1.5G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_error_is_the_reason() {
        let log = "I: starting\nE: Unable to locate package x\nE: setup failed\nI: bye\n";
        assert_eq!(reason(log), "Unable to locate package x");
        assert_eq!(reason("tar: cannot\nmkfs: no space\n\n"), "mkfs: no space");
        assert_eq!(reason(""), "no message");
    }

    #[test]
    fn packages_are_named_once() {
        let options = Options {
            out: None,
            size: 2 << 30,
            suite: Suite::Bookworm,
            include: vec!["fio".into(), "udev".into(), "curl".into()],
            for_tests: true,
            force: false,
        };
        let all = packages(&options);
        assert_eq!(all.matches("fio").count(), 1, "{all}");
        assert!(all.contains("curl") && all.contains("iperf3") && all.contains("systemd-sysv"));
    }
}
