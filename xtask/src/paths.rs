//! Where things are: the workspace, the build's output, the guests.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The workspace's root: the directory above this crate.
pub(crate) fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// Where kernels and guest programs are kept: `LGUEST_GUESTS`, or `target/guests` in the
/// workspace wherever the build's own output goes.
pub(crate) fn guests() -> PathBuf {
    match std::env::var_os("LGUEST_GUESTS") {
        Some(path) => path.into(),
        None => workspace().join("target/guests"),
    }
}

/// The cargo that runs us.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// Builds `lguest` in release and returns its path.
pub(crate) fn release_lguest() -> Result<PathBuf> {
    let status = cargo().args(["build", "--release", "--package", "lguest"]).status()?;
    if !status.success() {
        bail!("lguest does not build");
    }
    Ok(target_directory()?.join("release/lguest"))
}

/// Where cargo puts what it builds for the workspace.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let output = cargo().args(["metadata", "--format-version", "1", "--no-deps"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (_, rest) = text
        .split_once("\"target_directory\":\"")
        .context("cargo metadata does not say where the target directory is")?;
    let (path, _) = rest.split_once('"').context("cargo metadata is cut short")?;
    Ok(path.into())
}
