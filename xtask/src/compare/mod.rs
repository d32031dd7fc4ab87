//! `cargo xtask compare`: lguest beside QEMU without KVM, on the same kernel, initial RAM
//! disk and machine, alternating so that both see the same weather.

mod devices;
mod lguest;
mod measured;
mod rows;
mod tsc;

use crate::guests::{Guest, kernel};
use crate::measure::{self, Run};
use crate::qemu::Qemu;
use crate::{initramfs, paths, progress};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use std::fs;
use std::process::Command;
use std::time::Duration;

/// Measure lguest against QEMU without KVM
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: Option<What>,
    /// Runs of each
    #[arg(long, value_name = "N", default_value = "5")]
    runs: u32,
    /// Guest memory, MiB
    #[arg(long, value_name = "MIB", default_value = "512")]
    mem: u64,
    /// Write the result into docs/performance.md
    #[arg(long)]
    record: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Disks and networks, instead of boots
    Devices(devices::Options),
    /// Programs' work: computing, system calls, processes
    Rows(rows::Options),
    /// The lguest ABI, and a kernel that has it
    Lguest(lguest::Options),
}

/// The bars of docs/specification.md.
const TIME_RATIO: f64 = 0.5;
const OVERHEAD_MIB: f64 = 64.0;
const OVERHEAD_WITHOUT_CODE_MIB: f64 = 48.0;
const IDLE_PERCENT: f64 = 2.0;

/// How many runs of QEMU may hang before the comparison is given up, and how long each is
/// given: its guests boot in two seconds, and busy hosts make that ten.
const MOST_HUNG: u32 = 3;
const QEMU_LIMIT: Duration = Duration::from_secs(30);

/// The markers around the recorded section.
const BEGIN: &str = "<!-- recorded by cargo xtask compare: begin -->";
const END: &str = "<!-- recorded by cargo xtask compare: end -->";

/// `cargo xtask compare`
pub(crate) fn compare(options: &Options) -> Result<()> {
    match &options.what {
        Some(What::Devices(options)) => return devices::compare(options),
        Some(What::Rows(options)) => return rows::compare(options),
        Some(What::Lguest(options)) => return lguest::compare(options),
        None => {}
    }
    let kernel_path = kernel(Guest::Debian12Cloud)?;
    let initrd = initramfs::initramfs()?;
    let qemu = Qemu::find()?;
    let lguest = paths::release_lguest()?;
    // QEMU's microvm has nothing to measure the TSC by but an emulated timer, and the kernel hangs
    // where that fails on it, which is half the time on a busy host.
    let append =
        format!("console=ttyS0 panic=-1 lguest.mode=idle tsc_early_khz={}", tsc::host_khz());

    let (mut ours, mut theirs, mut hung) = (Vec::new(), Vec::new(), 0);
    for round in 0..options.runs {
        // Idling is watched once each; it takes a while and hardly varies.
        let idle = round == 0;
        let count = format!("{}/{}", round + 1, options.runs);
        let mut command = Command::new(&lguest);
        command.args(["run", "--mem", &format!("{}M", options.mem)]);
        command.arg("--kernel").arg(&kernel_path).arg("--initrd").arg(&initrd);
        command.args(["--append", "lguest.mode=idle"]);
        let run = || measure::run(command, options.mem, idle, measure::LIMIT);
        ours.push(progress::step(&format!("lguest, run {count}"), run)?);

        // A run that hangs all the same is no measurement, and is made again.
        let run = || {
            repeat(&mut hung, || {
                let command = qemu.microvm(&kernel_path, &initrd, options.mem, &append);
                measure::run(command, options.mem, idle, QEMU_LIMIT)
            })
        };
        theirs.push(progress::step(&format!("QEMU, run {count}"), run)?);
    }
    if hung > 0 {
        println!("QEMU hung in {hung} further runs, which do not count.");
    }

    let release = fs::read_to_string(kernel_path.with_file_name("release"))?;
    let report = report(
        &Summary::of(&ours),
        &Summary::of(&theirs),
        &Setting {
            host: host(),
            qemu: qemu.version()?,
            release: release.trim().to_owned(),
            runs: options.runs,
            mem: options.mem,
        },
    );
    println!("{report}");
    if options.record {
        record(BEGIN, END, &report)?;
    }
    Ok(())
}

/// Runs until a run does not fail, or too many have: `hung` counts them.
fn repeat<T>(hung: &mut u32, mut run: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match run() {
            Ok(done) => return Ok(done),
            Err(error) => {
                *hung += 1;
                // What the guest said last, line by line, is of no use here.
                let why = error.to_string();
                let why = why.lines().next().unwrap_or_default();
                if *hung > MOST_HUNG {
                    bail!("{hung} runs of QEMU hung ({why}): measure on a quieter machine");
                }
                eprintln!("made again: {why}");
            }
        }
    }
}

/// What was measured on.
struct Setting {
    host: String,
    qemu: String,
    release: String,
    runs: u32,
    mem: u64,
}

/// Several runs in a few numbers.
struct Summary {
    fastest: f64,
    median: f64,
    slowest: f64,
    overhead_mib: f64,
    /// The same without translated code.
    without_code_mib: f64,
    idle_percent: f64,
}

impl Summary {
    fn of(runs: &[Run]) -> Self {
        let mut times: Vec<f64> = runs.iter().map(|run| run.to_init.as_secs_f64()).collect();
        let median = median(&mut times);
        let most = |of: fn(&Run) -> u64| {
            runs.iter().map(of).max().unwrap_or(0) as f64 / f64::from(1 << 20)
        };
        Self {
            fastest: times.first().copied().unwrap_or(f64::NAN),
            median,
            slowest: times.last().copied().unwrap_or(f64::NAN),
            overhead_mib: most(|run| run.overhead),
            without_code_mib: most(|run| run.overhead.saturating_sub(run.code)),
            idle_percent: runs.iter().find_map(|run| run.idle).unwrap_or(f64::NAN) * 100.0,
        }
    }
}

/// The middle value; sorts them.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 if middle > 0 => (values[middle - 1] + values[middle]) / 2.0,
        _ => values.get(middle).copied().unwrap_or(f64::NAN),
    }
}

/// The machine measured on, as far as it matters.
fn host() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cores} cores", model.map_or("unknown processor", |(_, name)| name))
}

/// What is said of a bar.
fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

fn report(ours: &Summary, theirs: &Summary, setting: &Setting) -> String {
    let ratio = ours.median / theirs.median;
    let Setting { host, qemu, release, runs, mem } = setting;
    let memory = |what: &str, of: fn(&Summary) -> f64, most: f64| {
        let (ours, theirs) = (of(ours), of(theirs));
        format!(
            "| {what} | {ours:.1} MiB | {theirs:.1} MiB | {:.2} | at most {most} MiB | {} |",
            ours / theirs,
            verdict(ours <= most)
        )
    };
    [
        format!("{host}; Linux {release}, 1 vCPU, {mem} MiB; {runs} runs each, alternating;"),
        format!("{qemu}, `-accel tcg -cpu max -M microvm`."),
        String::new(),
        "| | lguest | QEMU TCG | ratio | bar | |".into(),
        "|---|---|---|---|---|---|".into(),
        format!(
            "| start to first line of /init, median | {:.2} s | {:.2} s | {ratio:.2} | \
             at most {TIME_RATIO}x | {} |",
            ours.median,
            theirs.median,
            verdict(ratio <= TIME_RATIO)
        ),
        format!(
            "| fastest to slowest | {:.2} to {:.2} s | {:.2} to {:.2} s | | | |",
            ours.fastest, ours.slowest, theirs.fastest, theirs.slowest
        ),
        memory("peak memory beyond guest RAM", |it| it.overhead_mib, OVERHEAD_MIB),
        memory(
            "the same without translated code",
            |it| it.without_code_mib,
            OVERHEAD_WITHOUT_CODE_MIB,
        ),
        format!(
            "| idle guest, part of a core | {:.2} % | {:.2} % | {:.2} | under {IDLE_PERCENT} % | {} |",
            ours.idle_percent,
            theirs.idle_percent,
            ours.idle_percent / theirs.idle_percent,
            verdict(ours.idle_percent < IDLE_PERCENT)
        ),
    ]
    .join("\n")
}

/// Puts the report between the markers in docs/performance.md.
pub(crate) fn record(begin: &str, end: &str, report: &str) -> Result<()> {
    let page = paths::workspace().join("docs/performance.md");
    let text = fs::read_to_string(&page).with_context(|| page.display().to_string())?;
    let text = replace(&text, begin, end, report)
        .with_context(|| format!("{} has lost its markers", page.display()))?;
    fs::write(page, text)?;
    Ok(())
}

fn replace(text: &str, begin: &str, end: &str, report: &str) -> Option<String> {
    let (before, rest) = text.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n\n{report}\n\n{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seconds: u64, idle: Option<f64>) -> Run {
        let (to_init, overhead) = (Duration::from_secs(seconds), seconds << 20);
        Run { to_init, overhead, code: overhead / 4, idle }
    }

    #[test]
    fn the_median_is_the_middle() {
        let odd = Summary::of(&[run(9, Some(0.01)), run(1, None), run(2, None)]);
        assert_eq!((odd.fastest, odd.median, odd.slowest), (1.0, 2.0, 9.0));
        assert_eq!((odd.overhead_mib, odd.idle_percent), (9.0, 1.0));
        assert_eq!(odd.without_code_mib, 6.75);
        assert_eq!(Summary::of(&[run(1, None), run(2, None)]).median, 1.5);
    }

    #[test]
    fn runs_that_hang_are_made_again_so_often_and_no_more() {
        let (mut hung, mut left) = (0, MOST_HUNG);
        let mut hangs = || match left.checked_sub(1) {
            Some(less) => {
                left = less;
                bail!("no line")
            }
            None => Ok(()),
        };
        repeat(&mut hung, &mut hangs).unwrap();
        assert_eq!((hung, repeat(&mut hung, hangs).is_ok()), (MOST_HUNG, true));
        let mut made = 0;
        let error = repeat(&mut hung, || -> Result<()> {
            made += 1;
            bail!("no line")
        });
        let error = error.unwrap_err().to_string();
        assert!(made == 1 && error.contains("a quieter machine"), "{made} {error}");
    }

    #[test]
    fn a_missed_bar_is_called_so() {
        let setting =
            Setting { host: "h".into(), qemu: "q".into(), release: "r".into(), runs: 1, mem: 512 };
        let text = report(
            &Summary::of(&[run(70, Some(0.5))]),
            &Summary::of(&[run(10, Some(0.1))]),
            &setting,
        );
        assert_eq!(text.matches("| missed |").count(), 4, "{text}");
    }

    #[test]
    fn recording_replaces_only_what_is_between_the_markers() {
        let page = format!("top\n{BEGIN}\nold\n{END}\nbottom\n");
        let new = replace(&page, BEGIN, END, "new").unwrap();
        assert_eq!(new, format!("top\n{BEGIN}\n\nnew\n\n{END}\nbottom\n"));
        assert_eq!(replace(&new, BEGIN, END, "new").unwrap(), new);
        assert_eq!(replace("no markers", BEGIN, END, "new"), None);
    }
}
