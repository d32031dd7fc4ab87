//! Builds the kernel that `lguest demo` boots: `guests/puppy`, which is a workspace of its
//! own because it is freestanding.
//!
//! Always optimised, and once for all of lguest's own profiles: its output goes to
//! `target/puppy`. Its lock file names no package version that the workspace's does not, so
//! who can build lguest without a network can build this (a test holds it to that).

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// What it is made of, from the checkout's root.
const SOURCES: [&str; 5] = [
    "guests/puppy",
    "crates/lguest-guest",
    "crates/lguest-abi/src",
    "crates/pvops/src",
    "crates/pvops-macros/src",
];
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for source in SOURCES {
        let source = root.join(source);
        if source.ends_with("puppy") {
            // Not the folder: a build by hand puts its output there.
            for part in ["src", "Cargo.toml", "Cargo.lock", "build.rs", ".cargo"] {
                println!("cargo::rerun-if-changed={}", source.join(part).display());
            }
        } else {
            println!("cargo::rerun-if-changed={}", source.display());
        }
    }
    let target_directory = target_directory();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // In its folder, where its own configuration counts; and ours does not.
    cargo.current_dir(root.join("guests/puppy"));
    for ours in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
    ] {
        cargo.env_remove(ours);
    }
    cargo.args(["build", "--quiet", "--release", "--locked", "--target-dir"]);
    let status = cargo.arg(&target_directory).status();
    if !status.is_ok_and(|status| status.success()) {
        eprintln!("guests/puppy does not build: {cargo:?}");
        exit(1);
    }
    let kernel = target_directory.join(TARGET).join("release/puppy");
    // A copy of our own: another build may replace that file at any time.
    let copy = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("puppy");
    if let Err(error) = std::fs::copy(&kernel, &copy) {
        eprintln!("{} cannot be copied: {error}", kernel.display());
        exit(1);
    }
    println!("cargo::rustc-env=PUPPY={}", copy.display());
}

/// `target/puppy`, wherever the target directory is: ours is `target/PROFILE/build/NAME/out`,
/// with perhaps a target's name in between.
fn target_directory() -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let profile = out.ancestors().nth(3).unwrap_or(&out);
    let above = profile.parent().unwrap_or(profile);
    let named = env::var_os("TARGET").is_some_and(|target| above.ends_with(target));
    let target = if named { above.parent().unwrap_or(above) } else { above };
    target.join("puppy")
}
