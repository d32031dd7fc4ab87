//! The initial RAM disk of the demo, the boot tests and the measurements: busybox, an `/init`
//! script and the smoke test; and the same with a kernel's modules for devices.

use crate::cpio::Archive;
use crate::{guests, modules, paths, progress};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Builds the statically linked smoke test and returns its path.
pub(crate) fn smoke() -> Result<PathBuf> {
    program("smoke", "the guests' smoke test")
}

/// Builds the statically linked program of `cargo xtask compare rows` and returns its path.
pub(crate) fn rows() -> Result<PathBuf> {
    program("rows", "what measures in guests")
}

/// Builds a program of `guests/`, `what` for people, statically linked.
fn program(name: &str, what: &str) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let target_directory = paths::guests().join("build");
    let build = || {
        paths::cargo()
            .args(["build", "--quiet", "--release", "--locked", "--target", TARGET])
            .arg("--manifest-path")
            .arg(paths::workspace().join("guests").join(name).join("Cargo.toml"))
            .arg("--target-dir")
            .arg(&target_directory)
            // glibc can be linked statically: libc6-dev brings libc.a.
            .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
            .status()
    };
    let status = progress::step(&format!("building {what}"), build)?;
    if !status.success() {
        bail!("{what} does not build: guests/{name}");
    }
    Ok(target_directory.join(TARGET).join("release").join(name))
}

/// Makes the initial RAM disk, anew each time since that takes no time, and returns its path.
pub(crate) fn initramfs() -> Result<PathBuf> {
    store(contents()?, &paths::guests().join("initramfs.cpio"))
}

/// Makes the initial RAM disk with the modules of a kernel that [`guests::kernel`] returned,
/// beside that kernel.
pub(crate) fn with_modules(kernel: &Path) -> Result<PathBuf> {
    store(contents_with_modules(kernel)?, &kernel.with_file_name("virtio-initrd.cpio"))
}

/// Makes the same with a job in it, a script that its mode `job` runs, at `path`.
pub(crate) fn with_job(kernel: &Path, job: &str, path: &Path) -> Result<()> {
    let mut archive = contents_with_modules(kernel)?;
    archive.file("job", 0o644, job.as_bytes());
    store(archive, path)?;
    Ok(())
}

/// Makes the same with the program that [`rows`] has built.
pub(crate) fn with_rows(kernel: &Path) -> Result<PathBuf> {
    let mut archive = contents_with_modules(kernel)?;
    archive.file("bin/rows", 0o755, &fs::read(rows()?)?);
    store(archive, &kernel.with_file_name("rows-initrd.cpio"))
}

fn contents_with_modules(kernel: &Path) -> Result<Archive> {
    let mut archive = contents()?;
    archive.directory("modules", 0o755);
    let mut order = String::new();
    for (name, bytes) in modules::kept(&kernel.with_file_name(guests::MODULES))? {
        archive.file(&format!("modules/{name}"), 0o644, &bytes);
        order.push_str(&format!("{name}\n"));
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive)
}

fn contents() -> Result<Archive> {
    let busybox = guests::busybox()?;
    let smoke = smoke()?;
    let scripts = paths::workspace().join("guests/init");
    let read = |path: &PathBuf| fs::read(path).with_context(|| path.display().to_string());

    let mut archive = Archive::default();
    for directory in ["bin", "dev", "lib", "mnt", "proc", "sys", "tmp"] {
        archive.directory(directory, 0o755);
    }
    // The kernel opens it for /init before anything is mounted.
    archive.device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, &read(&scripts.join("init"))?);
    for script in ["debian", "devices", "dhcp"] {
        archive.file(&format!("lib/{script}"), 0o755, &read(&scripts.join(script))?);
    }
    archive.file("bin/busybox", 0o755, &read(&busybox)?);
    archive.file("bin/smoke", 0o755, &read(&smoke)?);
    archive.link("bin/sh", "busybox");
    Ok(archive)
}

/// Replaced in one step: a boot test may be reading the old one.
fn store(archive: Archive, path: &Path) -> Result<PathBuf> {
    let new = path.with_extension("new");
    fs::write(&new, archive.finish())?;
    fs::rename(&new, path)?;
    Ok(path.to_owned())
}
