//! The kernels and programs that guests are made of, fetched once and kept.
//!
//! Each kernel becomes `target/guests/NAME/vmlinuz` with its `uname -r` in `release` beside
//! it, some of its modules in `modules/`, and `virtio-initrd.cpio`, the initial RAM disk with
//! these modules in it; that is what the boot tests look for.

use crate::apt::{Apt, Suite};
use crate::{initramfs, modules, paths, progress};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Fetch kernels and build what runs in guests
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Which; all if none is named
    names: Vec<Guest>,
    /// Fetch again even if already here
    #[arg(long)]
    refresh: bool,
}

/// Something a guest is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Guest {
    /// Debian 12's linux-image-cloud-amd64.
    #[value(name = "debian12-cloud")]
    Debian12Cloud,
    /// Debian 12's linux-image-amd64.
    #[value(name = "debian12-generic")]
    Debian12Generic,
    /// A newer cloud kernel: Debian 13's, or the backported one.
    #[value(name = "debian-newer")]
    DebianNewer,
    /// busybox-static.
    Busybox,
    /// passt, for the host of guests with `--net user`.
    Passt,
    /// The smoke test, statically linked.
    Smoke,
    /// The initial RAM disk with all of it.
    Initramfs,
}

const ALL: [Guest; 4] =
    [Guest::Debian12Cloud, Guest::Debian12Generic, Guest::DebianNewer, Guest::Initramfs];

/// `cargo xtask guests`
pub(crate) fn guests(options: &Options) -> Result<()> {
    let names = if options.names.is_empty() { &ALL[..] } else { &options.names };
    for &guest in names {
        if options.refresh
            && let Some(name) = guest.to_possible_value()
        {
            let _ = fs::remove_dir_all(paths::guests().join(name.get_name()));
        }
        let path = match guest {
            Guest::Busybox => busybox()?,
            Guest::Passt => passt()?,
            Guest::Smoke => initramfs::smoke()?,
            Guest::Initramfs => initramfs::initramfs()?,
            kernel => {
                let kernel = self::kernel(kernel)?;
                println!("{}", initramfs::with_modules(&kernel)?.display());
                kernel
            }
        };
        println!("{}", path.display());
    }
    Ok(())
}

/// The path of a kernel, fetched if it is not here yet.
pub(crate) fn kernel(guest: Guest) -> Result<PathBuf> {
    let (name, sources): (_, &[(Suite, &str)]) = match guest {
        Guest::Debian12Cloud => ("debian12-cloud", &[(Suite::Bookworm, "linux-image-cloud-amd64")]),
        Guest::Debian12Generic => ("debian12-generic", &[(Suite::Bookworm, "linux-image-amd64")]),
        Guest::DebianNewer => (
            "debian-newer",
            &[
                (Suite::Trixie, "linux-image-cloud-amd64"),
                (Suite::BookwormBackports, "linux-image-cloud-amd64"),
            ],
        ),
        other => bail!("{other:?} is no kernel"),
    };
    let home = paths::guests().join(name);
    let vmlinuz = home.join("vmlinuz");
    if vmlinuz.exists() && home.join("release").exists() && home.join(MODULES).exists() {
        return Ok(vmlinuz);
    }
    let mut failure = None;
    for &(suite, metapackage) in sources {
        match fetch_kernel(&home, suite, metapackage) {
            Ok(()) => return Ok(vmlinuz),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) => Err(error.context(format!("no kernel for {name}"))),
        None => bail!("{name} has no source"),
    }
}

fn fetch_kernel(home: &Path, suite: Suite, metapackage: &str) -> Result<()> {
    let apt = Apt::new(suite)?;
    let package = apt.depends_on(metapackage, "linux-image-")?;
    let release = package.strip_prefix("linux-image-").unwrap_or(&package);
    let deb = apt.download(&package)?;
    fs::create_dir_all(home)?;
    let unpack = || unpack_kernel(&deb, home);
    progress::step(&format!("unpacking {package}"), unpack)?;
    let image = home.join("boot").join(format!("vmlinuz-{release}"));
    fs::rename(&image, home.join("vmlinuz"))
        .with_context(|| format!("{package} holds no boot/vmlinuz-{release}"))?;
    fs::write(home.join("release"), release)?;
    // The package is several times the kernel's size and not needed again.
    fs::remove_file(deb)?;
    Ok(())
}

/// Where a kernel's modules are kept, beside it.
pub(crate) const MODULES: &str = "modules";

/// Unpacks a kernel package into `boot/` and the few modules that are of use.
fn unpack_kernel(deb: &Path, home: &Path) -> Result<()> {
    let all = home.join("unpacked");
    fs::create_dir_all(&all)?;
    let kept = extract(deb, &all).and_then(|()| {
        let _ = fs::remove_dir_all(home.join("boot"));
        fs::rename(all.join("boot"), home.join("boot"))?;
        // /lib is part of /usr in newer releases.
        let trees = [all.join("usr/lib/modules"), all.join("lib/modules")];
        let tree = trees.iter().find(|tree| tree.exists());
        let _ = fs::remove_dir_all(home.join(MODULES));
        modules::keep(tree.context("the package holds no lib/modules")?, &home.join(MODULES))
    });
    fs::remove_dir_all(&all)?;
    kept
}

/// Unpacks what matters of a kernel package. The files' owner is whoever runs this.
fn extract(deb: &Path, into: &Path) -> Result<()> {
    let mut unpacker = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg-deb")?;
    let tar = unpacker.stdout.take().context("dpkg-deb has no output")?;
    let status = Command::new("tar")
        .arg("--directory")
        .arg(into)
        .args(["--extract", "--no-same-owner", "--wildcards"])
        .args(["./boot/*", "*/lib/modules/*.ko*"])
        .stdin(tar)
        .status()
        .context("cannot run tar")?;
    let unpacked = unpacker.wait()?;
    if !status.success() || !unpacked.success() {
        bail!("{} does not unpack", deb.display());
    }
    Ok(())
}

/// The path of a statically linked busybox, fetched if it is not here yet.
pub(crate) fn busybox() -> Result<PathBuf> {
    let home = paths::guests().join("busybox");
    let program = home.join("bin/busybox");
    if !program.exists() {
        let deb = Apt::new(Suite::Bookworm)?.download("busybox-static")?;
        unpack(&deb, &home)?;
    }
    Ok(program)
}

/// The path of passt: the one that is installed, or else one that is fetched.
pub(crate) fn passt() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut installed = std::env::split_paths(&path).map(|folder| folder.join("passt"));
    if let Some(installed) = installed.find(|program| program.is_file()) {
        return Ok(installed);
    }
    let home = paths::guests().join("passt");
    let program = home.join("usr/bin/passt");
    if !program.exists() {
        let deb = Apt::new(Suite::Bookworm)?.download("passt")?;
        unpack(&deb, &home)?;
    }
    Ok(program)
}

/// Unpacks a whole package.
pub(crate) fn unpack(deb: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into)?;
    let status = Command::new("dpkg-deb")
        .arg("--extract")
        .arg(deb)
        .arg(into)
        .status()
        .context("cannot run dpkg-deb")?;
    if !status.success() {
        bail!("{} does not unpack", deb.display());
    }
    Ok(())
}
