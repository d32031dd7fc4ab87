//! `soak jobs`: a guest of two vCPUs compiles, is tormented by stress-ng and has fio check a
//! disk, for as long as one likes. Every job must succeed, and the kernel's log stay clean.
//!
//! With little code memory, or with code that is taken for changed again and again, the same
//! work tries what the translator does seldom otherwise.

use super::Place;
use super::disks::{self, Format, disk};
use crate::interrupt::Interrupt;
use crate::progress::Live;
use crate::running::Running;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

#[derive(Args, Debug)]
pub(super) struct JobOptions {
    /// How long jobs are begun
    #[arg(long, value_name = "MINUTES", default_value = "30")]
    minutes: u32,
    /// Code memory of jobs' vCPUs: lguest's --code-cache
    #[arg(long, value_name = "SIZE")]
    code_cache: Option<String>,
    /// Have jobs' code taken for changed: lguest's --invalidate
    #[arg(long, value_name = "N[,SEED]", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "1000")]
    invalidate: Option<String>,
    /// Have jobs' translations looked at: lguest's --verify-translations
    #[arg(long)]
    verify_translations: bool,
}

/// A guest that says nothing for so long has hung: no job takes that.
const STALL: Duration = Duration::from_secs(600);
/// How often an interrupt is looked for.
const POLL: Duration = Duration::from_millis(200);
/// How long a guest that is to be ended may say more about what it met.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// What each part of one of fio's jobs uses, MiB.
const FIO_MIB: u64 = 16;

/// What the translator's report has that is shown: how much it was tried.
const OF_INTEREST: [&str; 5] =
    ["engine  ", "  translated", "moved elsewhere", "dropped: code changed", "evicted: no room"];

/// The C project of the compile jobs, and what it is to print.
const PROJECT: [(&str, &str); 10] = [
    ("Makefile", include_str!("../../../guests/jobs/project/Makefile")),
    ("checksum.c", include_str!("../../../guests/jobs/project/checksum.c")),
    ("compress.c", include_str!("../../../guests/jobs/project/compress.c")),
    ("expected", include_str!("../../../guests/jobs/project/expected")),
    ("hash.c", include_str!("../../../guests/jobs/project/hash.c")),
    ("main.c", include_str!("../../../guests/jobs/project/main.c")),
    ("numbers.c", include_str!("../../../guests/jobs/project/numbers.c")),
    ("parts.h", include_str!("../../../guests/jobs/project/parts.h")),
    ("queens.c", include_str!("../../../guests/jobs/project/queens.c")),
    ("sort.c", include_str!("../../../guests/jobs/project/sort.c")),
];

/// `soak jobs`
pub(super) fn jobs(place: &Place, options: &JobOptions) -> Result<()> {
    let initrd = place.job("jobs", &script(options.minutes))?;
    // Another soak may be under way.
    let scratch = place.path(&format!("jobs-{}.raw", std::process::id()));
    Format::Raw.create(&scratch, disks::disk_size(FIO_MIB))?;
    let mut command = place.run(&initrd, "log_buf_len=4M");
    command.args(["--cpus", "2", "--mem", "1G", "--stats"]);
    if let Some(size) = &options.code_cache {
        command.args(["--code-cache", size]);
    }
    if let Some(choice) = &options.invalidate {
        command.args(["--invalidate", choice]);
    }
    if options.verify_translations {
        command.arg("--verify-translations");
    }
    place.with_debian(&mut command);
    command.args(["--disk", &disk(&scratch, Format::Raw, "scratch")]);

    let interrupt = Interrupt::watch()?;
    let mut guest = Running::start(command, "jobs")?;
    let mut tally = Tally::default();
    let done = watch(&mut guest, &mut tally, options.minutes, &interrupt);
    let done = match done {
        Ok(()) => guest.end(),
        Err(_) if interrupt.came() => {
            // Ctrl-C has reached it, too.
            signal(&mut guest, Signal::TERM);
            listen(&mut guest);
            Err(anyhow!("interrupted"))
        }
        Err(error) => Err(with_last_words(&mut guest, error, &place.path("jobs.log"))),
    };
    tally.print();
    for line in guest.said("lguest: ").filter(|line| OF_INTEREST.iter().any(|n| line.contains(n))) {
        println!("  {}", line.trim_start_matches("lguest: "));
    }
    drop(guest);
    fs::remove_file(&scratch)?;
    interrupt.obey()?;
    done
}

fn script(minutes: u32) -> String {
    let mut script = "mkdir -p /tmp/project\n".to_owned();
    for (name, text) in PROJECT {
        script.push_str(&format!("cat >/tmp/project/{name} <<'END OF FILE'\n{text}END OF FILE\n"));
    }
    script.push_str(&format!("seconds={}\n{}\n", minutes * 60, disks::verify(FIO_MIB)));
    script + include_str!("../../../guests/jobs/jobs.sh")
}

/// Follows the guest until all is well in the end, or something is not.
fn watch(
    guest: &mut Running,
    tally: &mut Tally,
    minutes: u32,
    interrupt: &Interrupt,
) -> Result<()> {
    let live = Live::start(&format!("jobs for {minutes} minutes"));
    let mut heard = Instant::now();
    while !interrupt.came() {
        let Some((_, line)) = guest.next_line(Instant::now() + POLL) else {
            if guest.has_ended()? {
                bail!("lguest ended");
            }
            if heard.elapsed() > STALL {
                bail!("the guest has said nothing for {} s", STALL.as_secs());
            }
            continue;
        };
        heard = Instant::now();
        tally.see(guest.pid());
        if let Some((kind, seconds)) = finished(&line) {
            tally.add(kind, seconds);
        } else if let Some((_, kind)) = line.split_once("init: begin ") {
            live.say(&format!("{} jobs done, {kind} has begun", tally.all()));
        } else if let Some((_, what)) = line.split_once("init: FAIL ") {
            bail!("{what}");
        } else if line.ends_with("init: all checks passed") {
            return Ok(());
        }
    }
    bail!("interrupted")
}

/// The kind of a job that was done, and how long it took: "init: done KIND SECONDS".
fn finished(line: &str) -> Option<(&str, u64)> {
    let (kind, seconds) = line.split_once("init: done ")?.1.split_once(' ')?;
    Some((kind, seconds.parse().ok()?))
}

/// Has the guest's monitor say where it is, ends it and keeps all that was said in `log`.
fn with_last_words(guest: &mut Running, error: anyhow::Error, log: &Path) -> anyhow::Error {
    signal(guest, Signal::USR1);
    listen(guest);
    let kept = guest.kill().and_then(|()| {
        let said: String = guest.said("").flat_map(|line| [line, "\n"]).collect();
        fs::write(log, said).with_context(|| log.display().to_string())
    });
    let kept = match kept {
        Ok(()) => format!("all that was said is in {}", log.display()),
        Err(error) => format!("what was said is lost: {error:#}"),
    };
    anyhow!("{error:#}{}\n    {kept}", guest.quote())
}

/// Signals the guest's monitor, if it is still there.
fn signal(guest: &mut Running, signal: Signal) {
    let pid = i32::try_from(guest.pid()).ok().and_then(Pid::from_raw);
    if let (Some(pid), Ok(false)) = (pid, guest.has_ended()) {
        // If it ends just now that is as well.
        let _ = kill_process(pid, signal);
    }
}

/// Takes down what is still said.
fn listen(guest: &mut Running) {
    let end = Instant::now() + LAST_WORDS;
    while guest.next_line(end).is_some() {}
}

/// Seconds that the threads of vCPUs have run, and have waited for a processor of the host's.
fn ran_and_waited(pid: u32) -> Result<(f64, f64)> {
    let (mut ran, mut waited) = (0.0, 0.0);
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        if fs::read_to_string(task.join("comm"))?.starts_with("vcpu") {
            let times = fs::read_to_string(task.join("schedstat"))?;
            let mut times = times.split(' ').filter_map(|word| word.parse::<f64>().ok());
            ran += times.next().unwrap_or_default() / 1e9;
            waited += times.next().unwrap_or_default() / 1e9;
        }
    }
    Ok((ran, waited))
}

/// Jobs that were done, by kind in the order of their first.
#[derive(Debug, Default)]
struct Tally {
    kinds: Vec<(String, u32, u64)>,
    /// Of the vCPUs' threads: see [`ran_and_waited`].
    threads: (f64, f64),
}

impl Tally {
    fn add(&mut self, kind: &str, seconds: u64) {
        match self.kinds.iter_mut().find(|known| known.0 == kind) {
            Some((_, count, sum)) => (*count, *sum) = (*count + 1, *sum + seconds),
            None => self.kinds.push((kind.to_owned(), 1, seconds)),
        }
    }

    /// Takes down how the host has treated the vCPUs so far: one that has no time for them makes
    /// their kernel complain of locked-up CPUs.
    fn see(&mut self, pid: u32) {
        // A guest that has just ended has nothing to add.
        self.threads = ran_and_waited(pid).unwrap_or(self.threads);
    }

    fn all(&self) -> u32 {
        self.kinds.iter().map(|(_, count, _)| count).sum()
    }

    fn print(&self) {
        for (kind, count, seconds) in &self.kinds {
            let mean = *seconds as f64 / f64::from(*count);
            println!("  {kind:<13} {count:>5} done, {mean:.1} s each");
        }
        let (ran, waited) = self.threads;
        println!(
            "  vCPUs ran for {ran:.0} s and waited {waited:.0} s for a processor of the host's"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_counted_by_kind() {
        let mut tally = Tally::default();
        for line in ["init: done fio 3", "[  1.0] init: done compile 10", "init: done fio 4"] {
            let (kind, seconds) = finished(line).unwrap();
            tally.add(kind, seconds);
        }
        assert_eq!(tally.kinds, [("fio".to_owned(), 2, 7), ("compile".to_owned(), 1, 10)]);
        assert_eq!(tally.all(), 3);
        assert!(finished("init: done").is_none() && finished("init: FAIL fio").is_none());
    }

    #[test]
    fn the_script_has_the_whole_project() {
        let script = script(2);
        let folder = crate::paths::workspace().join("guests/jobs/project");
        for entry in fs::read_dir(folder).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(script.contains(&format!("/tmp/project/{name} <<")), "{name}");
        }
        assert!(script.contains("seconds=120\nsize=16\n"));
    }
}
