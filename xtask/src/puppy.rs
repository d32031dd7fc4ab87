//! `cargo puppy`: builds the kernel in Rust, and boots, tests or measures it.
//!
//! It lies in `lguest` (`lguest demo`), so all there is to do is to build that, and to have a
//! disk for its file.

use crate::compare::record;
use crate::paths;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Build and boot puppy, the kernel in Rust
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// What to do instead of talking to its shell
    #[arg(value_enum)]
    what: Option<What>,
    /// On a PC instead of lguest's own platform
    #[arg(long)]
    pc: bool,
    /// Put what `bench` finds into docs/performance.md
    #[arg(long)]
    record: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Run its tests, on both platforms
    Test,
    /// Measure, on both platforms
    Bench,
}

/// Bytes of its disk.
const DISK: u64 = 4 << 20;
/// Seconds that tests and measurements may take.
const LIMIT: &str = "120";

/// `cargo puppy`
pub(crate) fn puppy(options: &Options) -> Result<()> {
    let lguest = paths::release_lguest()?;
    let disk = disk()?;
    let demo = |platform: &str| {
        let mut command = Command::new(&lguest);
        command.args(["demo", "--platform", platform, "--disk"]).arg(&disk);
        command
    };
    let Some(what) = options.what else {
        eprintln!("Starting puppy; Ctrl-A x quits, Ctrl-A ? lists the keys.");
        let error = demo(if options.pc { "pc" } else { "lguest" }).exec();
        return Err(error).with_context(|| format!("cannot run {}", lguest.display()));
    };
    let platforms = if options.pc { &["pc"][..] } else { &["lguest", "pc"] };
    match what {
        What::Test => platforms.iter().try_for_each(|platform| {
            let status = demo(platform).args(["--append", "test", "--timeout", LIMIT]).status()?;
            if status.success() { Ok(()) } else { bail!("puppy on {platform}: {status}") }
        }),
        What::Bench => {
            let table = bench(platforms, demo)?;
            println!("{table}");
            if options.record { record(BEGIN, END, &table) } else { Ok(()) }
        }
    }
}

/// What stands around the table in docs/performance.md.
const BEGIN: &str = "<!-- recorded by cargo puppy bench: begin -->";
const END: &str = "<!-- recorded by cargo puppy bench: end -->";
/// How often it measures: the median counts.
const RUNS: usize = 5;
/// What its lines of measurements begin with.
const LINE: &str = "bench: ";

/// Has it measure on each platform, and makes a table of the medians.
fn bench(platforms: &[&str], demo: impl Fn(&str) -> Command) -> Result<String> {
    let mut names: Vec<String> = Vec::new();
    let mut found: HashMap<(String, &str), Vec<u64>> = HashMap::new();
    for (platform, _) in
        platforms.iter().flat_map(|platform| (0..RUNS).map(move |n| (*platform, n)))
    {
        let mut command = demo(platform);
        let output = command.args(["--append", "bench", "--timeout", LIMIT]).output()?;
        if !output.status.success() {
            bail!("puppy on {platform}: {}", output.status);
        }
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Some((name, nanoseconds)) = measurement(line) else { continue };
            if !names.contains(&name) {
                names.push(name.clone());
            }
            found.entry((name, platform)).or_default().push(nanoseconds);
        }
    }
    let median = |name: &String, platform| {
        let mut all = found.get(&(name.clone(), platform))?.clone();
        all.sort_unstable();
        all.get(all.len() / 2).copied()
    };
    let mut table =
        format!("Medians of {RUNS} runs; nanoseconds, and how many there are in a second.\n\n|");
    platforms.iter().for_each(|platform| table += &format!(" | {platform}"));
    table += " |\n|---|";
    platforms.iter().for_each(|_| table += "---|");
    for name in &names {
        table += &format!("\n| {name} |");
        for platform in platforms {
            table += &match median(name, platform) {
                Some(ns) => format!(" {ns} ns, {} k/s |", 1_000_000 / ns.max(1)),
                None => " |".to_owned(),
            };
        }
    }
    Ok(table)
}

/// A line of measurements: what was measured, and nanoseconds.
fn measurement(line: &str) -> Option<(String, u64)> {
    let (name, rest) = line.trim().strip_prefix(LINE)?.split_once(": ")?;
    Some((name.to_owned(), rest.split_once(" ns")?.0.parse().ok()?))
}

/// A disk for its file, kept from run to run.
fn disk() -> Result<PathBuf> {
    let path = paths::guests().join("puppy.disk");
    if !path.exists() {
        std::fs::create_dir_all(paths::guests())?;
        File::create(&path)
            .and_then(|file| file.set_len(DISK))
            .context(path.display().to_string())?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_are_told_from_other_lines() {
        let line = "bench: save, Called: 12 ns, 83333333 a second\r";
        assert_eq!(measurement(line), Some(("save, Called".into(), 12)));
        assert_eq!(measurement("puppy on Lguest: 60 MiB free"), None);
    }
}
