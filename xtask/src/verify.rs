//! `cargo verify`: everything that must hold before a change is good.
//!
//! The steps run in order from quick to slow, each announced and timed, and all of them even
//! if one fails, so that one run shows everything there is to mend. What CI runs is this.

use crate::guests::{self, Guest};
use crate::{debian_image, initramfs, mmdebstrap, paths, test_failures};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// Check everything: format, lints, docs, tests, boots, fuzz targets
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Only these steps, by name
    steps: Vec<String>,
    /// Seconds each fuzz target runs
    #[arg(long, value_name = "SECONDS", default_value = "15")]
    fuzz_time: u32,
}

/// Packages that are workspaces of their own: the guests' programs and the fuzz targets.
const OUTLYING: [&str; 5] = [
    "guests/smoke/Cargo.toml",
    "guests/rows/Cargo.toml",
    "guests/xen-pv/Cargo.toml",
    "guests/puppy/Cargo.toml",
    "fuzz/Cargo.toml",
];

/// `cargo verify`
pub(crate) fn verify(options: &Options) -> Result<()> {
    let fuzz_time = options.fuzz_time;
    type Step<'a> = (&'static str, Box<dyn Fn() -> Result<()> + 'a>);
    let steps: [Step<'_>; 7] = [
        ("fmt", Box::new(format)),
        ("clippy", Box::new(lint)),
        ("doc", Box::new(document)),
        ("guests", Box::new(fetch)),
        ("test", Box::new(test)),
        ("fuzz", Box::new(move || fuzz(fuzz_time))),
        ("boot", Box::new(boot)),
    ];
    if let Some(unknown) = options.steps.iter().find(|name| !steps.iter().any(|s| s.0 == **name)) {
        let names = steps.map(|(name, _)| name).join(", ");
        bail!("there is no step \"{unknown}\": the steps are {names}");
    }

    let begun = Instant::now();
    let mut summary = Vec::new();
    for (name, step) in &steps {
        if !options.steps.is_empty() && !options.steps.iter().any(|wanted| wanted == name) {
            continue;
        }
        println!("\n==== {name}");
        let start = Instant::now();
        let result = step();
        let took = start.elapsed();
        match &result {
            Ok(()) => println!("==== {name}: passed in {}", seconds(took)),
            Err(_) => println!("==== {name}: FAILED in {}", seconds(took)),
        }
        summary.push((name, took, result));
    }

    for (name, _, result) in &summary {
        if let Err(error) = result {
            println!("\n==== why {name} failed: {error:#}");
        }
    }
    println!("\n==== summary");
    for (name, took, result) in &summary {
        let verdict = if result.is_ok() { "passed" } else { "FAILED" };
        println!("{name:<8} {verdict} {:>8}", seconds(*took));
    }
    println!("{:<15} {:>8}", "all", seconds(begun.elapsed()));
    let failed: Vec<&str> =
        summary.iter().filter(|(_, _, result)| result.is_err()).map(|(name, ..)| **name).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// Runs a command with its output going where ours goes.
fn pass(command: &mut Command) -> Result<()> {
    let shown: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    let shown = format!("{} {}", command.get_program().display(), shown.join(" "));
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Packages outside the workspace are built beside each other, not in the checkout.
fn outlying(command: &str, manifest: &str) -> Command {
    let mut cargo = paths::cargo();
    cargo.arg(command).arg("--manifest-path").arg(paths::workspace().join(manifest));
    cargo.env("CARGO_TARGET_DIR", paths::guests().join("build"));
    cargo
}

fn format() -> Result<()> {
    pass(paths::cargo().args(["fmt", "--all", "--check"]))?;
    OUTLYING.iter().try_for_each(|manifest| pass(outlying("fmt", manifest).arg("--check")))
}

/// What a lock file lacks is an error, too: it would be changed by whoever builds first.
fn lint() -> Result<()> {
    const STRICTLY: [&str; 4] = ["--locked", "--", "-D", "warnings"];
    pass(paths::cargo().args(["clippy", "--workspace", "--all-targets"]).args(STRICTLY))?;
    OUTLYING.iter().try_for_each(|manifest| pass(outlying("clippy", manifest).args(STRICTLY)))
}

fn document() -> Result<()> {
    pass(
        paths::cargo()
            .args(["doc", "--workspace", "--no-deps", "--document-private-items"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}

/// What the boots need; a step of its own, so that the network is used here and nowhere else.
fn fetch() -> Result<()> {
    for kernel in [Guest::Debian12Cloud, Guest::Debian12Generic, Guest::DebianNewer] {
        let path = guests::kernel(kernel)?;
        let release = fs::read_to_string(path.with_file_name("release"))?;
        println!("{} is Linux {release}", path.display());
        println!("{}", initramfs::with_modules(&path)?.display());
    }
    println!("{}", initramfs::initramfs()?.display());
    println!("{}", guests::passt()?.display());
    match mmdebstrap::obstacle() {
        None => println!("{}", debian_image::for_tests()?.display()),
        Some(obstacle) => println!("SKIPPED: Debian on a disk: {obstacle}"),
    }
    Ok(())
}

/// The PATH of tests: passt is on it, even if it is not installed.
fn path_with_passt() -> Result<OsString> {
    let passt = guests::passt()?;
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":");
    path.push(passt.parent().context("passt is in no folder")?);
    Ok(path)
}

fn test() -> Result<()> {
    test_failures::run(
        paths::cargo()
            .args(["test", "--workspace", "--no-fail-fast"])
            .env("PATH", path_with_passt()?),
    )
}

/// Tests that need the guests: they are ignored in an ordinary `cargo test`.
const BOOTS: [&str; 5] = ["boot", "disks", "nets", "consoles", "engine"];
/// The one that needs the Debian image, which not every user can make.
const DISTRIBUTION: &str = "distribution";

/// The boots, with the optimised program.
fn boot() -> Result<()> {
    let mut cargo = paths::cargo();
    cargo.args(["test", "--release", "--package", "lguest", "--no-fail-fast"]);
    for test in BOOTS {
        cargo.args(["--test", test]);
    }
    match mmdebstrap::obstacle() {
        None => _ = cargo.args(["--test", DISTRIBUTION]),
        Some(obstacle) => println!("SKIPPED: Debian on a disk: {obstacle}"),
    }
    test_failures::run(
        cargo
            .args(["--", "--ignored", "--test-threads", "2"])
            .env("LGUEST_GUESTS", paths::guests())
            .env("PATH", path_with_passt()?),
    )
}

/// Builds the fuzz targets with coverage feedback and runs each for a bounded time, starting
/// from its committed seeds. This needs neither cargo-fuzz nor a nightly compiler; with both
/// at hand `cargo fuzz run TARGET` does the same with a sanitizer on top.
fn fuzz(time: u32) -> Result<()> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    const FLAGS: &[&str] = &[
        "--cfg=fuzzing",
        "-Cpasses=sancov-module",
        "-Cllvm-args=-sanitizer-coverage-level=4",
        "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
        "-Cllvm-args=-sanitizer-coverage-pc-table",
        "-Cllvm-args=-sanitizer-coverage-trace-compares",
        "-Ccodegen-units=1",
        "-Cdebug-assertions",
        "-Coverflow-checks",
    ];
    let target_directory = paths::guests().join("fuzz");
    pass(
        outlying("build", "fuzz/Cargo.toml")
            .args(["--release", "--target", TARGET])
            .env("CARGO_TARGET_DIR", &target_directory)
            .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f")),
    )?;
    let mut sources: Vec<PathBuf> = fs::read_dir(paths::workspace().join("fuzz/fuzz_targets"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    sources.sort();
    for source in sources {
        let name = source.file_stem().unwrap_or_default();
        let seeds = seeds(name)?;
        // New inputs are kept from run to run, outside the checkout's sources.
        let corpus = target_directory.join("corpus").join(name);
        let artifacts = target_directory.join("artifacts").join(name);
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&artifacts)?;
        println!("== {} for {time} s", name.display());
        pass(
            Command::new(target_directory.join(TARGET).join("release").join(name))
                .arg(format!("-max_total_time={time}"))
                .args(["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"])
                .arg(format!("-artifact_prefix={}/", artifacts.display()))
                .arg(corpus)
                .arg(seeds),
        )?;
    }
    Ok(())
}

/// The committed seeds of a target: `fuzz_corpus/` of the crate it tries.
fn seeds(target: &OsStr) -> Result<PathBuf> {
    for crate_name in ["vmm", "softcpu"] {
        let corpus = paths::workspace().join("crates").join(crate_name).join("fuzz_corpus");
        for directory in [corpus.join(target), corpus.join("devices").join(target)] {
            if fs::read_dir(&directory).is_ok_and(|mut entries| entries.next().is_some()) {
                return Ok(directory);
            }
        }
    }
    bail!("the fuzz target {} has no seeds in any fuzz_corpus/", target.display())
}
